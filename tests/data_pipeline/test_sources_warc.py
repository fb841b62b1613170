import dataclasses
import gzip
import random
import zlib
from pathlib import Path

import pytest
import zstandard

from data_pipeline.document import Damage, Shard
from data_pipeline.sources import warc, warc_frames
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.warc import read_warc, read_wet
from megagpt.errors import DataError

PAGE = b"<html><body><p>A page about ducks.</p></body></html>"


def warc_record(kind: str, url: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def response(url: str, body: bytes = PAGE, status: str = "200 OK", headers: str = "Content-Type: text/html") -> bytes:
    return warc_record("response", url, f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body)


def unlike(n: int) -> bytes:
    """A page that gzip cannot make much smaller, so that a cut in the file is a cut in the page."""
    words = random.Random(n)
    return b"<html>" + bytes(words.choices(b"abcdefghijklmnopqrstuvwxyz ", k=3000)) + b"</html>"


def read(path: Path, data: bytes, *, wet: bool = False) -> tuple[list[RawRecord], list[Damage]]:
    path.write_bytes(data)
    shard = Shard(0, "s", "warc", str(path), len(data))
    found = list(read_wet(shard) if wet else read_warc(shard))
    return [r for r in found if isinstance(r, RawRecord)], [d for d in found if isinstance(d, Damage)]


@pytest.fixture
def members() -> list[bytes]:
    return [gzip.compress(response(f"http://a.b/{n}", unlike(n)), mtime=0) for n in range(5)]


def test_every_kind_of_record_gets_its_reason_and_none_is_lost(tmp_path: Path) -> None:
    data = b"".join(
        gzip.compress(record)
        for record in (
            warc_record("warcinfo", "", b"software: x"),
            warc_record("request", "http://a.b/", b"GET / HTTP/1.1\r\n\r\n"),
            response("http://a.b/"),
            response("http://a.b/gone", status="404 Not Found"),
            response("http://a.b/moved", status="301 Moved"),
            response("http://a.b/i.png", b"\x89PNG", headers="Content-Type: image/png"),
            response("http://a.b/x", headers="Content-Type: Application/XHTML+XML; charset=UTF-8"),
            warc_record("response", "dns:a.b", b"20240101 a.b"),
        )
    )
    records, damage = read(tmp_path / "x.warc.gz", data)
    assert damage == []
    assert [r.reject for r in records] == [
        "not_response",
        "not_response",
        "",
        "http_status",
        "http_status",
        "not_html",
        "",
        "not_http",
    ]
    assert [r.ordinal for r in records] == list(range(8))
    assert records[2].html == PAGE
    assert (records[6].content_type, records[6].charset) == ("application/xhtml+xml", "utf-8")
    assert records[-1].position == len(data)


def test_angle_brackets_around_an_address_are_taken_off(tmp_path: Path) -> None:
    records, _ = read(tmp_path / "x.warc.gz", gzip.compress(response("<http://a.b/c>")))
    assert records[0].url == "http://a.b/c"


def test_an_uncompressed_archive_is_read_too(tmp_path: Path) -> None:
    records, damage = read(tmp_path / "x.warc", response("http://a.b/1") + response("http://a.b/2"))
    assert [r.url for r in records] == ["http://a.b/1", "http://a.b/2"]
    assert damage == []


def test_many_records_in_one_gzip_member_are_all_read(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(response(f"http://a.b/{n}", unlike(n)) for n in range(20)))
    records, damage = read(tmp_path / "x.warc.gz", data)
    assert [r.url for r in records] == [f"http://a.b/{n}" for n in range(20)]
    assert damage == []


@pytest.mark.parametrize("cut", [1, 5, 9, 100, 500, 1000])
def test_a_truncated_archive_says_so_and_gives_every_whole_record(
    tmp_path: Path, members: list[bytes], cut: int
) -> None:
    data = b"".join(members)[:-cut]
    records, damage = read(tmp_path / "x.warc.gz", data)
    assert [r.url for r in records][:4] == [f"http://a.b/{n}" for n in range(4)]
    begin = sum(map(len, members[:4]))
    assert [(d.reason, d.offset, d.bytes_lost) for d in damage] == [("gzip.truncated", begin, len(data) - begin)]
    # The last record survives only where nothing but the gzip trailer is missing.
    assert len(records) == (5 if cut <= 9 else 4)


@pytest.mark.parametrize("at", [0, 2, 15, 300, -3])
def test_a_damaged_member_costs_itself_and_no_other(tmp_path: Path, members: list[bytes], at: int) -> None:
    broken = bytearray(members[2])
    broken[at] ^= 0xFF
    data = b"".join([*members[:2], bytes(broken), *members[3:]])
    records, damage = read(tmp_path / "x.warc.gz", data)
    assert [r.url for r in records] == [f"http://a.b/{n}" for n in (0, 1, 3, 4)]
    begin = sum(map(len, members[:2]))
    assert [(d.offset, d.bytes_lost) for d in damage] == [(begin, len(members[2]))]
    assert damage[0].reason == ("gzip.checksum" if at == -3 else "gzip.damaged")


def test_two_damaged_places_are_two_damages(tmp_path: Path, members: list[bytes]) -> None:
    data = b"".join([b"\0\0garbage", members[0], b"not gzip at all", *members[1:]])
    records, damage = read(tmp_path / "x.warc.gz", data)
    assert len(records) == 5
    assert [(d.reason, d.offset, d.bytes_lost) for d in damage] == [
        ("gzip.no_member", 0, 9),
        ("gzip.damaged", 9 + len(members[0]), 15),
    ]


def test_zero_padding_after_the_last_member_is_no_damage(tmp_path: Path, members: list[bytes]) -> None:
    records, damage = read(tmp_path / "x.warc.gz", b"".join(members) + bytes(512))
    assert (len(records), damage) == (5, [])


def test_a_truncated_plain_archive_says_so(tmp_path: Path) -> None:
    whole = response("http://a.b/1")
    records, damage = read(tmp_path / "x.warc", whole + response("http://a.b/2")[:-20])
    assert len(records) == 1
    assert [d.reason for d in damage] == ["warc.truncated"]


def test_a_record_longer_than_its_member_is_reported_and_the_next_is_read(tmp_path: Path) -> None:
    short = response("http://a.b/1").replace(b"Content-Length: ", b"Content-Length: 9")
    records, damage = read(tmp_path / "x.warc.gz", gzip.compress(short) + gzip.compress(response("http://a.b/2")))
    assert [r.url for r in records] == ["http://a.b/2"]
    assert [d.reason for d in damage] == ["warc.record_cut_short"]


def test_garbage_between_records_is_reported_with_its_size(tmp_path: Path) -> None:
    data = response("http://a.b/1") + b"garbage\r\n" + response("http://a.b/2")
    records, damage = read(tmp_path / "x.warc", data)
    assert [r.url for r in records] == ["http://a.b/1", "http://a.b/2"]
    assert [(d.reason, d.bytes_lost) for d in damage] == [("warc.garbage", 9)]


def test_a_record_with_an_unreadable_header_is_reported(tmp_path: Path) -> None:
    data = response("http://a.b/1").replace(b"WARC/1.0", b"WARC/1.\x85") + response("http://a.b/2")
    records, damage = read(tmp_path / "x.warc", data)
    assert [r.url for r in records] == ["http://a.b/2"]
    assert [d.reason for d in damage] == ["warc.bad_header"]


def test_no_random_damage_costs_more_than_one_record_or_raises(tmp_path: Path, members: list[bytes]) -> None:
    draw = random.Random(1)
    for _ in range(100):
        data = bytearray(b"".join(members))
        at = draw.randrange(len(data))
        data[at : at + 1] = bytes([data[at] ^ draw.randrange(1, 256)])
        records, damage = read(tmp_path / "x.warc.gz", bytes(data))
        # A bit in the gzip header's time or operating system is no damage to anything.
        assert (len(records), len(damage)) in {(4, 1), (5, 0)}


def test_a_record_over_the_size_limit_is_damage_and_its_bytes_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warc_frames, "MAX_RECORD_BYTES", 10_000)
    big = response("http://a.b/big", b"x" * 3_000_000)
    for data in (big + response("http://a.b/2"), gzip.compress(big) + gzip.compress(response("http://a.b/2"))):
        records, damage = read(tmp_path / "x.warc", data)
        assert [r.url for r in records] == ["http://a.b/2"]
        assert [(d.reason, d.bytes_lost) for d in damage] == [("warc.record_too_large", len(big) - 4)]


