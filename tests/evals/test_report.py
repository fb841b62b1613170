from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.run import run_job
from data_pipeline.summary import REPORT_FORMAT
from evals.report import write_run_report
from evals.report_data import funnel
from evals.report_inputs import DATA_REPORT_FORMAT, DataTrail
from evals.results import Metric, TaskResult
from megagpt.config.load import dump_config
from megagpt.config.schema import TrainingRun
from megagpt.data.manifest import FileDigest, Manifest, TokenFileEntry, write_manifest
from megagpt.errors import EvalError
from tests.data_pipeline.test_run import job_for, write_corpus

HOSTILE = "<script>alert(1)</script> & ``` | done"


def make_config(run_dir: Path, data: Path) -> TrainingRun:
    return TrainingRun.model_validate(
        {
            "run": {"dir": run_dir},
            "model": {"family": "gpt2", "n_layer": 2, "n_head": 2, "d_model": 8},
            "data": {"train": data / "docs_train", "val": data / "docs_val"},
            "optim": {"lr": 6e-4, "warmup_steps": 10},
            "train": {"max_steps": 100, "global_batch_size": 4, "micro_batch_size": 2},
            "eval": {"every": 50},
        }
    )


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows() -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = [{"step": 0, "val_loss": 8.0, "val_tokens": 4096}]
    for step in range(1, 101):
        rows.append(
            {
                "step": step,
                "loss": 8.0 - 0.04 * step,
                "grad_norm": None if step == 7 else 10.0 / step,
                "lr": 6e-4 * min(1.0, step / 10),
                "tokens": step * 12_345,
                "tokens_per_second": 4000.0 + step,
                "step_seconds": 37.25,
                "skipped": step == 7,
            }
        )
        if step % 50 == 0:
            rows.append({"step": step, "val_loss": 8.0 - 0.03 * step, "val_tokens": 4096})
    return rows


def result(task: str, step: int, metrics: dict[str, Metric], **values: Any) -> TaskResult:
    return TaskResult(
        **{
            "task": task,
            "status": "ok",
            "reason": "",
            "checkpoint": {"run": "small", "step": step, "hash": f"c0ffee{step}"},
            "settings": {"n_shots": None, "limit": 400},
            "settings_hash": "0",
            "lm_eval_version": "0.4.13",
            "task_version": "1.0",
            "data": {"origin": "local", "path_or_id": "eval_data/arc"},
            "metrics": metrics,
            **values,
        }
    )


def write_evals(run_dir: Path, step: int, accuracy: float) -> None:
    folder = run_dir / "evals" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    interval = (accuracy - 0.045, accuracy + 0.045)
    arc = {"acc": Metric(accuracy, 0.0229, interval), "acc_norm": Metric(accuracy - 0.02, 0.0229, interval)}
    result("arc_easy", step, arc, n=400, n_total=2376, n_shots=25, chance=0.25, truncated=3, seconds=75.0).write(folder)
    held_out = {"bits_per_byte": Metric(2.3456, 0.01, (2.32, 2.37), higher_is_better=False)}
    result("heldout", step, held_out, n=12, n_total=12, n_shots=0).write(folder)
    result("mmlu", step, {}, status="unavailable", reason="hub cannot be reached & no --data").write(folder)
    write_json(
        folder / "generations.json",
        [{"prompt": "Return the", "text": HOSTILE, "sampling": "greedy", "reason": "60 tokens"}],
    )


def write_data(folder: Path) -> str:
    source = {"records": 1000, "packed": 700, "tokens": {"train": 1_230_000, "val": 12_000}}
    report = {
        "format": REPORT_FORMAT,
        "sources": {"stdlib": source},
        "lost": {
            "extract": {},
            "filter": {"gopher_quality.min_words": 180, "language.not_kept": 20},
            "documents": {"exact_duplicate": 60, "near_duplicate": 40},
        },
        "languages": {"en": 980, "de": 20},
        "splits": {
            "train": {"documents": 690, "tokens": 1_230_000, "text_bytes": 5_000_000},
            "val": {"documents": 10, "tokens": 12_000, "text_bytes": 50_000},
        },
        "damage": {"count": 2},
        "thresholds": {"gopher_quality": {"min_words": 50}},
    }
    write_json(folder / "report.json", report)
    digest = FileDigest(10, "ab")
    entry = TokenFileEntry(1_230_000, 690, "<u2", 383, digest, digest, 5_000_000, {})
    manifest = Manifest({"kind": "gpt2"}, {"docs_train": entry}, {}, "f00d")
    write_manifest(folder, manifest)
    return manifest.hash


