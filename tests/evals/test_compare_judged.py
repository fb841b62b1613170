"""Two checkpoints whose answers the same judge rated: paired by question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.compare import NOT_SHOWN, compare
from evals.compare_show import write_comparison
from evals.mt_bench.scores import metrics_of
from evals.report_judged_split import RATED
from evals.results import Metric
from megagpt.errors import EvalError
from tests.evals.result_files import make_result

QUESTIONS = range(81, 161)
JUDGE = {"kind": "checkpoint", "weights": "w", "template": "plain", "code": "1"}


def folder_of(tmp_path: Path, name: str, ratings: np.ndarray, *, task: str = "mt_bench", **judge: Any) -> Path:
    """A result of MT-Bench: ratings (80, 2), NaN where the judge's words held none."""
    point = RATED[task][0]
    rows = [
        {
            "task": task,
            "doc_id": question,
            "turn": turn + 1,
            "metrics": {} if np.isnan(ratings[place, turn]) else {point: float(ratings[place, turn])},
        }
        for place, question in enumerate(QUESTIONS)
        for turn in range(2)
    ]
    settings = {"judge": "judge-a", "judge_prompts": "official", "judge_settings": JUDGE | judge}
    metrics = metrics_of(ratings) if task == "mt_bench" else {"points": Metric(0.5)}
    result = make_result(task, metrics, settings=settings, n=80, n_total=80, samples=None)
    result.write(tmp_path / name / "evals" / "step_00000100", rows)
    return tmp_path / name / "evals" / "step_00000100"


def ratings(shift: float, seed: int) -> np.ndarray:
    """Hard and easy questions, whose turns have nearly the same rating."""
    hard = np.random.default_rng(0).normal(5, 2, (80, 1))
    own = np.random.default_rng(seed).normal(shift, 0.6, (80, 1))
    return (hard + own + np.random.default_rng(seed + 1).normal(0, 0.1, (80, 2))).clip(1, 10)


def test_the_difference_is_paired_by_question_and_turns_are_not_counted_twice(tmp_path: Path) -> None:
    before, after = ratings(0, 1), ratings(0.5, 3)
    paths = [folder_of(tmp_path, "a", before), folder_of(tmp_path, "b", after)]
    (found,) = compare(paths).differences
    assert (found.task, found.metric, found.n, found.n_clusters) == ("mt_bench", "average", 160, 80)
    assert (found.score_a, found.score_b) == pytest.approx((before.mean(), after.mean()))
    assert found.test == "paired z over questions"
    by_question = (after - before).mean(1)
    width = 2 * 1.96 * by_question.std(ddof=1) / np.sqrt(80)
    assert found.ci95[1] - found.ci95[0] == pytest.approx(width, rel=0.06)
    assert found.is_shown, "though the intervals of the two scores overlap by far"
    assert found.verdict.startswith("b ")
    write_comparison(compare(paths), tmp_path / "c.md")
    assert "paired z over questions; interval over 80 groups" in (tmp_path / "c.md").read_text()


def test_no_difference_is_shown_where_there_is_none(tmp_path: Path) -> None:
    paths = [folder_of(tmp_path, "a", ratings(0, 1)), folder_of(tmp_path, "b", ratings(0, 3))]
    (found,) = compare(paths).differences
    assert found.verdict == NOT_SHOWN
    assert found.p > 0.05


def test_what_has_no_rating_on_one_side_is_left_out_and_told(tmp_path: Path) -> None:
    before, after = ratings(0, 1), ratings(0.5, 3)
    before[3, 1] = after[3, 1] = after[7, 0] = np.nan
    paths = [folder_of(tmp_path, "a", before), folder_of(tmp_path, "b", after)]
    (found,) = compare(paths).differences
    both = ~np.isnan(before) & ~np.isnan(after)
    assert found.n == 158
    assert (found.score_a, found.score_b) == pytest.approx((before[both].mean(), after[both].mean()))
    assert found.test == ("paired z over questions; 2 of 160 judgements left out, without points on a side at least")


def test_the_same_judge_in_another_format_is_another_judge_and_its_code_is_not(tmp_path: Path) -> None:
    a = folder_of(tmp_path, "a", ratings(0, 1))
    assert compare([a, folder_of(tmp_path, "b", ratings(0, 3), code="2")]).differences
    with pytest.raises(EvalError, match="the judge's template: plain and alpaca"):
        compare([a, folder_of(tmp_path, "c", ratings(0, 3), template="alpaca")])
    with pytest.raises(EvalError, match="its points are those of one model against another already"):
        compare([folder_of(tmp_path, name, ratings(0, 3), task="mt_bench_against") for name in ("d", "e")])
