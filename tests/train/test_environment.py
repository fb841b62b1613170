"""Which process this is under srun, mpirun, another launcher, or none; the variables are those of real starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagpt.config.schema import WatchSection
from megagpt.errors import ConfigError
from megagpt.train.environment import NCCL_SETTINGS, check_rendezvous, let_the_watch_speak, name_process

SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[03-04,09]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def named(environment):
    """What is added."""
    changed = dict(environment)
    name_process(changed)
    assert changed.items() >= environment.items(), "what is set stays"
    return {name: value for name, value in changed.items() if name not in environment}


def test_srun():
    assert named(SRUN) == {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "29500",
    }
    assert named(SRUN | {"SLURM_NODEID": "2"})["LOCAL_SIZE"] == "4"
    assert "MASTER_ADDR" not in named(SRUN | {"MASTER_ADDR": "10.0.0.3"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,012]-ib,login", "gpu003-ib"),
        ("a,b[1-3]", "a"),
        ("rack[2-4]node[10,12]", "rack2node10"),
    ],
)
def test_the_first_of_slurms_hosts(nodelist, first):
    """As `scontrol show hostnames NODELIST | head -n 1` says."""
    assert named(SRUN | {"SLURM_STEP_NODELIST": nodelist})["MASTER_ADDR"] == first


def test_a_batch_script_is_no_step():
    """sbatch sets SLURM_PROCID=0 for the script itself; a python there is one process."""
    found = named({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[1-2]"})
    assert (found["RANK"], found["WORLD_SIZE"]) == ("0", "1")


def test_mpirun_must_be_told_where_rank_0_is_unless_all_are_on_one_host():
    found = named(MPIRUN)
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set: .* `mpirun -x MASTER_ADDR=node01"):
        check_rendezvous(found)
    check_rendezvous(found | {"MASTER_ADDR": "node01"})
    assert named(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})["MASTER_ADDR"] == "127.0.0.1"


def test_no_launcher_is_one_process_that_takes_any_free_port():
    found = named({})
    assert found == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    check_rendezvous(found)


def test_a_launcher_that_names_ranks_is_left_alone():
    """Also inside a Slurm step: `srun deepspeed --no_ssh ...`."""
    assert named(SRUN | {"RANK": "0", "WORLD_SIZE": "2"}) == {}


def test_nccl_gives_up_after_the_watch_and_as_the_user_says():
    environment = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "99", "RANK": "1"}
    let_the_watch_speak(environment)
    expected = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "99", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "RANK": "1"}
    assert environment == expected
    longest = max(WatchSection().startup_seconds, WatchSection().save_seconds, WatchSection().eval_seconds)
    assert int(NCCL_SETTINGS["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > 10 * longest


@pytest.mark.parametrize("name", NCCL_SETTINGS)
def test_the_installed_torch_has_these_settings(name):
    """A name that it does not read would change nothing, without a word."""
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    assert f'"{name}"' in header.read_text()


@pytest.mark.parametrize(
    "program",
    [
        "launch/pretrain.py",
        pytest.param("launch/evaluate.py", marks=pytest.mark.exhaustive),
        pytest.param("megagpt/train/__main__.py", marks=pytest.mark.exhaustive),
    ],
)
def test_every_program_that_is_watched_sets_them_first(program, tmp_path):
    """Seen in its own process, in the place of what it would start."""
    root = Path(__file__).resolve().parents[2]
    code = (
        "import os, runpy, sys\n"
        "import megagpt.cli, megagpt.train.run as run\n"
        "def shown(*_, **__):\n"
        "    print('seen', os.environ.get('TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC'))\n"
        "    sys.stdout.flush()\n"
        "    os._exit(0)\n"
        "run.main = shown\n"
        "megagpt.cli.main.main = shown\n"
        f"runpy.run_path({str(root / program)!r}, run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_NCCL")}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert f"seen {NCCL_SETTINGS['TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC']}" in done.stdout, done.stderr
