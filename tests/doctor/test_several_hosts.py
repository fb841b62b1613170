"""Which of three hosts an all-reduce fails on. The hosts are this one thrice: ssh is a stand-in that stays here."""

from __future__ import annotations

import pytest

from megagpt.doctor.examine import Request, examine
from tests.distributed.processes import _free_port

SSH = """\
#!/bin/sh
for word; do host=$line; line=$word; done
[ "$host" = n3 ] && export GLOO_SOCKET_IFNAME=none0
exec sh -c "$line"
"""
"""The last two words are the host and what to run there; n3 has no interface that gloo could use."""


@pytest.mark.slow
def test_of_three_hosts_the_one_whose_network_is_broken_is_named(tmp_path, monkeypatch):
    program = tmp_path / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    request = Request(hostfile, (tmp_path,), seconds=10, master_addr="127.0.0.1", master_port=_free_port())
    examination = examine(request, {})
    found = [finding for finding in examination.errors if finding.check == "all-reduce"]
    assert [finding.host for finding in found] == ["n3"]
    assert "none0" in found[0].value
    assert [row.status for row in examination.findings if row.check == "shared storage"] == ["ok", "ok"]
