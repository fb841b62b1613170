"""Two evaluations side by side: numbers, verdicts, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from click.testing import CliRunner

from evals.compare import NOT_SHOWN, compare
from evals.results import Metric
from evals.stats import holm, mcnemar_exact
from megagpt.cli import main
from megagpt.errors import EvalError
from tests.evals.result_files import make_result, sample, write_answers
from tests.evals.test_report import read_page, squeeze


def answers(*right):
    return [{"acc": float(value)} for value in right]


def folder_of(tmp_path, name, right, task="arc_easy", **values):
    folder = tmp_path / name / "evals" / "step_00000100"
    write_answers(folder, task, right, **values)
    return folder


def test_score_difference_interval_test_and_verdict(tmp_path):
    """100 documents: 20 only A has right, 50 only B, 30 both."""
    a = folder_of(tmp_path, "a", answers(*[1] * 20, *[0] * 50, *[1] * 30))
    b = folder_of(tmp_path, "b", answers(*[0] * 20, *[1] * 50, *[1] * 30))
    (row,) = compare([a, b]).differences
    assert (row.a, row.b) == ("a at step 100", "b at step 100")
    assert (row.score_a, row.score_b, row.n) == (0.5, 0.8, 100)
    assert (row.only_a, row.only_b, row.test) == (20, 50, "McNemar, exact")
    assert row.difference == pytest.approx(0.3)
    stderr = np.std([-1] * 20 + [1] * 50 + [0] * 30, ddof=1) / 10
    assert row.ci95 == pytest.approx((0.3 - 1.96 * stderr, 0.3 + 1.96 * stderr), abs=0.01)
    assert row.p == row.p_holm == mcnemar_exact(20, 50)
    assert row.detectable == pytest.approx(2.8016 * stderr, rel=1e-3)
    assert row.verdict == "b at step 100 is better"


def test_a_difference_whose_interval_holds_zero_is_none_and_never_bold(tmp_path):
    a = folder_of(tmp_path, "a", answers(*[1] * 9, *[0] * 14, *[1] * 30))
    b = folder_of(tmp_path, "b", answers(*[0] * 9, *[1] * 14, *[1] * 30))
    (row,) = compare([a, b]).differences
    assert row.ci95[0] < 0 < row.difference < row.ci95[1]
    assert row.verdict == NOT_SHOWN
    for name in ("c.html", "c.md"):
        result = CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    page, text = ((tmp_path / name).read_text() for name in ("c.html", "c.md"))
    assert NOT_SHOWN in squeeze(read_page(tmp_path / "c.html").text)  # well-formed, too
    assert NOT_SHOWN in text
    assert not re.search(r'class="[^"]*shown', page)
    assert "**" not in text


def test_a_shown_difference_is_bold_in_page_and_markdown(tmp_path):
    a = folder_of(tmp_path, "a", answers(*[0] * 30, *[1] * 30))
    b = folder_of(tmp_path, "b", answers(*[1] * 60))
    for name in ("c.html", "c.md", "c.json"):
        CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--out", str(tmp_path / name)])
    assert '<td class="tight shown">B is better</td>' in (tmp_path / "c.html").read_text()
    assert "**b at step 100 is better**" in (tmp_path / "c.md").read_text()
    assert json.loads((tmp_path / "c.json").read_text())["differences"][0]["verdict"] == "b at step 100 is better"


def test_several_tests_are_corrected_and_a_difference_can_be_lost_by_it(tmp_path):
    """Ten tasks; the one whose p alone would be small enough is not, among ten."""
    only_a, only_b = 2, 12  # p 0.013
    for task in range(10):
        quiet = task > 0
        a = answers(*[1] * only_a, *[0] * only_b, *[1] * 86) if not quiet else answers(*[1, 0] * 50)
        b = answers(*[0] * only_a, *[1] * only_b, *[1] * 86) if not quiet else answers(*[0, 1] * 50)
        folder_of(tmp_path, "a", a, task=f"task{task}")
        folder_of(tmp_path, "b", b, task=f"task{task}")
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert len(found.differences) == 10
    first = found.differences[0]
    assert first.p == mcnemar_exact(only_a, only_b) < 0.05
    assert first.ci95[0] > 0
    assert [row.p_holm for row in found.differences] == holm([row.p for row in found.differences])
    assert first.p_holm == pytest.approx(10 * first.p)
    assert first.verdict == NOT_SHOWN
    alone = compare([tmp_path / "a" / "evals" / "step_00000100"] * 2)
    assert all(row.difference == 0 and row.p == 1 for row in alone.differences)


def test_a_score_that_is_no_share_gets_a_z_test_and_perplexity_none(tmp_path):
    random = np.random.default_rng(0)
    a = [{"acc": float(value), "perplexity": -3.0} for value in random.random(200)]
    b = [{"acc": row["acc"] + 0.05, "perplexity": -3.0} for row in a]
    for name, rows in (("a", a), ("b", b)):
        folder = tmp_path / name / "evals" / "step_00000100"
        result = write_answers(folder, "truthfulqa_mc2", rows)
        replace(result, metrics={**result.metrics, "perplexity": Metric(20.1)}).write(folder)
        written = (folder / "truthfulqa_mc2.samples.jsonl").read_text()
        replace(result, metrics={**result.metrics, "perplexity": Metric(20.1)}).write(
            folder, map(json.loads, written.splitlines())
        )
    (row,) = compare([tmp_path / "a", tmp_path / "b"]).differences
    assert (row.metric, row.test, row.only_a) == ("acc", "paired z", None)
    assert row.difference == pytest.approx(0.05)
    assert row.p < 1e-9


def test_mmlu_is_resampled_by_subject(tmp_path):
    leaves = [f"mmlu_subject{i // 4}" for i in range(100)]
    a = folder_of(tmp_path, "a", answers(*[0] * 100), task="mmlu", leaves=leaves)
    b = folder_of(tmp_path, "b", answers(*([1] * 4 + [0] * 16) * 5), task="mmlu", leaves=leaves)
    (row,) = compare([a, b]).differences
    assert row.n_clusters == 25
    assert row.difference == pytest.approx(0.2)
    # 5 of 25 subjects are all right: the interval is that of 25 units and not of 100 documents.
    assert row.ci95[1] - row.ci95[0] > 0.25


def test_a_test_over_documents_is_not_enough_where_one_subject_makes_the_difference(tmp_path):
    """50 documents of one of 24 subjects: McNemar's test would count 50, interval and test over subjects count one."""
    leaves = [f"mmlu_subject{i // 50:02d}" for i in range(1200)]
    a = folder_of(tmp_path, "a", answers(*[0] * 1200), task="mmlu", leaves=leaves)
    b = folder_of(tmp_path, "b", answers(*[1] * 50, *[0] * 1150), task="mmlu", leaves=leaves)
    (row,) = compare([a, b]).differences
    assert mcnemar_exact(0, 50) < 1e-14
    assert (row.test, row.only_a, row.only_b) == ("paired z, over groups", 0, 50)
    # 50 of 1,200 by hand: groups' sums of residuals are 50 - 50/24 once and -50/24 in the 23 others.
    residuals = [23 / 24] * 50 + [-1 / 24] * 1150
    between = (50 - 50 / 24) ** 2 + 23 * (50 / 24) ** 2
    squares = sum(each**2 for each in residuals)
    stderr = (squares / 1199 / 1200 + (between - squares) / 1200**2) ** 0.5
    assert row.p == pytest.approx(2 * (1 - NormalDist().cdf(50 / 1200 / stderr)))
    assert row.p > 0.3
    assert row.ci95[0] == 0.0
    assert row.verdict == NOT_SHOWN
    page = CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--out", str(tmp_path / "c.html")])
    assert "z-test over groups" in " ".join(page.output.split())
    assert "paired z, over groups" in squeeze(read_page(tmp_path / "c.html").text)