def test_a_member_too_large_to_hold_back_is_streamed(
    tmp_path: Path, members: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warc, "WARC_CONTENT", dataclasses.replace(warc.WARC_CONTENT, hold_bytes=1000))
    records, damage = read(tmp_path / "x.warc.gz", b"".join(members))
    assert (len(records), damage) == (5, [])


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("Content-Encoding: gzip", gzip.compress(PAGE)),
        ("Content-Encoding: gzip", PAGE),  # says gzip and is plain, as all of ClueWeb09
        ("Content-Encoding: deflate", zlib.compress(PAGE)),
        ("Content-Encoding: deflate", PAGE),
        ("Content-Encoding: br", PAGE),
        ("Transfer-Encoding: chunked", b"5\r\n" + PAGE[:5] + b"\r\n2f;x=y\r\n" + PAGE[5:] + b"\r\n0\r\n\r\n"),
        ("Transfer-Encoding: chunked", PAGE),
    ],
)
def test_the_body_is_decoded_where_it_really_is_encoded(tmp_path: Path, headers: str, body: bytes) -> None:
    records, _ = read(tmp_path / "x.warc", response("u", body, headers=f"Content-Type: text/html\r\n{headers}"))
    assert records[0].html == PAGE


def test_a_body_that_does_not_decode_is_rejected_with_the_reason(tmp_path: Path) -> None:
    headers = "Content-Type: text/html\r\nContent-Encoding: gzip"
    records, _ = read(tmp_path / "x.warc", response("u", gzip.compress(unlike(1))[:-50], headers=headers))
    assert records[0].reject == "http.content_encoding"


