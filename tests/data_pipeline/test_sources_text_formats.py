import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config import DataJob, Source
from data_pipeline.document import Damage, Shard
from data_pipeline.sources import line_reader
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import list_shards, prepare_sources, read_shard
from megagpt.errors import DataError

PILE_LINE = b'{"text": "Ducks swim.", "meta": {"pile_set_name": "Ponds"}}\n'


def read(path: Path, data: bytes, **source: str) -> tuple[list[RawRecord], list[Damage]]:
    path.write_bytes(data)
    config = Source(path=str(path), **source)
    found = list(read_shard(list_shards(config, 0)[0], config))
    return [r for r in found if isinstance(r, RawRecord)], [d for d in found if isinstance(d, Damage)]


def lines(n: int) -> bytes:
    return b"".join(json.dumps({"text": f"{i} {i * 7919} {i * 104729}"}).encode() + b"\n" for i in range(n))


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.ZstdCompressor().compress)],
)
def test_the_piles_lines_are_read_plain_and_compressed(tmp_path: Path, name: str, pack) -> None:
    # Two compressed parts in a row are one stream, as `cat` makes them.
    records, damage = read(tmp_path / name, pack(PILE_LINE * 2) + pack(PILE_LINE[:-1]))
    assert damage == []
    assert [(r.ordinal, r.text, r.meta) for r in records] == [
        (n, "Ducks swim.", {"pile_set_name": "Ponds"}) for n in range(3)
    ]
    assert records[2].url.endswith(f"{name}:3")


def test_each_bad_line_is_reported_by_its_number_and_the_rest_is_read(tmp_path: Path) -> None:
    bad = [b'{"text": "open', b'{"txt": "a"}', b'{"text": 5}', b"[1]", b'{"text": "\xff"}', b""]
    records, damage = read(tmp_path / "x.jsonl", PILE_LINE + b"\n".join(bad) + b"\n" + PILE_LINE)
    assert [r.ordinal for r in records] == [0, 7]
    assert [(d.offset, d.unit, d.reason) for d in damage] == [
        (2, "line", "json.invalid"),
        (3, "line", "json.no_text_key"),
        (4, "line", "json.text_not_a_string"),
        (5, "line", "json.not_an_object"),
        (6, "line", "json.not_utf8"),
    ]


def test_the_text_key_and_the_address_can_be_named(tmp_path: Path) -> None:
    records, _ = read(tmp_path / "x.jsonl", b'{"body": "b", "url": "http://a.b"}\n', text_key="body")
    assert (records[0].text, records[0].url) == ("b", "http://a.b")


def test_a_text_key_that_no_line_has_is_an_error_with_the_keys_there_are(tmp_path: Path) -> None:
    line = b'{"content": "Ducks.", "id": 1}\n'
    with pytest.raises(
        DataError, match=r"none of the first 100 lines has a field 'text'; line 100 has content, id. Set"
    ):
        read(tmp_path / "x.jsonl", line * 200)
    # Among lines that have it, as many without it as there may be are bad lines.
    records, damage = read(tmp_path / "x.jsonl", PILE_LINE + line * 200)
    assert (len(records), len(damage)) == (1, 200)


@pytest.mark.parametrize(
    ("name", "pack"), [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.ZstdCompressor().compress)]
)
@pytest.mark.parametrize("cut", [1, 4, 200, 20_000])
def test_a_cut_stream_is_reported_and_gives_what_there_is(tmp_path: Path, name: str, pack, cut: int) -> None:
    whole = pack(lines(20_000))
    records, damage = read(tmp_path / name, whole[:-cut])
    # The line in which the file ends is a lost line beside the lost bytes.
    assert [d.reason.partition(".")[2] for d in damage][-1] == "truncated"
    assert {d.reason for d in damage[:-1]} <= {"json.cut"}
    assert damage[-1].offset + damage[-1].bytes_lost == len(whole) - cut
    assert [r.ordinal for r in records] == list(range(len(records)))
    assert len(records) >= (17_000 if cut < 20_000 else 14_000)  # a block of 128 KiB are 2,500 of these lines
    assert len(records) < 20_000 or cut <= 4