def pass_rows(passed, samples):
    """Lines of HumanEval's samples file: problem by problem, how many of its samples pass."""
    return [
        sample("humaneval", problem, {"pass@1": float(number < n)}, sample=number)
        for problem, n in enumerate(passed)
        for number in range(samples)
    ]


def humaneval_folder(tmp_path, name, passed, samples=4, **values):
    folder = tmp_path / name / "evals" / "step_00000100"
    n = len(passed)
    settings = {"code": {"samples": samples, "temperature": 0.8}, "dtype": "fp32", "max_seq_len": 1024}
    metrics = {"pass@1": Metric(sum(passed) / n / samples), "pass@10": Metric(0.9)}
    values = {"n": n, "n_total": n, "settings": settings, "generation": {"max_gen_toks": 512}, **values}
    make_result("humaneval", metrics, **values).write(folder, pass_rows(passed, samples))
    return folder


def test_several_samples_of_a_problem_are_compared_by_their_mean(tmp_path):
    a = humaneval_folder(tmp_path, "a", [0, 1, 2, 4] * 5)
    b = humaneval_folder(tmp_path, "b", [2, 2, 3, 4] * 5)
    (row,) = compare([a, a]).differences
    assert (row.difference, row.p, row.n) == (0, 1, 20)
    (row,) = compare([a, b]).differences
    assert (row.metric, row.n, row.test) == ("pass@1", 20, "paired z")
    assert row.difference == pytest.approx(0.25)
    stderr = np.std([0.5, 0.25, 0.25, 0] * 5, ddof=1) / 20**0.5  # of 20 problems, not of 80 completions
    assert row.ci95 == pytest.approx((0.25 - 1.96 * stderr, 0.25 + 1.96 * stderr), abs=0.01)


