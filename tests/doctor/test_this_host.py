"""`megagpt doctor` on this host, for real: the probe's own process, real locks, a real all-reduce."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from megagpt.cli import main
from megagpt.doctor import all_reduce
from megagpt.doctor.checks import Finding
from megagpt.doctor.examine import Examination
from megagpt.doctor.hosts import Access, Host, ask
from megagpt.doctor.show import show

NVIDIA_SMI = """\
#!/bin/sh
case "$*" in
*query-gpu*) echo '0, GPU-aa, NVIDIA A100-SXM4-80GB, 81920, 4, 570.86.15'
             echo '1, GPU-bb, NVIDIA A100-SXM4-80GB, 81920, [N/A], 570.86.15' ;;
*query-compute*) echo 'GPU-bb, 4711, 30000' ;;
*) echo '| NVIDIA-SMI 570.86.15   Driver Version: 570.86.15   CUDA Version: 12.8     |' ;;
esac
"""
"""What nvidia-smi prints for two GPUs; a GPU is not at hand where the tests run."""


def doctor(*words):
    result = CliRunner().invoke(main, ["doctor", "--json", *words])
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["ok"] else 2)
    return {row["check"]: row for row in told["findings"]}


def lock_in(folder, age_seconds):
    lock = folder / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_seconds,) * 2)
    return lock


def test_a_stale_lock_is_found_and_its_removal_heals(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = lock_in(tmp_path, 3600)
    found = doctor()["op build locks"]
    assert (found["host"], found["status"]) == ("localhost", "error")
    assert found["fix"].endswith(f"rm {lock}")
    with lock.open():
        held = doctor()["op build locks"]
    assert (held["status"], held["fix"]) == ("warning", f"process {os.getpid()} builds there; a start now waits for it")
    lock.unlink()
    assert doctor()["op build locks"]["status"] == "ok"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for GPUs here")
def test_gpus_are_read_from_nvidia_smi_and_torch_for_cpu_beside_them_is_told(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = doctor()
    assert found["slots"]["value"] == "GPU 1 is in use: None of 81920.0 MiB, processes 4711"
    assert found["torch"]["value"] == "torch is built for the CPU, but there are GPUs"


def test_an_all_reduce_is_right_and_measured(tmp_path):
    access = Access((), remote=False, folder=tmp_path, environment={"GLOO_SOCKET_IFNAME": "lo"})
    asked = {"first_rank": 0, "slots": 3, "world_size": 3, "address": "127.0.0.1", "port": free_port(), "seconds": 60}
    answer = ask(access, Host("here", 3), inspect.getsource(all_reduce), [json.dumps(asked)], seconds=100)
    assert answer.trouble is None
    done = [row for row in answer.rows if row["phase"] == "done"]
    assert sorted(row["rank"] for row in done) == [0, 1, 2]
    assert all(0 < row["latency_seconds"] < 10 and row["bus_bytes_per_second"] > 1e6 for row in done)


def test_an_all_reduce_whose_partner_is_missing_ends_in_time_and_says_so(tmp_path):
    access = Access((), remote=False, folder=tmp_path, environment={"GLOO_SOCKET_IFNAME": "lo"})
    asked = {"first_rank": 0, "slots": 1, "world_size": 2, "address": "127.0.0.1", "port": free_port(), "seconds": 1}
    answer = ask(access, Host("here", 1), inspect.getsource(all_reduce), [json.dumps(asked)], seconds=60)
    assert answer.trouble is not None
    (failed,) = [row for row in answer.rows if row["phase"] == "failed"]
    assert "1/2 clients joined" in failed["error"]


def test_hosts_that_are_well_share_a_row_and_each_error_is_a_line(capsys):
    hosts = tuple(Host(f"n{i}", 8) for i in range(16))
    findings = [Finding(host.name, "clock", "ok", "right") for host in hosts[:-1]]
    findings.append(Finding("n15", "clock", "error", "9 s ahead", "start chronyd there"))
    examination = Examination(hosts, tuple(findings))
    show(examination, Console(width=120, file=sys.stdout))
    out = capsys.readouterr().out
    assert "15 of 16" in out
    assert "n3" not in out
    assert out.splitlines()[-1] == "error: n15: clock: 9 s ahead; start chronyd there"
    assert not examination.ok


@pytest.mark.parametrize("words", [["--hostfile", "absent"], ["--seconds", "0"]])
def test_wrong_input_is_one_message(words):
    result = CliRunner().invoke(main, ["doctor", *words])
    assert result.exit_code == 2
    assert "rror: " in result.output
    assert "Traceback" not in result.output


def free_port():
    from tests.distributed.processes import _free_port

    return _free_port()
