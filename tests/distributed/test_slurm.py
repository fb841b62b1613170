"""The batch files of launch/slurm on a real Slurm: they train, save before the limit, are queued again, and go on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.processes import start, train_command
from tests.distributed.slurm import Slurm
from tests.distributed.test_resume import rows, wait_until
from tests.tiny import run_words

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.mark.parametrize(
    ("script", "signal"),
    [
        ("srun", ["--batch", "--signal=USR1"]),  # what --signal=B:USR1@600 sends before the time limit
        ("srun", ["--signal=TERM"]),  # what preemption sends at the start of its time of grace: to the tasks alone
        ("deepspeed", ["--batch", "--signal=USR1"]),
    ],
    ids=["srun, time limit", "srun, preemption", "deepspeed, time limit"],
)
def test_a_job_on_two_nodes_saves_is_queued_again_and_ends_as_if_nothing_had_been(
    slurm, script, signal, tmp_path, tokens
):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = [f"train.max_steps={STEPS}", "parallel.zero_stage=2"]
    job = slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        "--time=30",
        f"--output={log}",
        str(ROOT / "launch" / "slurm" / f"{script}.sbatch"),
        *run_words(run_dir, tokens, *words, "log.progress=true"),
        folder=ROOT,
        VENV=sys.prefix,
        PROCESSES_PER_NODE="1",
        MASTER_ADDR="127.0.0.1",  # this cluster's node names lead nowhere
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 2, seconds=150)
        slurm.say("scancel", *signal, job)
        slurm.wait(job, "1", field="Restarts")
        (stopped_at,) = CheckpointStore(run_dir / "checkpoints").steps()
        assert stopped_at < STEPS
        slurm.wait(job, "COMPLETED")
    finally:
        slurm.say("scancel", job, check=False)
    text = log.read_text()
    assert f"saved at step {stopped_at}; the same command goes on from there" in text
    assert f"resuming at step {stopped_at}" in text
    start(train_command, 2, run_words(tmp_path / "one", tokens, *words), log=tmp_path / "one.log").finish()
    for row, other in zip(rows(tmp_path / "one"), rows(run_dir), strict=True):
        assert other == pytest.approx(row, rel=1e-6)


def test_wrong_input_ends_the_job_with_2_and_is_not_queued_again(slurm, tmp_path, tokens):
    job = slurm.submit(
        "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30",
        f"--output={tmp_path / 'log'}",
        str(ROOT / "launch" / "slurm" / "srun.sbatch"),
        *run_words(tmp_path / "run", tokens, "train.global_batch_size=6", "train.micro_batch_size=6"),
        folder=ROOT, VENV=sys.prefix, OMP_NUM_THREADS="1",
    )  # fmt: skip
    slurm.wait(job, "FAILED")
    assert slurm.field(job, "ExitCode") == "2:0"
    assert slurm.field(job, "Restarts") == "0"
    assert "must be a multiple of data-parallel processes (2)" in (tmp_path / "log").read_text()
