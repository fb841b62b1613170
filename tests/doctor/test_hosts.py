"""Hostfiles and launcher variables are read as the deepspeed launcher reads them; trouble with ssh is explained."""

from pathlib import Path

import pytest

from megagpt.doctor.hosts import Access, Host, ask, launcher_environment, read_hostfile
from megagpt.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "launch" / "hostfile.example"


@pytest.mark.parametrize(
    "text",
    ["a slots=8\nb slots=4\n", "# comment\n\n  node-1.net   slots=16 # more\n", EXAMPLE.read_text()],
    ids=["plain", "comments", "example"],
)
def test_a_hostfile_is_read_as_deepspeed_reads_it(text, tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(text)
    assert {host.name: host.slots for host in read_hostfile(path)} == dict(fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n", "hosts:1: 'a' is not of the form `NAME slots=N`"),
        ("a slots=8\na slots=8\n", "hosts:2: a is listed twice"),
        ("# nothing\n", "no host"),
    ],
)
def test_a_hostfile_that_deepspeed_refuses_is_refused_by_line(text, message, tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match="Hostfile"):
        fetch_hostfile(str(path))
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert message in str(caught.value)


def test_an_absent_hostfile_is_refused(tmp_path):
    """deepspeed itself goes on without a word on this host alone."""
    with pytest.raises(ConfigError, match="cannot read the hostfile: No such file"):
        read_hostfile(tmp_path / "absent")


def test_the_launchers_variables(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("GLOO_SOCKET_IFNAME=eth0\nA=1\n")
    second.write_text("A = two=2 \n")
    environment = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/p", "HOME": "/root"}
    assert launcher_environment(environment, [first, second, tmp_path / "absent"]) == {
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": "/p",
        "GLOO_SOCKET_IFNAME": "eth0",
        "A": "two=2",
    }


def test_a_line_that_the_launcher_stumbles_over_is_named(tmp_path):
    (tmp_path / "env").write_text("A=1\n\n")
    with pytest.raises(ConfigError, match=r"env:2: not of the form NAME=VALUE; .* no blank lines"):
        launcher_environment({}, [tmp_path / "env"])


@pytest.mark.parametrize(
    ("said", "code", "fix"),
    [
        ("Host key verification failed.", 255, "ssh-keyscan far"),
        ("root@far: Permission denied (publickey).", 255, "ssh-copy-id far"),
        ("ssh: Could not resolve hostname far: Name or service not known", 255, "mend the hostfile"),
        ("ssh: connect to host far port 22: Connection timed out", 255, "firewall"),
        ("kex_exchange_identification: banner", 255, "try `ssh far hostname`"),
        ("", 91, "mount the checkout's file system"),
        ("", 92, "put the Python environment on storage that all hosts share"),
    ],
)
def test_trouble_with_ssh_says_what_to_do(said, code, fix, tmp_path, monkeypatch):
    """What ssh prints, by a stand-in for ssh."""
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    answer = ask(Access((), remote=True, folder=tmp_path), Host("far", 1), "", [], seconds=10)
    assert answer.rows == ()
    assert said in str(answer.trouble)
    assert fix in answer.fix


def test_a_host_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    answer = ask(Access((), remote=True, folder=tmp_path), Host("far", 1), "", [], seconds=0.3)
    assert answer.trouble == "no answer within 0 s"