def test_blocks_before_the_damaged_block_of_a_zstd_frame_are_given_out(tmp_path: Path) -> None:
    whole = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines(60_000)))
    at = len(whole) // 2
    whole[at : at + 300] = bytes(300)
    records, damage = read(tmp_path / "x.jsonl.zst", bytes(whole))
    assert [d.reason for d in damage if d.unit == "byte"] == ["zstd.damaged"]
    assert [r.ordinal for r in records] == list(range(len(records)))
    assert len(records) >= 0.4 * 60_000
    assert at - 131_072 <= damage[-1].offset <= at
    assert damage[-1].offset + damage[-1].bytes_lost == len(whole)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress)],
)
def test_reading_goes_on_at_the_next_member_or_frame(tmp_path: Path, name: str, pack) -> None:
    # Lines run over the borders of the parts, as they do where a stream is cut into parts of equal size.
    plain = lines(3000)
    parts = [pack(plain[at : at + 9_001]) for at in range(0, len(plain), 9_001)]
    broken = bytearray(parts[3])
    broken[len(broken) // 2 : len(broken) // 2 + 40] = b"\x55" * 40
    records, damage = read(tmp_path / name, b"".join([*parts[:3], bytes(broken), *parts[4:]]))
    texts = {r.text for r in records}
    outside = (plain[: 3 * 9_001], plain[4 * 9_001 :])
    whole_lines = [line for part in outside for line in part.split(b"\n")[:-1]]
    intact = [json.loads(line)["text"] for line in whole_lines if line.startswith(b"{")]
    assert set(intact) <= texts <= {json.loads(line)["text"] for line in plain.splitlines()}
    begin = sum(map(len, parts[:3]))
    stretch = next(d for d in damage if d.unit == "byte")
    assert begin <= stretch.offset < stretch.offset + stretch.bytes_lost == begin + len(parts[3])
    # The line cut at the edge of the gap is counted; what the damaged part gave besides is no JSON.
    lost_lines = [d.reason for d in damage if d.unit == "line"]
    assert lost_lines[-1] == "json.cut"
    assert set(lost_lines) <= {"json.cut", "json.invalid", "json.not_utf8"}
    assert len({r.ordinal for r in records}) == len(records)


def test_a_gzip_stream_followed_by_something_else_is_reported(tmp_path: Path) -> None:
    records, damage = read(tmp_path / "x.jsonl.gz", gzip.compress(lines(100)) + b"no gzip")
    assert len(records) == 100
    assert [(d.reason, d.bytes_lost) for d in damage] == [("gzip.damaged", 7)]


def test_a_wrong_checksum_is_reported_though_the_lines_are_given_out(tmp_path: Path) -> None:
    for name, pack, at in (
        ("x.jsonl.gz", gzip.compress, -6),
        ("x.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress, -2),
    ):
        data = bytearray(pack(lines(100)))
        data[at] ^= 1
        records, damage = read(tmp_path / name, bytes(data))
        assert len(records) == 100
        assert [(d.reason.partition(".")[2], d.offset, d.bytes_lost) for d in damage] == [("checksum", 0, len(data))]


def test_a_line_over_the_limit_is_damage_and_not_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_reader, "MAX_RECORD_BYTES", 100_000)
    bomb = b'{"text": "' + b"a" * 1_000_000 + b'"}'
    records, damage = read(tmp_path / "x.jsonl.gz", gzip.compress(PILE_LINE + bomb + b"\n" + PILE_LINE))
    assert [r.ordinal for r in records] == [0, 2]
    assert [(d.offset, d.reason, d.bytes_lost) for d in damage] == [(2, "line_too_long", len(bomb))]


def test_parquet_rows_carry_text_url_and_meta(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["a", None, "c"], "url": ["u", "v", None], "meta": ['{"k": 1}', None, "x"], "z": [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    records, damage = read(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert [(r.ordinal, r.text, r.meta) for r in records] == [(0, "a", {"k": "1"}), (2, "c", {"meta": "x"})]
    assert records[1].url.endswith("x.parquet:2")
    assert [(d.offset, d.unit, d.reason) for d in damage] == [(1, "row", "parquet.text_not_a_string")]


def test_a_parquet_file_without_the_column_names_the_columns_that_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; columns are body. Set the source's text_key"):
        read(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes())


def test_a_cut_parquet_file_is_one_damage(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a" * 100]}), tmp_path / "x.parquet")
    records, damage = read(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes()[:-10])
    assert (records, [d.reason for d in damage]) == ([], ["parquet.unreadable"])


def test_a_damaged_row_group_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(n) * 50 for n in range(100)]}), path, row_group_size=50, use_dictionary=False)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    records, damage = read(path, bytes(data))
    assert [d.reason for d in damage] == ["parquet.row_group_damaged"]
    assert [r.ordinal for r in records] == list(range(50, 100))


def test_damage_in_another_column_costs_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": [str(n) * 50 for n in range(100)], "url": [f"http://a.b/{n}" for n in range(100)]})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    records, damage = read(path, bytes(data))
    assert [r.text for r in records] == [str(n) * 50 for n in range(100)]
    assert records[0].url.endswith("x.parquet:0")
    assert records[50].url == "http://a.b/50"
    assert [(d.reason, d.offset, d.unit) for d in damage] == [
        ("parquet.column_damaged", 0, "row and what follows in its group")
    ]


def test_a_row_that_is_not_utf8_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [f"row {n} ééé" for n in range(60)]}), path, compression="none", use_dictionary=False
    )
    data = path.read_bytes().replace("row 7 ééé".encode(), b"row 7 \xff\xa9\xc3\xa9\xc3\xa9")
    records, damage = read(path, data)
    assert [r.ordinal for r in records] == [n for n in range(60) if n != 7]
    assert [(d.reason, d.offset, d.unit) for d in damage] == [("parquet.not_utf8", 7, "row")]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    records, _ = read(tmp_path / "x.txt", b"\xef\xbb\xbfOne.\n\nTwo.")
    assert [r.text for r in records] == ["One.\n\nTwo."]
    _, damage = read(tmp_path / "y.txt", b"caf\xe9")
    assert [(d.reason, d.offset) for d in damage] == [("txt.not_utf8", 3)]


