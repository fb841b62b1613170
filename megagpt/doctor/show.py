"""An examination for a person: one row a check where all hosts agree, one a host where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagpt.doctor.checks import Finding
from megagpt.doctor.examine import Examination

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def show(examination: Examination, console: Console) -> None:
    """Print the table, then each error as a line that names host, value and what to do."""
    table = Table("Check", "Host", "", "Found", "What to do", title="megagpt doctor", title_justify="left")
    for row in _rows(examination):
        table.add_row(
            row.check,
            row.host,
            Text(row.status, _STYLES[row.status]),
            Text(row.value),
            Text(row.fix if row.status != "ok" else ""),
        )
    console.print(table)
    for finding in examination.errors:
        line = f"error: {finding.host}: {finding.check}: {finding.value}; {finding.fix}"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    if examination.ok:
        slots = sum(host.slots for host in examination.hosts)
        console.print(f"all well; hosts: {len(examination.hosts)}, processes: {slots}", highlight=False)


def _rows(examination: Examination) -> Iterator[Finding]:
    order = list(dict.fromkeys(finding.check for finding in examination.findings))
    by_check = sorted(examination.findings, key=lambda finding: order.index(finding.check))
    for _, group in groupby(by_check, key=lambda finding: finding.check):
        yield from _together(list(group), len(examination.hosts))


def _together(findings: Sequence[Finding], n_hosts: int) -> Iterator[Finding]:
    """Hosts that are well share a row; its value is the first one's."""
    well = [finding for finding in findings if finding.status == "ok"]
    hosts = sorted({finding.host for finding in well})
    if len(hosts) > 1:
        who = f"all {n_hosts}" if len(hosts) == n_hosts else f"{len(hosts)} of {n_hosts}"
        yield Finding(who, well[0].check, "ok", well[0].value)
        yield from (finding for finding in findings if finding.status != "ok")
    else:
        yield from findings
