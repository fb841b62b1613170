"""Writing WARC files whose bytes depend on their content alone."""

from __future__ import annotations

import uuid
import zlib
from types import TracebackType
from typing import BinaryIO

FIXED_DATE = "2000-01-01T00:00:00Z"
"""In place of the time of writing: the same pages give the same bytes."""


class WarcWriter:
    """Writes gzip-compressed WARC 1.1 records, a member each, to an open file."""

    def __init__(self, file: BinaryIO, software: str) -> None:
        self._file = file
        self._write("warcinfo", "", "application/warc-fields", f"software: {software}\r\n".encode())

    def add_page(self, url: str, html: str) -> None:
        """Append a successful HTTP response with an HTML page in UTF-8."""
        body = html.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
        self._write("response", url, "application/http; msgtype=response", head.encode() + body)

    def _write(self, kind: str, url: str, content_type: str, block: bytes) -> None:
        record_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{kind} {url}")
        lines = [
            "WARC/1.1",
            f"WARC-Type: {kind}",
            f"WARC-Record-ID: <urn:uuid:{record_id}>",
            f"WARC-Date: {FIXED_DATE}",
            *([f"WARC-Target-URI: {url}"] if url else []),
            f"Content-Type: {content_type}",
            f"Content-Length: {len(block)}",
        ]
        record = "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"
        compressor = zlib.compressobj(wbits=31)  # its gzip header carries no time
        self._file.write(compressor.compress(record) + compressor.flush())

    def __enter__(self) -> WarcWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
