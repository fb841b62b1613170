"""Our backend against lm-eval's own Hugging Face backend, on exported random weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from evals.backend import MegaGPTLM
from evals.invariance import make_batch_invariant
from evals.scoring import quiet_bars
from evals.task_loader import LoadedTask, load_task, plan_from_folders, plan_task
from megagpt.checkpoint.hf import export_hf
from megagpt.model.decoder import Decoder
from megagpt.tokenizer import Tokenizer, open_tokenizer
from tests.evals.conftest import CONFIGS, CONTEXT, SHARED, TEXT, random_model, scaled_up
from tests.evals.fixtures import HUB_IDS, write_all

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, tokenizer_file: Path
):
    """(ours, lm-eval's) over the same weights."""
    folder = tmp_path_factory.mktemp("export") / request.param
    return both_backends(random_model(request.param), CONFIGS[request.param], tokenizer, tokenizer_file, folder)


def both_backends(model: Decoder, config: Any, tokenizer: Tokenizer, tokenizer_file: Path, folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert make_batch_invariant(model)
    export_hf(model, config, tokenizer_file, folder, eot_id=tokenizer.eot_id)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=4,
        max_length=config.max_seq_len,
        device="cpu",
    )
    return MegaGPTLM(model, tokenizer, max_seq_len=config.max_seq_len, batch_size=4), theirs


@pytest.fixture(scope="module")
def hub_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub_cache")


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
    assert ours["results"].keys() == theirs["results"].keys()
    for task, scores in ours["results"].items():
        for metric, score in scores.items():
            other = theirs["results"][task][metric]
            is_of_probabilities = metric.startswith("perplexity") or task == "truthfulqa_mc2"
            is_close = is_of_probabilities and not isinstance(other, str)
            assert score == (pytest.approx(other, rel=1e-4) if is_close else other), metric


@pytest.mark.parametrize("task", ["megagpt_smoke", "megagpt_smoke_generate"])
def test_own_tasks_score_as_with_lm_evals_hf_backend(both, tmp_path: Path, task: str) -> None:
    loaded = load_task(plan_task(task, None, tmp_path))
    assert_equal(run(both[0], loaded), run(both[1], loaded))


SHOTS = {"arc_easy": (0, 2), "mmlu_anatomy": (2,), "winogrande": (0, 1)}
SLOW_TO_FIND = {"boolq": pytest.mark.exhaustive}
"""Not in a folder of its name: lm-eval reads all its definitions, which takes ten seconds."""
NOT_GENERATED = [
    pytest.param(task, n, marks=SLOW_TO_FIND.get(task, ()))
    for task in HUB_IDS
    if task not in ("gsm8k", "truthfulqa_gen")
    for n in SHOTS.get(task, (0,))
]


@pytest.mark.parametrize(("task", "n_shots"), NOT_GENERATED)
def test_a_task_scores_as_with_lm_evals_hf_backend(both, hub_folders, hub_cache, task, n_shots) -> None:
    plan = plan_from_folders(task, {HUB_IDS[task]: hub_folders[task]}, hub_cache)
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


def test_truthfulqas_text_is_the_same_as_with_lm_evals_hf_backend(both, hub_folders, hub_cache) -> None:
    """The definition's own prompts and stop string; fewer new tokens, since the context is short."""
    plan = plan_from_folders("truthfulqa_gen", {HUB_IDS["truthfulqa_gen"]: hub_folders["truthfulqa_gen"]}, hub_cache)
    task = load_task(plan, check_counts=False).tasks["truthfulqa_gen"]
    task.build_all_requests(limit=4, rank=0, world_size=1)
    for request in task.instances:
        assert request.args[1]["until"] == ["\n\n"]
        request.args[1]["max_gen_toks"] = 40
    ours, theirs = (lm.generate_until(task.instances, disable_tqdm=True) for lm in both)
    assert ours == theirs
    assert all(ours)


def test_rolling_log_likelihoods_are_those_of_lm_evals_hf_backend(both) -> None:
    texts = ["", TEXT[0], " ".join(TEXT * 4)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts) if text]
    ours, theirs = both
    found = ours.loglikelihood_rolling(requests)
    assert len(ours.tok_encode(texts[2])) > CONTEXT
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3, rel=1e-6)


