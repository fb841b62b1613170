"""runs/NAME -> report.html (one file that loads nothing), report.md with the same numbers, report.json for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals import report_charts as charts
from evals.baselines import COMPUTE_FACTOR, MOST_TIMES_THE_SIZE, PARAMETERS_FACTOR, load_baselines
from evals.compare import ALPHA, Comparison
from evals.compare_show import how_many
from evals.report_checks import FEW, NotSplit, SplitScore, compare_checkpoints, split_scores, tokens_scanned_and_seen
from evals.report_cost import cost
from evals.report_data import flat, funnel, funnel_chart, trail_rows
from evals.report_examples import Example, examples
from evals.report_inputs import RunFolder, read_run_folder
from evals.report_json import to_json
from evals.report_judged import Judged, judged, judged_charts
from evals.report_judged_split import split_judged
from evals.report_page import render
from evals.report_published import (
    MOST_ROWS,
    definitions_of,
    nothing_published,
    published,
    published_charts,
    sources_of,
    tokens_by_step,
)
from evals.report_scores import Score, Unavailable, score_charts, score_rows, subject_maps
from evals.report_steps import collect, right_answer_charts, step_charts
from evals.report_training import headline, history, readable_sample, time_spent, training_charts
from evals.sample_files import read_samples
from megagpt.atomic import write_file

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
JSON_FILE = "report.json"
FORMAT = 1


@dataclass
class Measured:
    """Everything read out of the results and their answers, one result in memory at a time."""

    scores: list[Score] = field(default_factory=list)
    unavailable: list[Unavailable] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    splits: list[SplitScore] = field(default_factory=list)
    not_split: list[NotSplit] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def write_run_report(run_dir: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.md and report.json of a run, finished or not, from what its folder holds.

    Equal inputs give equal files but for the line that says when they were made.

    Raises:
        EvalError: `run_dir` is no run's folder, or one of its files is damaged: names the file and the line.
        ConfigError: its config.yaml does not fit this version.
        DataError: the manifest of its tokens is damaged.
    """
    run = read_run_folder(run_dir)
    view = build_view(run)
    made_at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    pages = (run_dir / HTML_FILE, run_dir / MARKDOWN_FILE)
    for page in pages:
        drawn = draw(run, view) if page.suffix == ".html" else {}
        write_file(page, render(page.name, {**view, "made_at": made_at, "charts": drawn}).encode())
    target = run_dir / JSON_FILE
    write_file(target, to_json({"format": FORMAT, **view, "plan": run.plan, "versions": run.versions}))
    return *pages, target


def build_view(run: RunFolder) -> dict[str, Any]:
    """All that the report says, by section."""
    measured = measure(run)
    last = last_scored(run)
    comparison, why_not = compare_checkpoints(run.evals)
    baselines = load_baselines()
    beside = published(run, measured.scores, baselines)
    own = [trail.prefix for trail in run.data]
    seen = None if last is None else tokens_by_step(run).get(last)
    return {
        "name": run.run_dir.resolve().name,
        "headline": headline(run),
        "missing": run.missing,
        "scores": [score for score in measured.scores if score.step == last],
        "earlier_scores": [score for score in measured.scores if score.step != last],
        **_newest(measured.judged),
        "unavailable": measured.unavailable,
        "live": collect(run.live),
        "published": beside,
        "published_sources": sources_of(beside, baselines),
        "published_definitions": definitions_of(beside, baselines),
        "not_published": nothing_published(beside, measured.scores),
        "published_rule": {
            "parameters": PARAMETERS_FACTOR,
            "compute": COMPUTE_FACTOR,
            "times": MOST_TIMES_THE_SIZE,
            "most_rows": MOST_ROWS,
        },
        **_paired(comparison, why_not),
        "subjects": subject_maps(run.evals),
        "examples": measured.examples,
        "contamination": {
            "where": None if run.contamination is None else run.contamination.where,
            "seen": "" if run.contamination is None else tokens_scanned_and_seen(run.contamination, own, seen),
            "splits": measured.splits,
            "not_split": measured.not_split,
            "few": FEW,
        },
        "samples": [
            (evals.step, [readable_sample(row) for row in evals.generations])
            for evals in run.evals
            if evals.generations
        ][-1:],
        "funnels": [funnel(trail) for trail in run.data],
        "history": history(run),
        "time": time_spent(run),
        "cost": cost(run),
        "trail": trail_rows(run),
        "plan": flat(run.plan or {}),
        "versions": flat(run.versions or {}),
        "config": run.config_text,
    }


def measure(run: RunFolder) -> Measured:
    """Read every result's answers once; examples and contamination only of the newest scores."""
    found = Measured()
    last = last_scored(run)
    judged_splits: dict[str, SplitScore | NotSplit] = {}  # of each task that of its newest step
    for evals in run.evals:
        for result in evals.results:
            if result.status != "ok":
                found.unavailable.append(Unavailable(evals.step, result.task, result.reason))
                continue
            rows = read_samples(evals.folder, result)
            if result.is_judged:
                found.judged.append(judged(evals.step, result, rows))
                if run.contamination is not None:
                    judged_splits[result.task] = split_judged(evals.step, result, rows, run.contamination)
                continue
            found.scores += score_rows(evals.step, result, rows)
            if evals.step != last or not rows:
                continue
            found.examples += examples(evals.step, result.task, rows)
            if run.contamination is not None:
                split = split_scores(evals.step, result, rows, run.contamination)
                if isinstance(split, NotSplit):
                    found.not_split.append(split)
                else:
                    found.splits += split
    found.splits += [split for split in judged_splits.values() if isinstance(split, SplitScore)]
    found.not_split += [split for split in judged_splits.values() if isinstance(split, NotSplit)]
    return found


def last_scored(run: RunFolder) -> int | None:
    """The newest step with scores that no judge gave."""
    scored = (
        evals.step
        for evals in run.evals
        if any(result.status == "ok" and not result.is_judged for result in evals.results)
    )
    return max(scored, default=None)


def draw(run: RunFolder, view: dict[str, Any]) -> dict[str, Any]:
    """The charts of the page, as SVG."""
    return {
        "training": training_charts(run),
        "scores": score_charts(view["scores"]),
        "steps": step_charts([*view["earlier_scores"], *view["scores"]], view["live"]),
        "right_answers": right_answer_charts(view["live"]),
        "judged": [judged_charts(found) for found in view["judged"]],
        "published": published_charts(view["published"]),
        "funnels": [funnel_chart(found) for found in view["funnels"]],
        "heat": charts.heat_color,
    }


def _newest(found: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Of each task the newest step in full; the others for a table."""
    ordered = sorted(found, key=lambda one: not one.task.startswith("mt_bench"))  # the benchmark before one's own sets
    newest = {one.task: one for one in ordered}  # by step, oldest first
    return {"judged": list(newest.values()), "judged_before": [one for one in found if one not in newest.values()]}


def _paired(comparison: Comparison | None, why_not: str) -> dict[str, Any]:
    return {
        "comparison": comparison,
        "not_compared": why_not,
        "how": "" if comparison is None else how_many(comparison),
        "alpha": ALPHA,
    }
