"""Writing WARC files whose bytes depend on their content alone."""

from __future__ import annotations

import uuid
import zlib
from typing import BinaryIO

FIXED_DATE = "2000-01-01T00:00:00Z"
"""In place of the time of writing: the same pages give the same bytes."""


class WarcWriter:
    """Writes gzip-compressed WARC 1.1 records, a member each, to an open file, which stays the caller's to close."""

    def __init__(self, file: BinaryIO, name: str, software: str) -> None:
        """Begin the file, which is called `name`, by a record that says what wrote it."""
        self._file = file
        content = f"software: {software}\r\n".encode()
        self._write("warcinfo", ("WARC-Filename", name), "application/warc-fields", content)

    def add_page(self, url: str, html: str) -> None:
        """Append a successful HTTP response with an HTML page in UTF-8."""
        body = html.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
        self._write("response", ("WARC-Target-URI", url), "application/http; msgtype=response", head.encode() + body)

    def _write(self, kind: str, subject: tuple[str, str], content_type: str, block: bytes) -> None:
        field, value = subject
        record_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{kind} {value}")
        lines = [
            "WARC/1.1",
            f"WARC-Type: {kind}",
            f"WARC-Record-ID: <urn:uuid:{record_id}>",
            f"WARC-Date: {FIXED_DATE}",
            f"{field}: {value}",
            f"Content-Type: {content_type}",
            f"Content-Length: {len(block)}",
        ]
        record = "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"
        compressor = zlib.compressobj(wbits=31)  # its gzip header carries no time
        self._file.write(compressor.compress(record) + compressor.flush())
