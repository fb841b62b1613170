"""A run over two hosts, through ssh and the deepspeed launcher, is the run on one host; `doctor` says which is ill."""

from __future__ import annotations

import json
import shlex
import time

import pytest

from megagpt.parallel.plan import REFUSALS
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import published, rows, wait_until
from tests.distributed.two_hosts import BIN, ROOT, TwoHosts
from tests.tiny import run_config, run_words

pytestmark = pytest.mark.slow
exhaustive = pytest.mark.exhaustive

STEPS = 4
PROGRAM = str(ROOT / "launch" / "pretrain.py")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_hosts")
    private = folder / "private"
    private.mkdir()
    with TwoHosts(folder, private) as hosts:
        yield hosts


def through_pdsh(hosts, slots, words):
    """One command on the first host."""
    return hosts.run("deepspeed", "--hostfile", str(hosts.write_hostfile(slots)), PROGRAM, *words)


def command_on(hosts, slots, node_rank, words):
    """The launcher of one host."""
    hostfile, address = hosts.write_hostfile(slots), hosts.addresses["alpha"]
    variables = ["env", f"PYTHONPATH={ROOT}", *(hosts.folder / ".deepspeed_env").read_text().split()]
    local = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", address, "--node_rank", node_rank]
    return [*variables, str(BIN / "deepspeed"), *local, PROGRAM, *words]


def through_ssh(hosts, slots, words):
    """The launcher on every host, without pdsh: what a scheduler does."""
    second = hosts.start("ssh", "beta", f"cd {hosts.folder} && {shlex.join(command_on(hosts, slots, '1', words))}")
    code, out = hosts.run(*command_on(hosts, slots, "0", words))
    second_out, _ = second.communicate(timeout=60)
    return max(code, second.returncode), out + second_out


@pytest.mark.parametrize(
    ("launch", "slots", "layout"),
    [
        (through_pdsh, 1, ["parallel.zero_stage=2"]),
        pytest.param(through_ssh, 1, ["parallel.zero_stage=3"], marks=exhaustive),
        pytest.param(through_pdsh, 2, ["parallel.tensor=2", "parallel.zero_stage=2"], marks=exhaustive),
        pytest.param(through_ssh, 2, ["parallel.tensor=2", "parallel.pipeline=2"], marks=exhaustive),
    ],
    ids=["pdsh, ZeRO-2 across", "ssh, ZeRO-3 across", "pdsh, tensor within, ZeRO-2 across", "ssh, pipeline across"],
)
def test_two_hosts_give_the_rows_of_one(hosts, launch, slots, layout, tmp_path, tokens):
    common = [f"train.max_steps={STEPS}", *layout]
    for rule in REFUSALS:
        if rule.applies(run_config(tmp_path, tokens, *common)):
            pytest.skip(rule.reason)
    code, out = launch(hosts, slots, run_words(tmp_path / "two", tokens, *common))
    assert code == 0, out
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["world_size"] == 2 * slots
    start(train_command, 2 * slots, run_words(tmp_path / "one", tokens, *common), log=tmp_path / "log").finish()
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-6)


@exhaustive
def test_a_run_goes_on_without_the_host_that_is_gone(hosts, tmp_path, tokens):
    run_dir = tmp_path / "run"
    common = ["train.max_steps=120", "checkpoint.save_every=10", "parallel.zero_stage=2"]
    hostfile = hosts.write_hostfile(1)
    options = ["--restarts", "1", "--wait", "1", "--hostfile", str(hostfile)]
    supervisor = hosts.start(str(BIN / "megagpt"), "train", *options, *run_words(run_dir, tokens, *common))
    try:
        wait_until(lambda: len(published(run_dir)) >= 2)
        hosts.stop_sshd("beta")
        for process in hosts.processes("beta"):
            process.kill()
        out, _ = supervisor.communicate(timeout=200)
    finally:
        supervisor.kill()
        hosts.start_sshd("beta")
    assert supervisor.returncode == 0, out
    assert "left out: beta: " in out
    assert (run_dir / "hostfile").read_text() == "alpha slots=1\n"
    history = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    started, failed, resumed, finished = [event for event in history if event["event"] != "saved"]
    assert (started["event"], started["world_size"]) == ("started", 2)
    assert failed["event"] == "failed"
    assert (resumed["event"], resumed["world_size"]) == ("resumed", 1)
    assert finished["event"] == "finished"
    start(train_command, 2, run_words(tmp_path / "one", tokens, *common), log=tmp_path / "log").finish()
    found, expected = rows(run_dir), rows(tmp_path / "one")
    assert [row["step"] for row in found] == list(range(1, 121))
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-4)


