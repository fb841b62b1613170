import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import intake
from data_pipeline.config import DataJob, Source
from data_pipeline.extract_task import extract_documents
from data_pipeline.filter_task import filter_documents
from data_pipeline.sources.shards import prepare_sources
from data_pipeline.tasks import Counts, check_conservation

ENGLISH = (
    "The ducks of the old pond swim to the reeds in the morning, and the children who have come with bread wait for "
    "them on the bridge. By noon the water is quiet again. In the evening the birds return, one after another, and "
    "sleep on the small island that nobody ever visits."
)
GERMAN = "Die Enten schwimmen am Morgen zum Schilf, und die Kinder warten mit Brot auf der Brücke, bis es dunkel wird."


def run(tmp_path: Path, name: str, data: bytes, source: dict | None = None, **job: object) -> tuple[Counts, Path]:
    """Both stages over one file; (counts of the filter stage, its folder). Extraction writes into `pages` beside it."""
    path = tmp_path / name
    path.write_bytes(data)
    config = DataJob.model_validate(
        {"out": tmp_path / "out", "sources": (Source(path=str(path), name="ducks", **(source or {})),), **job}
    )
    shard, origin = prepare_sources(config)[0], config.sources[0]
    folders = {stage: tmp_path / stage for stage in ("pages", "filtered")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    extracted = None
    if shard.kind == "warc":
        check_conservation("extract", extract_documents(folders["pages"], shard, origin, config.extract))
        extracted = folders["pages"] / "docs.parquet"
    counts = filter_documents(folders["filtered"], shard, origin, config, extracted)
    check_conservation("filter", counts)
    return counts, folders["filtered"]


def jsonl(*texts: str, subset: str = "Ponds") -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {"pile_set_name": subset}}).encode() + b"\n" for text in texts)


MIXED = jsonl(ENGLISH, GERMAN, "  \n", ENGLISH[:60], ENGLISH.replace("The", "A")) + b"broken\n"


def test_every_record_is_kept_or_counted_under_its_reason(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", MIXED)
    assert (counts.documents_in, counts.documents_out) == (6, 2)
    lost = {"language.not_kept": 1, "no_text": 1, "gopher_quality.min_words": 1, "json.invalid": 1}
    assert counts.rejected == lost
    assert counts.detail["sources"] == {"ducks": {"": 2, **lost}}
    assert counts.detail["languages"] == {"en": 3, "de": 1}
    assert counts.detail["kept_by_language"] == {"en": 2}
    assert counts.detail["failed_rules"]["gopher_quality.min_words"] == 1
    assert counts.detail["text_bytes_kept"] == len(ENGLISH) * 2 - 2
    assert counts.detail["text_bytes_in"] == len(ENGLISH) * 2 - 2 + len(GERMAN.encode()) + 3 + 60
    assert (counts.detail["damage_count"], counts.detail["bytes_lost"]) == (1, 6)
    assert counts.detail["damage"][0]["offset"] == 6
    assert counts.detail["thresholds"]["language"] == {"keep": ("en",), "min_score": 0.65}
    assert counts.detail["thresholds"]["gopher_quality"]["min_words"] == 50


def test_every_documents_measures_are_there_to_decide_anew(tmp_path: Path) -> None:
    _, out = run(tmp_path, "x.jsonl", MIXED)
    rows = pq.read_table(out / "decisions.parquet").to_pylist()
    assert [row["doc_id"] for row in rows] == [0, 1, 3, 4]  # no text, and no JSON: nothing to decide
    assert [row["reason"] for row in rows] == ["", "language.not_kept", "gopher_quality.min_words", ""]
    assert rows[0]["gopher_quality.words"] > 50 > rows[2]["gopher_quality.words"] > 0
    assert rows[1]["gopher_quality.words"] is None  # not reached
    assert "gopher_quality.min_words" in rows[2]["failed"]
    assert rows[0]["failed"] == []


def test_a_records_own_meta_may_name_its_source(tmp_path: Path) -> None:
    data = jsonl(ENGLISH) + jsonl(GERMAN, subset="Lakes") + json.dumps({"text": ENGLISH}).encode() + b"\n"
    counts, out = run(tmp_path, "x.jsonl", data, source={"name_from": "pile_set_name"})
    assert counts.detail["sources"] == {"Ponds": {"": 1}, "Lakes": {"language.not_kept": 1}, "ducks": {"": 1}}
    assert pq.read_table(out / "docs.parquet")["source"].to_pylist() == ["Ponds", "ducks"]


def test_without_identification_no_document_has_a_language(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", jsonl(GERMAN), language={"enabled": False}, filters={})
    assert counts.documents_out == 1
    assert "language" not in json.loads(pq.read_table(out / "docs.parquet")["meta"][0].as_py())
    assert "language" not in counts.detail["thresholds"]


def test_kept_documents_carry_their_id_source_address_and_meta(tmp_path: Path) -> None:
    _, out = run(tmp_path, "x.jsonl", jsonl(GERMAN, ENGLISH))
    table = pq.read_table(out / "docs.parquet")
    assert table.schema.names == ["doc_id", "text", "source", "url", "meta"]
    row = table.to_pylist()[0]
    assert (row["doc_id"], row["text"], row["source"]) == (0 << 32 | 1, ENGLISH, "ducks")
    assert row["url"].endswith("x.jsonl:2")
    meta = json.loads(row["meta"])
    assert (meta["pile_set_name"], meta["language"]) == ("Ponds", "en")
    assert 0.65 <= float(meta["language_score"]) <= 1


def test_the_shards_ordinal_is_the_upper_half_of_the_id(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ENGLISH))
    (tmp_path / "b.jsonl").write_bytes(jsonl(GERMAN, ENGLISH))
    job = DataJob(out=tmp_path / "out", sources=(Source(path=str(tmp_path / "*.jsonl")),))
    (tmp_path / "b").mkdir()
    filter_documents(tmp_path / "b", prepare_sources(job)[1], job.sources[0], job)
    assert pq.read_table(tmp_path / "b" / "docs.parquet")["doc_id"].to_pylist() == [(1 << 32) + 1]


def test_rejects_show_the_reason_all_rules_and_the_beginning(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", jsonl(GERMAN * 10, ENGLISH[:60]))
    rows = pq.read_table(out / "rejects.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["language.not_kept", "gopher_quality.min_words"]
    assert len(rows) == sum(counts.rejected.values())
    assert rows[0]["text"] == (GERMAN * 10)[:500]
    assert "gopher_quality.min_words" in rows[1]["failed"].split()


def test_rejects_are_sampled_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "REJECT_SAMPLE", 3)
    counts, out = run(tmp_path, "x.jsonl", jsonl(*[GERMAN] * 10))
    assert counts.rejected == {"language.not_kept": 10}
    assert pq.read_table(out / "rejects.parquet")["doc_id"].to_pylist() == [0, 1, 2]


def test_damages_are_listed_up_to_a_limit_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "DAMAGE_SAMPLE", 2)
    counts, _ = run(tmp_path, "x.jsonl", b"x\n" * 5)
    assert (len(counts.detail["damage"]), counts.detail["damage_count"]) == (2, 5)
    assert counts.rejected == {"json.invalid": 5}


def test_the_same_shard_gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["decisions.parquet", "docs.parquet", "rejects.parquet"]
    _, out = run(tmp_path, "x.jsonl", MIXED)
    first = [(out / name).read_bytes() for name in names]
    _, out = run(tmp_path, "x.jsonl", MIXED)
    assert [(out / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in out.iterdir()) == names


def test_every_language_stays_where_none_is_named(tmp_path: Path) -> None:
    section = {"keep": (), "min_score": 0.0}
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH, GERMAN), language=section, filters={})
    assert counts.detail["kept_by_language"] == {"en": 1, "de": 1}