def test_an_answer_that_stands_twice_is_refused_and_told(tmp_path):
    rows = [sample("arc_easy", i, {"acc": 1.0}) for i in (0, 1, 1)]
    a = folder_of(tmp_path, "a", answers(1, 1, 1), rows=rows)
    with pytest.raises(
        EvalError, match="documents: 1 answers of the one and 1 of the other are not a document's first"
    ):
        compare([a, a])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ({"samples": 4, "temperature": 0.2}, "temperature of completions: 0.8 and 0.2"),
        ({"samples": 10, "temperature": 0.8}, "samples of completions: 4 and 10"),
    ],
)
def test_completions_that_were_drawn_otherwise_are_not_compared(tmp_path, code, reason):
    a = humaneval_folder(tmp_path, "a", [0, 1, 2, 4])
    settings = {"code": code, "dtype": "fp32", "max_seq_len": 1024}
    b = humaneval_folder(tmp_path, "b", [2, 2, 3, 4], settings=settings)
    with pytest.raises(EvalError, match=re.escape(reason)):
        compare([a, b])


def with_settings(**settings):
    return {"n_shots": None, "limit": None, "batch_size": 16, "dtype": "fp32", "max_seq_len": 1024, **settings}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": with_settings(dtype="bf16")}, "dtype: fp32 and bf16"),
        (
            {"settings": with_settings(max_seq_len=2048), "truncated": 0},
            "prompts that lost their beginning: 3 and 0 of 4 documents (contexts of 1024 and 2048 tokens)",
        ),
        ({"truncated": 3, "environment": {"tokenizer": "other", "code": "1"}}, "3 and 3 of 4 documents"),
        ({"lm_eval_version": "0.4.14"}, "lm-eval: 0.4.13 and 0.4.14"),
        ({"environment": {"tokenizer": "t", "code": "2"}}, "version of the evaluation's code: 1 and 2"),
        ({"generation": {"max_gen_toks": 512}}, "completions of at most an unknown number of and 512 tokens"),
        ({}, None),
        ({"settings": with_settings(batch_size=3)}, None),
        ({"environment": {}}, "3 and 3 of 4 documents"),  # of which tokenizer is not known
    ],
)
def test_what_the_models_were_really_given_is_told_beside_the_numbers(tmp_path, change, told):
    known = {"truncated": 3, "environment": {"tokenizer": "t", "code": "1"}, "settings": with_settings()}
    a = folder_of(tmp_path, "a", answers(1, 0, 1, 0), **known)
    b = folder_of(tmp_path, "b", answers(1, 1, 1, 0), **(known | change))
    out = tmp_path / "c.json"
    shown = CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    (row,) = json.loads(out.read_text())["differences"]
    if told is None:
        assert row["notes"] == []
        assert "not the same" not in shown.output
        return
    (note,) = row["notes"]
    assert told in note
    assert f"not the same: arc_easy (a at step 100 and b at step 100): {note}" in " ".join(shown.output.split())
    for name in ("c.html", "c.md"):
        CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--out", str(tmp_path / name)])
    assert squeeze(note) in squeeze(read_page(tmp_path / "c.html").text)
    assert note in (tmp_path / "c.md").read_text()