@exhaustive
def test_a_host_whose_network_is_gone_is_named_and_both_sides_end(hosts, tmp_path, tokens):
    """No process dies and no connection is reset, so that nobody hears of it; a step's deadline would be minutes."""
    run_dir = tmp_path / "run"
    words = run_words(run_dir, tokens, "train.max_steps=1000000", "watch.silent_seconds=5", "watch.step_seconds=600")
    commands = {name: command_on(hosts, 2, str(node), words) for node, name in enumerate(hosts.addresses)}
    launchers = {name: hosts.start(*command, on=name, named=True) for name, command in commands.items()}
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 5)
        hosts.cut("beta")
        began = time.monotonic()
        outputs = {name: launcher.communicate(timeout=120)[0] for name, launcher in launchers.items()}
        seconds = time.monotonic() - began
    finally:
        hosts.mend("beta")
        for launcher in launchers.values():
            launcher.kill()
    assert {name: launcher.returncode for name, launcher in launchers.items()} == {"alpha": 4, "beta": 4}, outputs
    assert seconds < 60, outputs
    history = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    hung = {tuple(event["ranks"]): event["reason"] for event in history if event["event"] == "hung"}
    assert hung.keys() == {(0, 1), (2, 3)}, "each side names the other"
    assert "rank 2 has given no sign of life for " in hung[2, 3]
    assert "the store of the process group" in hung[0, 1]
    assert all("watch.silent_seconds" in reason for reason in hung.values())
    assert "rank 2 (beta, pid " in outputs["alpha"]
    assert "rank 0 (alpha, pid " in outputs["beta"]
    for name in hosts.addresses:
        left = [process for process in hosts.processes(name) if any("pretrain" in word for word in process.cmdline())]
        assert left == []


def doctor(hosts, *words):
    """Exit code, and each finding that is not well: (host, check) -> value and what to do."""
    code, out = hosts.run(str(BIN / "megagpt"), "doctor", "--hostfile", str(hosts.write_hostfile(1)), "--json", *words)
    told = json.loads(out)
    ill = {(row["host"], row["check"]): row for row in told["findings"] if row["status"] == "error"}
    assert told["ok"] is (not ill)
    return code, ill, told["findings"]


def test_doctor_finds_two_hosts_well_and_measures_an_all_reduce(hosts):
    code, ill, findings = doctor(hosts)
    assert (code, ill) == (0, {})
    both = ["reached", "packages", "megagpt", "clock", "network", "torch"]
    assert {(row["host"], row["check"]) for row in findings} >= {
        (host, check) for host in ("alpha", "beta") for check in both
    }
    (measured,) = [row["value"] for row in findings if row["check"] == "all-reduce"]
    assert measured.startswith("2 processes over gloo: latency ")
    assert [row["value"] for row in findings if row["check"] == "shared storage"] == [str(hosts.folder)]
    assert not list(hosts.folder.glob(".megagpt_doctor_*"))


@exhaustive
def test_doctor_names_the_host_whose_folder_is_not_the_shared_one_and_the_port_that_is_taken(hosts):
    """Port 22 of alpha is sshd's: beta reaches something there that is no rendezvous."""
    code, ill, _ = doctor(hosts, "--shared", str(hosts.private), "--master-port", "22", "--seconds", "5")
    assert code == 2
    assert ill.keys() == {("beta", "shared storage"), ("alpha", "all-reduce"), ("beta", "all-reduce")}
    assert f"{hosts.private} is not the folder that alpha has there" in ill["beta", "shared storage"]["value"]
    assert ill["beta", "shared storage"]["fix"] == "mount on beta what alpha has mounted"
    assert "EADDRINUSE" in ill["alpha", "all-reduce"]["value"]


@exhaustive
def test_doctor_names_the_host_that_ssh_does_not_reach(hosts):
    hosts.stop_sshd("beta")
    try:
        code, ill, findings = doctor(hosts)
    finally:
        hosts.start_sshd("beta")
    assert code == 2
    assert list(ill) == [("beta", "reached")]
    assert "Connection refused" in ill["beta", "reached"]["value"]
    assert [row["fix"] for row in findings if row["check"] == "all-reduce"] == ["mend first: beta"]
