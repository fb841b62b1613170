"""Our backend against lm-eval's own Hugging Face backend, on exported random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evals.backend import MegaGPTLM
from evals.scoring import quiet_bars
from evals.task_loader import LoadedTask, load_task, plan_from_folders, plan_task
from megagpt.checkpoint.hf import export_hf
from megagpt.tokenizer import Tokenizer
from tests.evals.conftest import CONFIGS, CONTEXT, TEXT, random_model
from tests.evals.fixtures import write_all

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "evals"
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_file: Path
):
    """(ours, lm-eval's) over the same weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(request.param)
    folder = tmp_path_factory.mktemp("export") / request.param
    export_hf(model, CONFIGS[request.param], tokenizer_file, folder, eot_id=tokenizer.eot_id)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=4,
        max_length=CONTEXT,
        device="cpu",
    )
    return MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=4), theirs


@pytest.fixture(scope="module")
def hub_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("hub"))


def run(lm: Any, loaded: LoadedTask, limit: int | None = None) -> dict[str, Any]:
    with quiet_bars():
        return evaluate(lm, {"tasks": loaded.tasks, "groups": loaded.groups}, limit=limit, bootstrap_iters=0)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Same scores, log-likelihoods to 1e-4, same text."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    n_answers = 0
    for task, samples in ours["samples"].items():
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["prompt_hash"] == other["prompt_hash"]
            for (answer,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                n_answers += 1
                if isinstance(expected, str):
                    assert answer == expected
                else:
                    assert answer[0] == pytest.approx(expected[0], abs=TOLERANCE)
                    assert answer[1] == expected[1]
    assert n_answers
    assert ours["results"] == theirs["results"]


@pytest.mark.parametrize("task", ["megagpt_smoke", "megagpt_smoke_generate"])
def test_own_tasks_score_as_with_lm_evals_hf_backend(both, tmp_path: Path, task: str) -> None:
    loaded = load_task(plan_task(task, None, tmp_path))
    assert_equal(run(both[0], loaded), run(both[1], loaded))


@pytest.mark.parametrize(("task", "n_shots"), [("arc_easy", 0), ("arc_easy", 2), ("hellaswag", 0), ("mmlu_anatomy", 2)])
def test_multiple_choice_scores_as_with_lm_evals_hf_backend(both, hub_folders, tmp_path: Path, task, n_shots) -> None:
    folder = hub_folders[task]
    plan = plan_from_folders(task, {"/".join(folder.parts[-2:]): folder}, tmp_path)
    assert_equal(*(run(lm, load_task(plan, n_shots, check_counts=False)) for lm in both))


def test_gsm8k_text_is_the_same_as_with_lm_evals_hf_backend(both, hub_folders, tmp_path: Path) -> None:
    plan = plan_from_folders("gsm8k", {"openai/gsm8k": hub_folders["gsm8k"]}, tmp_path)
    found = []
    for lm in both:
        loaded = load_task(plan, 4, check_counts=False)
        arguments = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 40}
        loaded.tasks["gsm8k"].set_config("generation_kwargs", arguments)
        found.append(run(lm, loaded))
    assert_equal(*found)
    assert any(sample["resps"][0][0] for sample in found[0]["samples"]["gsm8k"])
    assert both[0].truncated["gsm8k"]  # the prompts do not fit beside 40 new tokens: both cut on the left


def test_rolling_log_likelihoods_are_those_of_lm_evals_hf_backend(both) -> None:
    texts = ["", TEXT[0], " ".join(TEXT * 4)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts) if text]
    ours, theirs = both
    found = ours.loglikelihood_rolling(requests)
    assert len(ours.tok_encode(texts[2])) > CONTEXT
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3, rel=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")
@pytest.mark.parametrize("task", ["arc_easy", "hellaswag", "mmlu_anatomy"])
def test_real_benchmarks_score_as_with_lm_evals_hf_backend(both, shared_cache: Path, task: str) -> None:
    plan = plan_task(task, SHARED, shared_cache)
    assert_equal(*(run(lm, load_task(plan), limit=15) for lm in both))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared_cache")