def test_contexts_differ_without_a_word_where_nothing_was_cut(tmp_path):
    a = folder_of(tmp_path, "a", answers(1, 0))
    b = folder_of(tmp_path, "b", answers(1, 1), settings=with_settings(max_seq_len=2048))
    (row,) = compare([a, b]).differences
    assert row.notes == ()


def test_a_step_that_has_only_texts_is_not_the_newest_result_of_a_run(tmp_path):
    folder_of(tmp_path, "a", answers(1, 0))
    newer = tmp_path / "a" / "evals" / "step_00000200"
    newer.mkdir()
    (newer / "generations.json").write_text("{}")
    found = compare([tmp_path / "a", tmp_path / "a"])
    assert all("at step 100" in label for label in found.labels)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_shots": 5}, "shots: 0 and 5"),
        ({"task_version": "2.0"}, "version of the task: 1.0 and 2.0"),
        ({"data": {"origin": "local", "path_or_id": "other", "sha256": "beef"}}, "data: sha-arc_easy and beef"),
        ({"n_total": 2376}, "documents: 4 of 4 and 4 of 2376"),
        ({"status": "unavailable", "reason": "no hub"}, "b at step 100: no hub"),
        (
            {"rows": [sample("arc_easy", i, {"acc": 1.0}, prompt_hash=f"other{i}") for i in range(4)]},
            "prompts of 4 of 4 documents differ (first: arc_easy 0)",
        ),
        (
            {"rows": [sample("arc_easy", i, {"acc": 1.0}, doc_hash=f"h{i}") for i in range(4)]},
            "contents of 4 of 4 documents differ (first: arc_easy 0)",
        ),
        (
            {"rows": [sample("arc_easy", i + 1, {"acc": 1.0}) for i in range(4)]},
            "documents: 1 are only in the one, 1 only in the other",
        ),
        ({"rows": [sample("arc_easy", i, {}) for i in range(4)]}, "no metric is a mean over single documents"),
    ],
)
def test_what_differs_beside_the_model_is_refused_with_the_reason(tmp_path, change, reason):
    a = folder_of(tmp_path, "a", answers(1, 1, 1, 1))
    b = folder_of(tmp_path, "b", answers(1, 1, 1, 1), **change)
    with pytest.raises(EvalError, match=re.escape(reason)):
        compare([a, b])
    # Beside a task that can be compared, it is told and the exit code says it.
    for folder in (a, b):
        write_answers(folder, "piqa", answers(1, 0))
    result = CliRunner().invoke(main, ["eval", "compare", str(a), str(b)])
    differs = not any(words in reason for words in ("no hub", "no metric"))
    assert result.exit_code == (1 if differs else 0), result.output
    assert "piqa" in result.output
    assert reason in " ".join(result.output.split())
    assert json.loads(CliRunner().invoke(main, ["eval", "compare", str(a), str(b), "--json"]).output)["refused"]


