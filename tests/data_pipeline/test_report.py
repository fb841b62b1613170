import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_pipeline.config import DataJob
from data_pipeline.report import bars, funnel, status, write_report
from data_pipeline.run import run_job
from megagpt.errors import DataError

EVIL = "<script>alert('x')</script> | [click](javascript:1) `code` <b>bold</b> & more"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job over good documents, short ones with markup that must stay text, and lines that are no JSON."""
    folder = tmp_path_factory.mktemp("report")
    good = "The words of this text are with that and to have been, number {}, for the sake of a filter that counts."
    lines = [json.dumps({"text": " ".join(good.format(17 * i + j) for j in range(8))}) for i in range(40)]
    lines += [json.dumps({"text": EVIL})] * 3 + ["{not json"]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "out": str(folder / "job"),
        "sources": [{"path": str(folder / "c.jsonl"), "name": "<i>crawl</i>"}],
        "language": {"keep": [], "min_score": 0.0},
        "filters": {"gopher_quality": {}},
        "dedup": {"minhash": False},
        "tokenizer": {"vocab_size": 300},
        "pack": {"val_fraction": 0.2},
    }
    run_job(DataJob.model_validate_json(json.dumps(values)))
    return folder / "job"


class Tags(HTMLParser):
    """Tags, in order, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_report_is_well_formed_and_loads_nothing(out: Path):
    tags = Tags()
    tags.feed((out / "report.html").read_text())
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not {"src", "href"} & set(tags.attributes)


def test_text_from_the_web_is_escaped_in_both_reports(out: Path):
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    for text in (html, markdown):
        assert "<script>" not in text
        assert "<i>crawl" not in text
        assert "alert(" in text
    assert "&lt;i&gt;crawl" in html
    assert "\\[click](javascript" in markdown


def test_the_reports_hold_funnel_sources_damage_and_examples(out: Path):
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    for text in (html, markdown):
        assert "gopher_quality.too_few_words" in text
        assert str(out.parent / "c.jsonl") in text
        assert f"{report['splits']['train']['tokens']:,}" in text
    assert report["damage"]["count"] == 1
    assert report["examples"]["gopher_quality.too_few_words"][0]["text"] == EVIL


def test_the_funnel_ends_with_the_documents_that_were_packed(out: Path):
    report = json.loads((out / "report.json").read_text())
    steps = funnel(report)
    assert steps[0] == ("records", 44)
    assert steps[-1][1] == sum(split["documents"] for split in report["splits"].values()) == 40
    numbers = [number for _, number in steps]
    assert numbers == sorted(numbers, reverse=True)


def test_bars_are_in_proportion_to_the_largest():
    assert bars({"a": 4, "b": 1, "c": 0}) == [("a", 4, 100.0), ("b", 1, 25.0), ("c", 0, 0.0)]
    assert bars({}) == []


def test_status_shows_every_stage_and_the_warnings_of_a_finished_job(out: Path):
    page = status(out)
    assert "map         1 of 1 task(s) done           44 documents in           40 out" in page
    assert "warning: 1 damaged place(s) in the sources" in page
    assert page.endswith(f"finished; report: {out / 'report.html'}\n")


def test_status_of_an_unfinished_job_shows_what_was_rejected_so_far(out: Path, tmp_path: Path):
    (tmp_path / "stages/map").mkdir(parents=True)
    record = (out / "stages/map/000000.json").read_bytes()
    (tmp_path / "stages/map/000000.json").write_bytes(record)
    (tmp_path / "plan.json").write_text('{"shards": 5, "shard_bytes": 1}')
    page = status(tmp_path)
    assert "map         1 of 5 task(s) done" in page
    assert "encode      0 of 5 task(s) done" in page
    assert "3 gopher_quality.too_few_words" in page
    assert page.endswith("not finished: run the same command again\n")


def test_a_folder_without_a_job_or_without_a_report_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no data job here"):
        status(tmp_path)
    with pytest.raises(DataError, match="a data job writes it when it has finished"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path)
