import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import map_shard as map_shard_module
from data_pipeline.config import DataJob, Source
from data_pipeline.document import ShardCounts
from data_pipeline.map_shard import map_shard
from data_pipeline.sources.shards import prepare_sources

ENGLISH = (
    "The ducks of the old pond swim to the reeds in the morning, and the children who have come with bread wait for "
    "them on the bridge. By noon the water is quiet again. In the evening the birds return, one after another, and "
    "sleep on the small island that nobody ever visits."
)
GERMAN = "Die Enten schwimmen am Morgen zum Schilf, und die Kinder warten mit Brot auf der Brücke, bis es dunkel wird."


def run(tmp_path: Path, name: str, data: bytes, **job: object) -> tuple[ShardCounts, Path]:
    path = tmp_path / name
    path.write_bytes(data)
    config = DataJob.model_validate(
        {"out": tmp_path / "out", "sources": (Source(path=str(path), name="ducks"),), **job}
    )
    out = tmp_path / "mapped"
    counts = map_shard(prepare_sources(config)[0], config.sources[0], config, out)
    assert counts.records == counts.kept + sum(counts.rejected.values())
    return counts, out


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {"pile_set_name": "Ponds"}}).encode() + b"\n" for text in texts)


MIXED = jsonl(ENGLISH, GERMAN, "  \n", ENGLISH[:60], ENGLISH.replace("The", "A")) + b"broken\n"


def test_every_record_is_kept_or_counted_under_its_reason(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", MIXED)
    assert counts.records == 6
    assert counts.kept == 2
    assert counts.rejected == {
        "language.not_kept": 1,
        "no_text": 1,
        "gopher_quality.too_few_words": 1,
        "json.invalid": 1,
    }
    assert counts.languages == {"en": 3, "de": 1}
    assert counts.kept_by_language == {"en": 2}
    assert counts.failed_rules == {"language.not_kept": 1, "gopher_quality.too_few_words": 1}
    assert counts.text_bytes_kept == len(ENGLISH) * 2 - 2
    assert counts.text_bytes_in == len(ENGLISH) * 2 - 2 + len(GERMAN.encode()) + 3 + 60
    assert (counts.damage_count, counts.bytes_lost, counts.damage[0].offset) == (1, 6, 6)
    assert counts.thresholds["language"] == {"keep": ("en",), "min_score": 0.65}
    assert counts.thresholds["gopher_quality"]["min_words"] == 50


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
    map_shard(prepare_sources(job)[1], job.sources[0], job, tmp_path / "b")
    assert pq.read_table(tmp_path / "b" / "docs.parquet")["doc_id"].to_pylist() == [(1 << 32) + 1]


def test_rejects_show_the_reason_all_rules_and_the_beginning(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", jsonl(GERMAN * 10, ENGLISH[:60]))
    rows = pq.read_table(out / "rejects.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["language.not_kept", "gopher_quality.too_few_words"]
    assert len(rows) == sum(counts.rejected.values())
    assert rows[0]["text"] == (GERMAN * 10)[:500]
    assert rows[1]["failed"] == "gopher_quality.too_few_words"


def test_rejects_are_sampled_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_shard_module, "REJECT_SAMPLE", 3)
    counts, out = run(tmp_path, "x.jsonl", jsonl(*[GERMAN] * 10))
    assert counts.rejected == {"language.not_kept": 10}
    assert pq.read_table(out / "rejects.parquet")["doc_id"].to_pylist() == [0, 1, 2]


def test_damages_are_listed_up_to_a_limit_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_shard_module, "DAMAGE_SAMPLE", 2)
    counts, _ = run(tmp_path, "x.jsonl", b"x\n" * 5)
    assert (len(counts.damage), counts.damage_count, counts.rejected) == (2, 5, {"json.invalid": 5})


def test_the_same_shard_gives_the_same_bytes(tmp_path: Path) -> None:
    _, out = run(tmp_path, "x.jsonl", MIXED)
    first = [(out / name).read_bytes() for name in ("docs.parquet", "rejects.parquet")]
    _, out = run(tmp_path, "x.jsonl", MIXED)
    assert [(out / name).read_bytes() for name in ("docs.parquet", "rejects.parquet")] == first
    assert sorted(path.name for path in out.iterdir()) == ["docs.parquet", "rejects.parquet"]


def test_every_language_stays_where_none_is_named(tmp_path: Path) -> None:
    section = {"keep": (), "min_score": 0.0}
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH, GERMAN), language=section, filters={})
    assert counts.kept_by_language == {"en": 1, "de": 1}


def test_a_low_score_is_its_own_reason(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH), language={"keep": ("en",), "min_score": 1.0})
    assert counts.rejected == {"language.low_score": 1}


def test_c4_changes_the_text_that_is_kept(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", jsonl(f"Home\n{ENGLISH}\nContact"), filters={"c4": {}})
    assert pq.read_table(out / "docs.parquet")["text"].to_pylist() == [ENGLISH]
    assert counts.text_bytes_kept == len(ENGLISH)


def test_a_text_that_filters_leave_empty_is_not_kept(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, "x.jsonl", jsonl(ENGLISH[:-1]), filters={"c4": {"min_sentences": 0}})
    assert counts.rejected == {"no_text_after_filters": 1}


def test_pages_are_extracted_and_their_charset_is_honoured(tmp_path: Path) -> None:
    text = ENGLISH.replace("bread", "cr\u00eapes")
    page = f"<html><body><main><p>{text}</p></main></body></html>".encode("latin-1")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=iso-8859-1\r\n\r\n" + page
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: <http://a.b/>\r\nContent-Length: {len(http)}\r\n\r\n"
    counts, out = run(tmp_path, "x.warc.gz", gzip.compress(head.encode() + http + b"\r\n\r\n"))
    rows = pq.read_table(out / "docs.parquet").to_pylist()
    assert [(row["text"], row["url"]) for row in rows] == [(text, "http://a.b/")]
    assert counts.kept == 1


def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*[ENGLISH] * 5)))
    job = DataJob(out=tmp_path / "out", sources=(Source(path=str(path)),))
    steps: list[int] = []
    map_shard(prepare_sources(job)[0], job.sources[0], job, tmp_path / "m", steps.append)
    assert sum(steps) == path.stat().st_size


def test_an_error_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(MIXED)
    job = DataJob(out=tmp_path / "out", sources=(Source(path=str(tmp_path / "x.jsonl")),))
    shard = prepare_sources(job)[0]

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_shard(shard, job.sources[0], job, tmp_path / "m", stop)
    assert list((tmp_path / "m").iterdir()) == []


def test_an_empty_file_gives_empty_tables(tmp_path: Path) -> None:
    counts, out = run(tmp_path, "x.jsonl", b"")
    assert counts.records == 0
    assert pq.read_table(out / "docs.parquet").num_rows == 0
