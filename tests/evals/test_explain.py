"""One document, token by token."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from evals.explain import explain
from evals.run import EvalRequest, run_evals
from megagpt.cli import main
from megagpt.errors import EvalError
from tests.evals.conftest import CONTEXT, save_run
from tests.evals.fixtures import write_all
from tests.evals.test_run import CONSOLE, SUITES


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer):
    return save_run(tmp_path_factory.mktemp("explain") / "a", tokenizer)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("hub")
    write_all(folder)
    return folder


def request(run_dir, *tasks: str, **settings) -> EvalRequest:
    return EvalRequest(run_dir, tasks, suites_dir=SUITES, **settings)


def samples_of(run_dir, out, task: str, **settings) -> list[dict]:
    run_evals(request(run_dir, task, out=out, **settings), CONSOLE)
    return [json.loads(line) for line in (out / f"{task}.samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("doc", [0, 7])
def test_a_document_is_explained_with_the_numbers_of_its_evaluation(
    run_dir, data_dir, tmp_path, tokenizer, doc
) -> None:
    """Few-shot examples are drawn document after document: those of document 7 are not those it would get alone."""
    settings = {"data_dir": data_dir, "n_shots": 2}
    sample = samples_of(run_dir, tmp_path, "mmlu_anatomy", **settings)[doc]
    found = explain(request(run_dir, **settings), "mmlu_anatomy", doc)
    assert [each.total for each in found.requests] == sample["logprobs"]
    assert found.metrics == sample["metrics"]
    assert found.target == sample["target"]
    for each in found.requests:
        assert each.total == math.fsum(token.log_probability for token in each.tokens)
        assert "".join(token.text for token in each.tokens) == each.continuation
        assert each.per_character == each.total / len(each.continuation.strip())
        whole = tokenizer.encode(each.context + each.continuation)
        assert [token.id for token in each.tokens] == whole[-len(each.tokens) :]
        assert each.n_cut_tokens == max(0, len(whole) - CONTEXT - 1) > 0
        assert each.context.startswith(each.cut[:50])


def test_the_decisions_are_those_of_acc_and_acc_norm(run_dir, data_dir) -> None:
    """Choices of 3 to 20 characters: the two decisions differ for some document."""
    decided = []
    for doc in range(8):
        found = explain(request(run_dir, data_dir=data_dir), "openbookqa", doc)
        sums = [each.total for each in found.requests]
        normed = [each.per_character for each in found.requests]
        decided.append((sums.index(max(sums)), normed.index(max(normed))))
        assert found.metrics["acc"] == float(decided[-1][0] == found.target)
        assert found.metrics["acc_norm"] == float(decided[-1][1] == found.target)
    assert any(by_sum != by_character for by_sum, by_character in decided)


def test_generated_text_is_explained_with_what_the_filters_made_of_it(run_dir, tmp_path) -> None:
    sample = samples_of(run_dir, tmp_path, "megagpt_smoke_generate", limit=2)[1]
    found = explain(request(run_dir), "megagpt_smoke_generate", 1)
    assert [each.continuation for each in found.requests] == [sample["raw_response"]]
    assert found.metrics == sample["metrics"]


def test_it_is_printed_with_ids_texts_sums_decisions_and_gold(run_dir) -> None:
    shown = CliRunner().invoke(main, ["eval", "explain", "megagpt_smoke", "3", "--checkpoint", str(run_dir)])
    assert shown.exit_code == 0, shown.output
    found = explain(request(run_dir), "megagpt_smoke", 3)
    for each in found.requests:
        assert f"sum {each.total:.6f} nats" in shown.output
        for token in each.tokens:
            assert f" {token.id} " in shown.output
            assert f"{token.log_probability:.6f}" in shown.output
    assert f"choice {found.target} (gold" in shown.output
    assert shown.output.count("largest sum") == 1
    assert f"acc: {found.metrics['acc']}" in shown.output


def test_a_group_and_a_document_that_is_not_there_are_errors(run_dir, data_dir) -> None:
    with pytest.raises(EvalError, match="documents 0 to 7; there is no document 8"):
        explain(request(run_dir, data_dir=data_dir), "mmlu_anatomy", 8)