def write_run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "small"
    run_dir.mkdir()
    manifest_hash = write_data(tmp_path / "data")
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "data")))
    write_json(run_dir / "versions.json", {"python": "3.11.9", "torch": "2.13.0"})
    write_json(run_dir / "plan.json", {"parameters": 1_234_567, "data_manifest_hash": manifest_hash})
    write_rows(run_dir / "metrics.jsonl", metric_rows())
    events = [("started", 0), ("resumed", 40), ("stopped", 60), ("resumed", 60), ("finished", 100)]
    write_rows(
        run_dir / "events.jsonl",
        [{"time": "2026-01-01T00:00:00Z", "event": event, "step": step} for event, step in events],
    )
    write_evals(run_dir, 50, 0.30)
    write_evals(run_dir, 100, 0.41)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder that a test may spoil."""
    return write_run(tmp_path)


@dataclass(frozen=True)
class Report:
    """What was written about a run in which everything is there."""

    run_dir: Path
    html: str
    page: Page
    markdown: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    run_dir = write_run(tmp_path_factory.mktemp("report"))
    html, markdown, _ = write_run_report(run_dir)
    return Report(run_dir, html.read_text(), read_page(html), markdown.read_text())


class Page(HTMLParser):
    """Text outside SVG and style, every tag, and that tags are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.chart_text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        self.text += " "

    def handle_data(self, data: str) -> None:
        if "svg" in self.open:
            self.chart_text += " " + data
        elif "style" not in self.open:
            self.text += data


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_the_page_is_well_formed_and_loads_nothing(report):
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in report.page.tags}
    for tag, attributes in report.page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in report.html
    assert not re.search(r"url\((?!#)", report.html)


