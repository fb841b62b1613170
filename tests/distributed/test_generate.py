"""Text from a model that several processes share is the text of the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.generate import generate_text
from tests.distributed.processes import start
from tests.evals.conftest import save_run, tokenizer, tokenizer_file  # noqa: F401 - fixtures

PROMPTS = ["The quick brown fox", "Question: How", "A function returns a value; the list"]
ROOT = Path(__file__).resolve().parents[2]


def command(words: list[str]) -> int:
    """What launch/generate.py does, for `start`."""
    from megagpt.cli import main

    try:
        main.main(["generate", *words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory, tokenizer):  # noqa: F811
    folder = tmp_path_factory.mktemp("generate")
    return {family: save_run(folder / family, tokenizer, family=family) for family in ("gpt2", "llama")}


@pytest.fixture
def run_dir(run_dirs):
    return run_dirs["gpt2"]


def words(run_dir, *more):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["--checkpoint", str(run_dir), *prompts, "--max-new-tokens", "20", *more]


@pytest.mark.parametrize(
    ("family", "processes", "cut"),
    [
        ("gpt2", 2, ["--tensor", "2"]),
        # More processes than key and value heads.
        pytest.param("llama", 4, ["--tensor", "4"], marks=pytest.mark.exhaustive),
        ("llama", 4, ["--tensor", "2", "--pipeline", "2", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]),
    ],
    ids=["tensor", "tensor 4", "both, sampled"],
)
def test_text_of_several_processes_is_the_text_of_one(family, processes, cut, run_dirs, tmp_path):
    run_dir = run_dirs[family]
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 3} if "--seed" in cut else {}
    expected = generate_text(checkpoint=run_dir, prompts=PROMPTS, max_new_tokens=20, **sampling)
    out = start(command, processes, words(run_dir, *cut), log=tmp_path / "log").finish()
    assert out.strip().endswith("\n".join(expected).replace("\r", "\n"))  # as a file is read
    assert out.count(PROMPTS[0]) == 1  # one process writes


def test_another_number_of_processes_is_refused(run_dir, tmp_path):
    group = start(command, 2, words(run_dir, "--tensor", "4"), log=tmp_path / "log")
    assert group.wait() == [2, 2]
    assert "--tensor 4 and --pipeline 1 need 4 processes, and the launcher started 2" in group.output()


@pytest.mark.slow
def test_the_launcher_runs_it_over_a_pipeline(run_dir):
    expected = generate_text(checkpoint=run_dir, prompts=PROMPTS, max_new_tokens=20)
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "launch/generate.py"]
    done = subprocess.run(
        [*launcher, *words(run_dir, "--pipeline", "2")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n".join(expected) in done.stdout