def test_a_header_block_with_bare_line_feeds_keeps_the_whole_page(tmp_path: Path) -> None:
    block = b"HTTP/1.1 200 OK\nContent-Type: text/html; charset=EUC-JP\n\n<p>a: b\r\n\r\nc</p>"
    records, _ = read(tmp_path / "x.warc", warc_record("response", "u", block))
    assert records[0].html == b"<p>a: b\r\n\r\nc</p>"
    assert records[0].charset == "euc-jp"


def test_wet_gives_the_text_of_conversions(tmp_path: Path) -> None:
    data = warc_record("warcinfo", "", b"") + warc_record("conversion", "http://a.b/", "Füße".encode())
    data += warc_record("conversion", "http://a.b/2", b"\xff\xfe\xff")
    records, _ = read(tmp_path / "x.wet", data, wet=True)
    assert [(r.text, r.reject) for r in records] == [(None, "not_conversion"), ("Füße", ""), (None, "not_utf8")]


def test_zstd_frames_are_read_and_a_damaged_one_costs_itself_only(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    frames = [pack(response(f"http://a.b/{n}", unlike(n))) for n in range(5)]
    skippable = b"\x51\x2a\x4d\x18\x03\0\0\0abc"
    records, damage = read(tmp_path / "x.warc.zst", skippable + b"".join(frames))
    assert [r.url for r in records] == [f"http://a.b/{n}" for n in range(5)]
    assert damage == []
    for at in (0, 20, 400, len(frames[1]) - 2):
        broken = bytearray(frames[1])
        broken[at] ^= 0xFF
        records, damage = read(tmp_path / "x.warc.zst", frames[0] + bytes(broken) + b"".join(frames[2:]))
        assert [r.url for r in records] == [f"http://a.b/{n}" for n in (0, 2, 3, 4)]
        assert len(damage) == 1
        assert damage[0].offset + damage[0].bytes_lost == len(frames[0]) + len(frames[1])


def test_frames_that_need_a_dictionary_are_refused_by_name(tmp_path: Path) -> None:
    samples = [response(f"http://a.b/{n}", unlike(n)) for n in range(200)]
    dictionary = zstandard.train_dictionary(4096, samples)
    pack = zstandard.ZstdCompressor(dict_data=dictionary).compress
    with pytest.raises(DataError, match=r"x.warc.zst: the zstd frame at byte 0 needs dictionary \d+"):
        read(tmp_path / "x.warc.zst", pack(samples[0]) + pack(samples[1]))
    # One frame among others that need none is damage: one wrong bit in its header does that.
    plain = zstandard.ZstdCompressor().compress(response("http://a.b/1"))
    records, damage = read(tmp_path / "x.warc.zst", plain + pack(samples[0]) + plain)
    assert len(records) == 2
    assert [(d.reason, d.offset) for d in damage] == [("zstd.needs_dictionary", len(plain))]


@pytest.mark.parametrize("length", ["9", "999999", "99999999999"])
def test_a_content_length_that_leads_too_far_costs_one_record(tmp_path: Path, length: str) -> None:
    wrong = response("http://a.b/1").replace(b"Content-Length: ", f"Content-Length: {length}".encode())
    data = wrong + b"".join(response(f"http://a.b/{n}", unlike(n)) for n in (2, 3, 4))
    records, damage = read(tmp_path / "x.warc", data)
    assert [r.url for r in records] == [f"http://a.b/{n}" for n in (2, 3, 4)]
    assert len(damage) == 1
    assert damage[0].bytes_lost == len(wrong) - 4
