import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_pipeline.config import DataJob
from data_pipeline.report import bars, funnel, write_report
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
        assert "gopher_quality.min_words" in text
        assert str(out.parent / "c.jsonl") in text
        assert f"{report['splits']['train']['tokens']:,}" in text
    assert report["damage"]["count"] == 1
    assert report["examples"]["gopher_quality.min_words"][0]["text"] == EVIL


def test_the_funnel_ends_with_the_documents_that_were_packed(out: Path):
    report = json.loads((out / "report.json").read_text())
    steps = funnel(report)
    assert [(step.name, step.lost, step.left) for step in steps] == [("json", 1, 43), ("gopher_quality", 3, 40)]
    assert steps[1].rules == {"gopher_quality.min_words": 3}
    assert steps[1].by_source == {"<i>crawl</i>": 3}
    assert steps[-1].left == sum(split["documents"] for split in report["splits"].values())


def test_every_source_is_conserved_in_the_report(out: Path):
    source = json.loads((out / "report.json").read_text())["sources"]["<i>crawl</i>"]
    assert source["records"] == 44 == source["packed"] + sum(source["lost"].values())


def test_bars_are_in_proportion_to_the_largest():
    assert bars({"a": 4, "b": 1, "c": 0}) == [("a", 4, 100.0), ("b", 1, 25.0), ("c", 0, 0.0)]
    assert bars({}) == []


def test_a_folder_without_a_report_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="a data job writes it when it has finished"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path)