def test_element_ids_of_the_charts_do_not_collide_and_references_resolve(report):
    ids = re.findall(r'\bid="([^"]+)"', report.html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', report.html)) <= set(ids)


def test_the_headline_says_what_a_reader_asks_first(report):
    text = squeeze(report.page.text)
    assert "validation loss, step 100" in text
    assert "from 8.0000 at step 0, 37.5 % lower" in text  # 8.0 -> 5.0
    assert "bits per byte 2.3456" in text
    assert "tokens 1.23 M" in text  # 100 x 12,345
    assert "training time 1 h 02 min" in text  # 100 x 37.25 s
    assert "tokens a second 4.05 k" in text  # median of 4001 ... 4100
    assert "parameters 1.23 M" in text
    assert "MFU" not in text  # no peak was known


def test_every_score_comes_with_what_is_needed_to_believe_it(report):
    text = report.page.text
    for shown in (
        "0.4100",
        "0.3650 to 0.4550",
        "0.0229",
        "0.2500",
        "400 of 2,376",
        "25",
        "eval_data/arc",
        "1 min 15 s",
    ):
        assert shown in text
    assert "unavailable : hub cannot be reached & no --data" in squeeze(text)
    assert "Scores at step 100" in report.page.chart_text
    assert "arc_easy acc_norm" in report.page.chart_text
    assert "arc_easy by step" in report.page.chart_text  # two checkpoints were measured


def test_curves_are_drawn_with_titles_and_axes(report):
    shown = report.page.chart_text
    for label in ("Loss", "validation", "logarithmic", "Learning rate", "Gradient norm", "Throughput", "step"):
        assert label in shown


def test_the_funnel_shows_what_each_filter_left(report):
    rows = re.findall(
        r"<tr><td>([^<]*)</td><td class=\"n\">([\d,]+)</td><td class=\"n\">([\d,]+)</td></tr>", report.html
    )
    assert rows == [
        ("records read", "0", "1,000"),
        ("after gopher_quality.min_words", "180", "820"),
        ("after language.not_kept", "20", "800"),
        ("after exact_duplicate", "60", "740"),
        ("after near_duplicate", "40", "700"),
    ]
    assert "after near_duplicate" in report.page.chart_text
    assert "1,230,000" in report.page.text


def test_generated_text_cannot_act_as_html_or_markdown(report):
    assert "<script" not in report.html
    assert HOSTILE in report.page.text
    assert f"````text\nReturn the{HOSTILE}\n````" in report.markdown


def test_screens_of_empty_lines_are_counted_instead_of_shown(run_dir):
    write_json(
        run_dir / "evals" / "step_00000100" / "generations.json",
        [{"prompt": "Return", "text": " it.\n\n\nkept" + "\n" * 46 + "end", "sampling": "greedy", "reason": ""}],
    )
    for path in write_run_report(run_dir)[:2]:
        assert " it.\n\n\nkept\n[46 line breaks]\nend" in path.read_text()


def test_restarts_and_skipped_steps_are_told(report):
    for text in (squeeze(report.page.text), report.markdown):
        assert "resumed at step 40; the process before it ended without a word (killed)" in text
        assert "resumed at step 60\n" in text or "resumed at step 60 " in text
        assert "skipped steps: 1 (7)" in text


def test_one_can_walk_from_a_score_to_the_tokens_and_the_job_that_made_them(report):
    plan = json.loads((report.run_dir / "plan.json").read_text())
    for text in (report.page.text, report.markdown):
        for link in ("weights c0ffee100", plan["data_manifest_hash"], "docs_train", "f00d"):
            assert link in text


def test_markdown_has_the_same_numbers_as_the_page(report):
    for number in set(re.findall(r"\d+(?:[.,]\d+)*", report.page.text)):
        assert number in report.markdown, number


def test_equal_inputs_give_equal_reports_but_for_one_line(run_dir):
    first = [path.read_text() for path in write_run_report(run_dir)]
    second = [path.read_text() for path in write_run_report(run_dir)]
    for before, after in zip(first, second, strict=True):
        changed = [a for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
        assert all("Generated at" in line for line in changed)


def test_a_run_with_only_a_configuration_says_what_is_missing(tmp_path):
    run_dir = tmp_path / "empty"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "nowhere")))
    html, markdown, _ = write_run_report(run_dir)
    for text in (squeeze(read_page(html).text), markdown.read_text()):
        for name in ("metrics.jsonl", "versions.json", "plan.json", "events.jsonl", "manifest.json", "report.json"):
            assert name in text
        assert "no scores" in text
        assert "no sample texts" in text
        assert "no complete checkpoint" in text
        assert "No scores have been measured." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(EvalError, match=r"config\.yaml: no such file.*not a run's folder"):
        write_run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"metrics\.jsonl:3: not valid JSON"),
        ("[1]", r"metrics\.jsonl:3: must be a JSON object with a whole number `step`"),
        ('{"step": 2, "loss": "low"}', r"metrics\.jsonl:3: loss must be a number, got 'low'"),
    ],
)
def test_a_damaged_metrics_line_is_named(run_dir, line, message):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(EvalError, match=message):
        write_run_report(run_dir)


def test_a_last_line_that_is_half_written_is_left_out_and_said(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "lo')
    html, _, _ = write_run_report(run_dir)
    assert re.search(r"metrics\.jsonl:104: the last line is incomplete", read_page(html).text)  # 100 + 3 rows


def test_a_damaged_score_file_is_named(run_dir):
    (run_dir / "evals" / "step_00000100" / "arc_easy.json").write_text("{}")
    with pytest.raises(EvalError, match=r"arc_easy\.json: not a result file"):
        write_run_report(run_dir)


def test_the_report_of_a_real_data_job_is_read_to_the_last_document(tmp_path):
    assert DATA_REPORT_FORMAT == REPORT_FORMAT
    job = job_for(write_corpus(tmp_path / "corpus", n_shards=1), tmp_path / "job")
    run_job(job)
    report = json.loads((tmp_path / "job" / "report.json").read_text())
    found = funnel(DataTrail(tmp_path / "job" / "tokens_train", None, None, None, None, report))
    assert found["steps"][0] == ("records read", 30, 0)
    assert found["steps"][-1][1] == sum(split["documents"] for _, split in found["splits"]) < 30
