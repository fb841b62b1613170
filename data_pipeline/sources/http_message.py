"""The HTTP response inside a WARC record: status, headers, and the body as its author wrote it.

Parsed here and not by the WARC library because crawls hold header blocks that end in bare line feeds, where fastwarc
2.0 takes the beginning of the page for headers, and `Content-Encoding: gzip` before bodies that are already plain.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from io import BytesIO

import zstandard
from fastwarc.stream_io import BrotliReader

from data_pipeline.sources.record import MAX_RECORD_BYTES

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class BodyError(ValueError):
    """The body cannot be decoded; the message is the reason's name."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A parsed response; the body is still encoded."""

    status: int
    headers: dict[str, str]
    """Names in lower case; of repeated headers the first."""
    raw_body: bytes

    @property
    def content_type(self) -> str:
        """The media type without its parameters, in lower case; empty where none is given."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def charset(self) -> str:
        """The charset parameter of Content-Type; empty where none is given."""
        found = _CHARSET.search(self.headers.get("content-type", ""))
        return found[1].lower() if found else ""

    def body(self) -> bytes:
        """The body without chunking and compression, where it really has them.

        Raises:
            BodyError: it says and shows an encoding but does not decode, or it is larger than MAX_RECORD_BYTES.
        """
        body = self.raw_body
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            body = _dechunk(body)
        for encoding in reversed(self.headers.get("content-encoding", "").lower().split(",")):
            body = _decode(body, encoding.strip())
        return body


def parse_response(message: bytes) -> HttpResponse | None:
    """An HTTP message, or None where it does not begin with a status line."""
    status = _STATUS.match(message)
    if status is None:
        return None
    end = _HEAD_END.search(message)
    head, body = (message[: end.start()], message[end.end() :]) if end else (message, b"")
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return HttpResponse(int(status[1]), headers, body)


def _dechunk(body: bytes) -> bytes:
    """Join HTTP chunks; a body that does not begin with a chunk size was joined by the crawler already."""
    if not _CHUNK_SIZE.match(body):
        return body
    parts: list[bytes] = []
    at = 0
    while size_line := _CHUNK_SIZE.match(body, at):
        size = int(size_line[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[size_line.end() : size_line.end() + size])
        at = size_line.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1
    raise BodyError("http.chunks_cut_short")


def _decode(body: bytes, encoding: str) -> bytes:
    if encoding in ("gzip", "x-gzip") and body.startswith(_GZIP_MAGIC):
        return _inflate(body, 31)
    if encoding == "deflate" and body:
        return _inflate_deflate(body)
    if encoding == "zstd" and body.startswith(_ZSTD_MAGIC):
        return _read_bounded(zstandard.ZstdDecompressor().stream_reader(BytesIO(body)))
    if encoding == "br" and not _looks_like_markup(body):
        return _read_bounded(BrotliReader(BytesIO(body)))
    return body


def _inflate_deflate(body: bytes) -> bytes:
    """`deflate` means zlib, but some servers send the bare stream, and crawlers plain text."""
    if _looks_like_markup(body):
        return body
    try:
        return _inflate(body, zlib.MAX_WBITS)
    except BodyError:
        return _inflate(body, -zlib.MAX_WBITS)


def _looks_like_markup(body: bytes) -> bool:
    return body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def _inflate(body: bytes, window: int) -> bytes:
    inflater = zlib.decompressobj(window)
    try:
        plain = inflater.decompress(body, MAX_RECORD_BYTES)
    except zlib.error:
        raise BodyError("http.content_encoding") from None
    if inflater.unconsumed_tail:
        raise BodyError("http.body_too_large")
    if not inflater.eof:
        raise BodyError("http.content_encoding")
    return plain


def _read_bounded(reader: BrotliReader | zstandard.ZstdDecompressionReader) -> bytes:
    try:
        plain: bytes = reader.read(MAX_RECORD_BYTES + 1)
    except (OSError, ValueError, zstandard.ZstdError):
        raise BodyError("http.content_encoding") from None
    if len(plain) > MAX_RECORD_BYTES:
        raise BodyError("http.body_too_large")
    return plain