def test_folders_and_globs_are_listed_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.txt", "b/1.jsonl.gz", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"xy")
    found = list_shards(Source(path=str(tmp_path), name="all"), 7)
    assert [(s.ordinal, s.source, s.kind, s.size_bytes, Path(s.path).name) for s in found] == [
        (7, "all", "txt", 2, "1.txt"),
        (8, "all", "jsonl", 2, "1.jsonl.gz"),
        (9, "all", "jsonl", 2, "2.jsonl"),
    ]
    assert len(list_shards(Source(path=str(tmp_path / "*" / "*.jsonl*")), 0)) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.warc.gz", "warc"), ("a.warc.wet.gz", "wet"), ("A.WARC.GZ", "warc"), ("a.parquet", "parquet")],
)
def test_the_kind_is_told_from_the_name(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    assert list_shards(Source(path=str(tmp_path / name)), 0)[0].kind == kind


def test_a_path_that_matches_nothing_and_an_unknown_ending_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/\*.jsonl: no file matches"):
        list_shards(Source(path=str(tmp_path / "nowhere" / "*.jsonl")), 0)
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"a.csv: the format cannot be told .* known endings are .warc.gz, .* kind"):
        list_shards(Source(path=str(tmp_path / "a.csv")), 0)
    with pytest.raises(DataError, match="path is empty"):
        list_shards(Source(name="web"), 0)


def test_sources_are_numbered_through_in_the_jobs_order(tmp_path: Path) -> None:
    for name in ("z.jsonl", "a.txt"):
        (tmp_path / name).touch()
    job = DataJob(out=tmp_path / "out", sources=(Source(path=f"{tmp_path}/z.jsonl"), Source(path=f"{tmp_path}/a.txt")))
    assert [(s.ordinal, s.source) for s in prepare_sources(job)] == [(0, "z"), (1, "a")]


def test_remote_addresses_are_found_and_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(PILE_LINE)
    source = Source(path=f"file://{tmp_path}/*.jsonl")
    shards = list_shards(source, 0)
    assert [r.text for r in read_shard(shards[0], source)] == ["Ducks swim."]


def test_a_shard_that_vanished_is_named(tmp_path: Path) -> None:
    shard = Shard(0, "s", "jsonl", str(tmp_path / "gone.jsonl"), 1)
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be opened: No such file"):
        list(read_shard(shard, Source(path="x")))
