"""Whom a hang is put down to, from reports alone."""

from __future__ import annotations

from megagpt.train.beats import Member, Report
from megagpt.train.verdict import WAIT_FOR_EACH_OTHER, judge, lost

MEMBERS = [Member(rank, "h", 10 + rank, 0.0) for rank in range(3)]


def reports(*rows):
    """(mark, waits, what its writer does, whether that waits) of each rank."""
    return {
        rank: Report(rank, mark, f"step {mark}", "loop.py:1", waits, writing, writer_waits)
        for rank, (mark, waits, writing, writer_waits) in enumerate(rows)
    }


def test_the_rank_behind_is_named_before_those_that_do_not_wait():
    found = judge(reports((5, False, "", False), (4, True, "", False), (5, True, "", False)), MEMBERS, writer=False)
    assert found.ranks == [1]
    assert str(found) == "rank 1 (h, pid 11) did not arrive: step 4, at loop.py:1"


def test_the_rank_that_does_not_wait_is_named_and_none_where_all_do():
    assert judge(reports((5, True, "", False), (5, False, "", False)), MEMBERS, writer=False).ranks == [1]
    all_wait = judge(reports((5, True, "", False), (5, True, "", False)), MEMBERS, writer=False)
    assert (all_wait.ranks, str(all_wait)) == ([], WAIT_FOR_EACH_OTHER)


def test_where_a_save_is_late_the_writer_counts_that_does_not_wait_and_training_does_not():
    rows = reports((9, True, "writing, at a", True), (7, False, "writing, at b", False))
    found = judge(rows, MEMBERS, writer=True)
    assert found.ranks == [1]
    assert str(found).endswith("did not arrive: writing, at b")


def test_main_threads_that_wait_for_their_writers_are_not_named_for_them():
    """As where the next save came before the deadline of the one under way."""
    rows = reports((9, False, "writing, at a", True), (9, False, "writing, at b", False))
    assert judge(rows, MEMBERS, writer=False).ranks == [1]


def test_no_rank_is_named_where_the_disk_is_too_slow_for_all():
    found = judge(reports((9, True, "writing, at a", False), (9, True, "writing, at a", False)), MEMBERS, writer=True)
    assert found.ranks == []
    assert "none waits for another" in str(found)
    alone = judge(reports((9, True, "writing, at a", False)), MEMBERS, writer=True)
    assert alone.ranks == [0]


def test_ranks_that_gave_no_answer_are_lost_unless_they_said_why_they_ended():
    found = lost(MEMBERS[1:], {2: "OSError: x"})
    assert found.ranks == [1, 2]
    assert "rank 1 (h, pid 11) did not arrive and gives no sign of life" in str(found)
    assert "rank 2 (h, pid 12) ended: OSError: x" in str(found)