def test_a_task_that_only_one_has_is_told(tmp_path):
    a, b = folder_of(tmp_path, "a", answers(1, 0)), folder_of(tmp_path, "b", answers(1, 0))
    write_answers(b, "piqa", answers(1, 0))
    (refusal,) = compare([a, b]).refusals
    assert (refusal.task, refusal.reasons) == ("piqa", ("a at step 100 has no result of it",))


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    a = folder_of(tmp_path, "[red]a", answers(1, 0), task="task[bold]")
    result = CliRunner().invoke(main, ["eval", "compare", str(a), str(a)])
    assert result.exit_code == 0, result.output
    assert "task[bold]" in result.output
    assert "[red]a at step 100" in result.output


def test_runs_checkpoints_and_folders_name_the_same_results_and_three_can_be_compared(tmp_path):
    a, b = folder_of(tmp_path, "a", answers(1, 0, 1)), folder_of(tmp_path, "b", answers(1, 0, 0))
    c = folder_of(tmp_path, "c", answers(0, 0, 0))
    by_folder = compare([a, b]).differences
    assert compare([tmp_path / "a", tmp_path / "b"]).differences == by_folder
    checkpoints = [tmp_path / name / "checkpoints" / "step_00000100" for name in "ab"]
    assert compare(checkpoints).differences == by_folder
    rows = compare([a, b, c]).differences
    assert [(row.a[0], row.b[0]) for row in rows] == [("a", "b"), ("a", "c")]
    assert compare([a, a]).labels[0] != "a at step 100"  # told apart by their folders


def test_the_order_of_the_documents_does_not_matter(tmp_path):
    a = folder_of(tmp_path, "a", answers(1, 0, 1, 0))
    rows = [sample("arc_easy", i, {"acc": float(i == 1)}) for i in (1, 3, 2, 0)]
    b = folder_of(tmp_path, "b", answers(0, 1, 0, 0), rows=rows)
    (row,) = compare([a, b]).differences
    assert (row.only_a, row.only_b) == (2, 1)


def test_errors_name_what_is_missing_or_damaged(tmp_path):
    a = folder_of(tmp_path, "a", answers(1, 0))
    with pytest.raises(EvalError, match="1 evaluations; name two or more"):
        compare([a])
    with pytest.raises(EvalError, match=r"nowhere: no results there; `megagpt eval run --checkpoint"):
        compare([a, tmp_path / "nowhere"])
    refused = CliRunner().invoke(main, ["eval", "compare", str(a), str(a), "--out", str(tmp_path / "c.pdf")])
    assert refused.exit_code == 2
    assert "is written as .html, .md or .json" in refused.output
    with (a / "arc_easy.samples.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(EvalError, match=r"arc_easy\.samples\.jsonl:3: not valid JSON"):
        compare([a, a])
    (a / "arc_easy.samples.jsonl").unlink()
    with pytest.raises(EvalError, match=r"arc_easy\.samples\.jsonl: cannot be read"):
        compare([a, a])
    outside = tmp_path / "c" / "evals" / "step_00000100"
    make_result("piqa", {"acc": Metric(0.5)}, samples="../../secret").write(outside)
    with pytest.raises(EvalError, match="samples lie beside the result"):
        compare([outside, outside])


def test_texts_with_unicodes_own_line_separators_are_read(tmp_path):
    rows = [sample("arc_easy", i, {"acc": 1.0}, prompt_end="a\u2028b\x85c") for i in range(2)]
    a = folder_of(tmp_path, "a", answers(1, 1), rows=rows)
    assert compare([a, a]).differences[0].n == 2


@pytest.mark.parametrize("change", [{"judge": "judge-b"}, {"judge_prompt": "other words"}])
def test_points_of_another_judge_are_not_compared(tmp_path, change):
    settings = {"judge": "judge-a", "judge_prompt": "words"}
    for name, found in (("a", settings), ("b", settings), ("c", settings | change)):
        points = [{"score": float(i)} for i in range(10)]
        write_answers(tmp_path / name, "answers_test", points, settings=found)
    assert compare([tmp_path / "a", tmp_path / "b"]).differences
    with pytest.raises(EvalError, match=r"the judge's prompts: words and other|judge: judge-a and judge-b"):
        compare([tmp_path / "a", tmp_path / "c"])
