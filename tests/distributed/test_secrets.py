"""What only the environment knows stays there: no key of a service is in a run's folder, its report or its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import run_words

MEGAGPT = Path(sys.executable).with_name("megagpt")
SECRETS = {
    name: f"canary-of-{name}-x7Q"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "SOME_PASSWORD",
    )
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokens):
    return tmp_path_factory.mktemp("secrets") / "run"


def said_by(*words: object, code: int = 0) -> str:
    environment = os.environ | SECRETS
    done = subprocess.run([MEGAGPT, *map(str, words)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.exhaustive
def test_no_secret_of_the_environment_is_written_or_said(run_dir, tokens):
    words = run_words(run_dir, tokens, "checkpoint.save_every=6", "log.tensorboard=true", "log.progress=true")
    said = said_by("train", "--processes", "2", "--restarts", "0", *words)
    said += said_by(
        "train", "--processes", "2", *words, "optim.lr=1e9", "optim.grad_clip=0", "train.max_steps=40", code=3
    )
    said += said_by("train", "--check", *words) + said_by("report", run_dir) + said_by("checkpoint", "list", run_dir)
    said += said_by("doctor")
    written = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {path.suffix for path in written} >= {".jsonl", ".yaml", ".json", ".safetensors", ".html", ".md"}
    for secret in SECRETS.values():
        assert secret not in said
        assert [str(path) for path, content in written.items() if secret.encode() in content] == []