def test_code_is_continued_as_with_lm_evals_hf_backend(both) -> None:
    """HumanEval's stop strings and its prompts' shape; the task itself runs what was written, elsewhere."""
    prompts = [f'def f{i}(x):\n    """Return the {text[: 9 * i]}.\n    """\n' for i, text in enumerate(TEXT)]
    stops = {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "th"], "do_sample": False, "max_gen_toks": 48}
    requests = [
        Instance("generate_until", {}, (prompt, stops), 0, metadata=("humaneval", i, 1))
        for i, prompt in enumerate(prompts)
    ]
    ours, theirs = both
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


REAL = {
    "arc_easy": (0, 200),
    "arc_challenge": (2, 200),
    "hellaswag": (0, 200),
    "mmlu": (5, 4),  # of each subject
    "truthfulqa_mc1": (0, 200),
    "truthfulqa_mc2": (0, 200),
    "gsm8k": (3, 200),
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both_large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer and a context that hold the real prompts."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("large")
    bpe = ByteLevelBPETokenizer()
    files = [str(SHARED / "gsm8k" / "test.jsonl"), *map(str, (SHARED / "mmlu" / "dev").glob("*.csv"))]
    bpe.train(files, vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    model, config = scaled_up(request.param, vocab_size=2048, max_seq_len=1024)
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    return both_backends(model, config, tokenizer, folder / "tokenizer.json", folder / "hf")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")
@pytest.mark.parametrize("task", REAL)
def test_two_hundred_real_documents_score_as_with_lm_evals_hf_backend(both_large, shared_cache: Path, task) -> None:
    n_shots, limit = REAL[task]
    found = []
    for lm in both_large:
        loaded = load_task(plan_task(task, SHARED, shared_cache), n_shots)
        if task == "gsm8k":
            arguments = {"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 32}
            loaded.tasks[task].set_config("generation_kwargs", arguments)
        found.append(run(lm, loaded, limit=limit))
    assert_equal(*found)
    assert sum(map(len, found[0]["samples"].values())) >= 200


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")
def test_truthfulqa_is_continued_as_with_lm_evals_hf_backend(both_large, shared_cache: Path) -> None:
    """200 documents' texts; BLEU and ROUGE, of which a document costs half a second, of ten."""
    task = load_task(plan_task("truthfulqa_gen", SHARED, shared_cache)).tasks["truthfulqa_gen"]
    task.build_all_requests(limit=200, rank=0, world_size=1)
    for request in task.instances:
        request.args[1]["max_gen_toks"] = 32
    ours, theirs = (lm.generate_until(task.instances, disable_tqdm=True) for lm in both_large)
    assert len(ours) == 200
    assert ours == theirs
    assert len(set(ours)) > 1
    found = []
    for lm in both_large:
        loaded = load_task(plan_task("truthfulqa_gen", SHARED, shared_cache))
        arguments = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 32}
        loaded.tasks["truthfulqa_gen"].set_config("generation_kwargs", arguments)
        found.append(run(lm, loaded, limit=10))
    assert_equal(*found)
    assert {"bleu_max,none", "rougeL_diff,none"} <= found[0]["results"]["truthfulqa_gen"].keys()


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")
def test_all_of_humaneval_is_continued_as_with_lm_evals_hf_backend(both_large) -> None:
    lines = gzip.decompress((SHARED / "humaneval" / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    stops = {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False, "max_gen_toks": 32}
    requests = [
        Instance("generate_until", {}, (json.loads(line)["prompt"], stops), 0, metadata=("humaneval", i, 1))
        for i, line in enumerate(lines)
    ]
    ours, theirs = both_large
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared_cache")
