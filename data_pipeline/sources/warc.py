"""Common Crawl archives: HTML pages from WARC responses, ready text from WET conversions."""

from __future__ import annotations

from fastwarc.warc import WarcRecord, WarcRecordType

from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.http_message import BodyError, parse_response
from data_pipeline.sources.record import RawRecord, Records
from data_pipeline.sources.streams import read_pieces
from data_pipeline.sources.warc_frames import WARC_CONTENT, frame_records

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})


def read_warc(shard: Shard) -> Records:
    """Every record of a WARC file, plain, .gz or .zst; only successful HTML responses have `html`, others a reason."""
    return _read(shard, wet=False)


def read_wet(shard: Shard) -> Records:
    """Every record of a WET file, plain, .gz or .zst; `conversion` records have `text`, the others a reason."""
    return _read(shard, wet=True)


def _read(shard: Shard, *, wet: bool) -> Records:
    ordinal = 0
    with open_file(shard.path) as file:
        for frame in frame_records(read_pieces(file, shard.path, WARC_CONTENT), shard.path):
            if isinstance(frame, Damage):
                yield frame
                continue
            try:
                record = WarcRecord.from_bytes(frame.data)
            except (OSError, ValueError):
                yield Damage(shard.path, frame.offset, "warc.bad_header", len(frame.data))
                continue
            yield _raw_record(record, ordinal, frame.position, wet=wet)
            ordinal += 1


def _raw_record(record: WarcRecord, ordinal: int, position: int, *, wet: bool) -> RawRecord:
    headers = record.headers
    raw = RawRecord(
        ordinal=ordinal,
        # Wget writes the address in angle brackets, following an error in the WARC 1.0 standard's grammar.
        url=(headers.get("WARC-Target-URI") or "").strip().removeprefix("<").removesuffix(">"),
        position=position,
    )
    date = headers.get("WARC-Date")
    if date:
        raw.meta["date"] = date
    if wet:
        _fill_from_conversion(raw, record)
    else:
        _fill_from_response(raw, record)
    return raw


def _fill_from_conversion(raw: RawRecord, record: WarcRecord) -> None:
    if record.record_type != WarcRecordType.conversion:
        raw.reject = "not_conversion"
        return
    try:
        raw.text = record.reader.read().decode("utf-8")
    except UnicodeDecodeError:
        raw.reject = "not_utf8"


def _fill_from_response(raw: RawRecord, record: WarcRecord) -> None:
    if record.record_type != WarcRecordType.response:
        raw.reject = "not_response"
        return
    response = parse_response(record.reader.read())
    if response is None:
        raw.reject = "not_http"
        return
    raw.content_type = response.content_type
    raw.charset = response.charset
    if not 200 <= response.status < 300:
        raw.reject = "http_status"
    elif response.content_type not in HTML_TYPES:
        raw.reject = "not_html"
    else:
        try:
            raw.html = response.body()
        except BodyError as error:
            raw.reject = str(error)