def test_a_low_score_is_its_own_reason(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH), language={"keep": ("en",), "min_score": 1.0})
    assert counts.rejected == {"language.low_score": 1}


def test_c4_changes_the_text_that_is_kept(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", jsonl(f"Home\n{ENGLISH}\nContact"), filters={"c4": {}})
    assert pq.read_table(out / "docs.parquet")["text"].to_pylist() == [ENGLISH]
    assert counts.detail["text_bytes_kept"] == len(ENGLISH)


def test_a_text_that_filters_leave_empty_is_not_kept(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH[:-1]), filters={"c4": {"min_sentences": None}})
    assert counts.rejected == {"no_text_after_filters": 1}


def test_pages_are_extracted_and_their_charset_is_honoured(tmp_path: Path) -> None:
    text = ENGLISH.replace("bread", "cr\u00eapes")
    page = f"<html><body><main><p>{text}</p></main></body></html>".encode("latin-1")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=iso-8859-1\r\n\r\n" + page
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: <http://a.b/>\r\nContent-Length: {len(http)}\r\n\r\n"
    counts, out = run(tmp_path, "x.warc.gz", gzip.compress(head.encode() + http + b"\r\n\r\n"))
    rows = pq.read_table(out / "docs.parquet").to_pylist()
    assert [(row["text"], row["url"]) for row in rows] == [(text, "http://a.b/")]
    assert counts.documents_out == 1


def warc(*bodies: bytes) -> bytes:
    data = b""
    for number, body in enumerate(bodies):
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/{number}\r\nContent-Length: {len(http)}"
        data += gzip.compress(head.encode() + b"\r\n\r\n" + http + b"\r\n\r\n", mtime=0)
    return data


def test_pages_without_text_are_lost_in_extraction_and_the_others_in_the_filters(tmp_path: Path) -> None:
    pages = [f"<html><body><main><p>{text}</p></main></body></html>".encode() for text in ("", GERMAN, ENGLISH)]
    counts, _ = run(tmp_path, "x.warc.gz", warc(*pages))
    assert pq.read_table(tmp_path / "pages" / "docs.parquet")["url"].to_pylist() == ["http://a.b/1", "http://a.b/2"]
    assert pq.read_table(tmp_path / "pages" / "rejects.parquet")["reason"].to_pylist() == ["no_text"]
    assert (counts.documents_in, counts.documents_out, counts.rejected) == (2, 1, {"language.not_kept": 1})


def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*[ENGLISH] * 5)))
    steps: list[tuple[int, int]] = []
    filter_one(tmp_path, path, lambda n_bytes, n_documents: steps.append((n_bytes, n_documents)))
    assert [sum(numbers) for numbers in zip(*steps, strict=True)] == [path.stat().st_size, 5]


def filter_one(tmp_path: Path, path: Path, progress: Callable[[int, int], None]) -> None:
    job = DataJob(out=tmp_path / "out", sources=(Source(path=str(path)),))
    (tmp_path / "m").mkdir()
    filter_documents(tmp_path / "m", prepare_sources(job)[0], job.sources[0], job, progress=progress)


def test_an_error_leaves_no_file_behind_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(MIXED)

    def stop(_bytes: int, _documents: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filter_one(tmp_path, tmp_path / "x.jsonl", stop)
    assert not (tmp_path / "m" / "docs.parquet").exists()


def test_an_empty_file_gives_empty_tables(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", b"")
    assert counts.documents_in == 0
    assert pq.read_table(out / "docs.parquet").num_rows == 0
    assert pq.read_table(out / "decisions.parquet").num_rows == 0
