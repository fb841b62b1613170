"""The main content of an HTML page as text."""

from __future__ import annotations

import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
_META_LOOKED_AT = 4096
"""Bytes; HTML wants the declaration within the first 1,024, pages are laxer."""
_CHARACTERS_A_DEFECT = 1000
"""One undecodable byte in so many characters is an accident; more of them, and the declaration is wrong."""
_MANY_BLANK_LINES = re.compile(r"\n{3,}")
_BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def extract_html(page: bytes, http_charset: str = "") -> str:
    """Text without menus, headers and footers; paragraphs apart by a blank line, code with its line breaks.

    Empty where the page has no text. Source: resiliparse's rule-based main content extraction, the extractor of DCLM
    (Li et al. 2024, section 4.2).
    """
    return tidy_lines(extract_plain_text(decode_page(page, http_charset), main_content=True))


def tidy_lines(text: str) -> str:
    """Without white space at the ends of lines and of the text, and with one blank line at most between paragraphs."""
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _MANY_BLANK_LINES.sub("\n\n", lines).strip()


def decode_page(page: bytes, http_charset: str = "") -> str:
    """A page as characters, in the charset that applies: byte order mark, HTTP header, meta element, detection.

    A declared charset in which the page does not decode, but for a few stray bytes, is not believed; the next one is
    tried. Source of the order: HTML standard, section 13.2.3.2.
    """
    for charset in (_byte_order_mark(page), http_charset, _meta_charset(page)):
        codec = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
        if codec is None:
            continue
        try:
            return page.decode(codec).removeprefix("\ufeff")
        except UnicodeDecodeError:
            text = page.decode(codec, "replace").removeprefix("\ufeff")
        if text.count("\ufffd") * _CHARACTERS_A_DEFECT <= len(text):
            return text
    detected: str = bytes_to_str(page, detect_encoding(page) or "utf-8", errors="replace")
    return detected


def _byte_order_mark(page: bytes) -> str:
    return next((charset for mark, charset in _BYTE_ORDER_MARKS if page.startswith(mark)), "")


def _meta_charset(page: bytes) -> str:
    found = _META_CHARSET.search(page, 0, _META_LOOKED_AT)
    # A page whose meta element could be read as ASCII is not UTF-16, whatever it says.
    charset = found[1].decode("ascii", "ignore").lower() if found else ""
    return "utf-8" if charset.startswith("utf-16") else charset
