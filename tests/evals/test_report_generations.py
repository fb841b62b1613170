from __future__ import annotations

import json

import pytest

from evals.generations import write_generations
from megagpt.errors import CheckpointError, EvalError
from tests.evals.conftest import CONTEXT, save_run

PROMPTS = ("The quick", "Question:")


def test_prompts_are_continued_greedily_and_by_sampling(tmp_path, tokenizer):
    path = write_generations(save_run(tmp_path / "run", tokenizer), PROMPTS, n_tokens=5, seed=1)
    assert path == tmp_path / "run" / "evals" / "step_00000010" / "generations.json"
    samples = json.loads(path.read_text())["samples"]
    assert [(row["prompt"], row["sampling"]) for row in samples] == [
        ("The quick", "greedy"),
        ("Question:", "greedy"),
        ("The quick", "temperature 0.8, top-k 50, seed 1"),
        ("Question:", "temperature 0.8, top-k 50, seed 1"),
    ]
    assert all(row["text"] for row in samples)


def test_a_second_call_reads_what_the_first_wrote_and_new_weights_or_settings_write_again(tmp_path, tokenizer):
    run = save_run(tmp_path / "run", tokenizer)
    path = write_generations(run, PROMPTS, n_tokens=5, seed=1)
    before = path.stat().st_mtime_ns, path.read_text()
    write_generations(run, PROMPTS, n_tokens=5, seed=1)
    assert (path.stat().st_mtime_ns, path.read_text()) == before
    write_generations(run, PROMPTS, n_tokens=6, seed=1)
    assert path.read_text() != before[1]
    other = write_generations(save_run(tmp_path / "other", tokenizer, seed=1), PROMPTS, n_tokens=5, seed=1)
    assert other.read_text() != before[1]


def test_a_full_context_is_said(tmp_path, tokenizer):
    path = write_generations(save_run(tmp_path / "run", tokenizer), ("The quick",), n_tokens=CONTEXT, seed=0)
    prompt_tokens = len(tokenizer.encode("The quick"))
    room = CONTEXT - prompt_tokens
    reasons = {row["reason"] for row in json.loads(path.read_text())["samples"]}
    assert all(
        "ended by the model" in r or r == f"{room} of {CONTEXT} tokens: the context holds no more" for r in reasons
    )


def test_an_empty_prompt_and_a_missing_run_are_refused(tmp_path, tokenizer):
    with pytest.raises(EvalError, match="prompt '' has 0 tokens"):
        write_generations(save_run(tmp_path / "run", tokenizer), ("",), n_tokens=5, seed=0)
    with pytest.raises(CheckpointError, match="no such folder"):
        write_generations(tmp_path / "absent", PROMPTS, n_tokens=5, seed=0)
