"""Archives of other projects, with the numbers that two other readers count in them."""

from collections import Counter
from pathlib import Path

import pytest
from fastwarc.warc import WarcRecord

from data_pipeline.document import Damage, Shard
from data_pipeline.extract.html import extract_html
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.streams import read_pieces
from data_pipeline.sources.warc import read_warc, read_wet
from data_pipeline.sources.warc_frames import WARC_CONTENT, frame_records

WEB = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "web"
pytestmark = pytest.mark.skipif(not WEB.is_dir(), reason=f"no sample archives in {WEB}")


def record_types(name: str) -> tuple[Counter[str], list[Damage]]:
    path = str(WEB / name)
    types: Counter[str] = Counter()
    damage = []
    with Path(path).open("rb") as file:
        for frame in frame_records(read_pieces(file, path, WARC_CONTENT), path):
            if isinstance(frame, Damage):
                damage.append(frame)
            else:
                types[str(WarcRecord.from_bytes(frame.data).record_type)] += 1
    return types, damage


def read(name: str) -> list[RawRecord]:
    shard = Shard(0, "web", "warc", str(WEB / name), 0)
    found = list(read_wet(shard) if ".wet." in name else read_warc(shard))
    return [record for record in found if isinstance(record, RawRecord)]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("whirlwind.warc.gz", {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1}),
        ("whirlwind.warc.wet.gz", {"warcinfo": 1, "conversion": 1}),
        ("sample-0000.warc.gz", {"warcinfo": 1, "request": 22, "response": 22, "metadata": 1, "resource": 2}),
        ("sample-0001.warc.gz", {"warcinfo": 1, "request": 15, "response": 15, "metadata": 1, "resource": 2}),
        ("chatnoir.warc.gz", {"warcinfo": 1, "request": 17, "response": 16, "metadata": 16}),
        ("pages.warc.gz", {"response": 496}),
        ("damaged/clueweb-quirk.warc.gz", {"warcinfo": 1, "response": 29}),
        ("damaged/block-sized-records.warc.gz", {"unknown": 3}),
        ("damaged/example-bad-non-chunked.warc.gz", {"warcinfo": 2, "response": 1, "request": 2, "revisit": 1}),
        ("damaged/example-bad.warc.gz.bad", {"warcinfo": 1, "response": 2, "request": 2, "revisit": 1}),
        ("damaged/example-wrong-chunks.warc.gz", {"response": 1, "request": 1}),
        (
            "damaged/example-wget-bad-target-uri.warc.gz",
            {"warcinfo": 1, "request": 1, "response": 1, "metadata": 1, "resource": 2},
        ),
    ],
)
def test_every_archive_has_the_records_that_others_count(name: str, counts: dict[str, int]) -> None:
    if not (WEB / name).is_file():
        pytest.skip(f"no {name}")
    assert record_types(name) == (Counter(counts), [])


def test_the_clipped_archive_is_reported_where_others_end_in_silence() -> None:
    types, damage = record_types("damaged/clipped.warc.gz")
    assert types == {}
    assert [(d.reason, d.offset, d.bytes_lost) for d in damage] == [("gzip.truncated", 0, 18_184)]


def test_nearly_every_real_page_gives_text() -> None:
    texts = [extract_html(r.html, r.charset) for r in read("pages.warc.gz") if not r.reject]
    assert len(texts) == 496
    assert sum(bool(text) for text in texts) >= 490


def test_wgets_bracketed_addresses_are_plain_afterwards() -> None:
    addresses = [r.url for r in read("sample-0000.warc.gz") if not r.reject]
    assert len(addresses) == 22
    assert all(address.startswith("http") and not address.endswith(">") for address in addresses)


def test_japanese_pages_that_claim_to_be_gzip_are_read_as_they_are() -> None:
    pages = [extract_html(r.html, r.charset) for r in read("damaged/clueweb-quirk.warc.gz") if not r.reject]
    assert len(pages) == 29
    assert sum("ー" in page and "\ufffd" not in page for page in pages) >= 25
