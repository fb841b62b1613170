"""Whom a hang is put down to, from what the ranks report of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagpt.train.beats import Member, Report

WAIT_FOR_EACH_OTHER = "all ranks wait for each other, or for a device"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which ranks did not arrive, and why."""

    blamed: Sequence[tuple[int, str]] = ()
    """(rank, what a person is told of it)."""
    otherwise: str = WAIT_FOR_EACH_OTHER
    """Where no rank can be named."""

    def __str__(self) -> str:
        return " and ".join(words for _, words in self.blamed) or self.otherwise

    @property
    def ranks(self) -> list[int]:
        """The ranks that are named."""
        return [rank for rank, _ in self.blamed]


def lost(members: Sequence[Member], ends: Mapping[int, str]) -> Verdict:
    """Ranks that were asked and gave no answer.

    Args:
        members: those ranks.
        ends: what some of them have said when they ended.
    """
    return Verdict([(member.rank, _silent(member, ends.get(member.rank))) for member in members])


def judge(reports: Mapping[int, Report], members: Sequence[Member], *, writer: bool) -> Verdict:
    """All have answered: the ranks behind the others, or else those that do not wait.

    Args:
        reports: of the ranks.
        members: for their names.
        writer: the deadline was that of a save beside training; the main threads have nothing to do with it.
    """
    names = {member.rank: str(member) for member in members}
    writing = [report for report in reports.values() if report.writing and not report.writer_waits]
    stuck = Verdict(
        [
            (one.rank, f"{names.get(one.rank, f'rank {one.rank}')} did not arrive: {one.writing}")
            for one in sorted(writing, key=lambda report: report.rank)
        ]
    )
    if writer:
        if len(writing) == len(reports) > 1:
            return Verdict(otherwise="no rank is done with it, and none waits for another")
        return stuck
    furthest = max(report.mark for report in reports.values())
    behind = [report for report in reports.values() if report.mark < furthest]
    if not behind:
        behind = [report for report in reports.values() if not report.waits]
    if len(behind) == len(reports) > 1:
        return stuck if 0 < len(writing) < len(reports) else Verdict()
    return Verdict(
        [
            (one.rank, f"{names.get(one.rank, f'rank {one.rank}')} did not arrive: {one.doing}, at {one.where}")
            for one in sorted(behind, key=lambda report: report.rank)
        ]
    )


def _silent(member: Member, cause: str | None) -> str:
    return f"{member} ended: {cause}" if cause else f"{member} did not arrive and gives no sign of life"
