"""The extractors by name, each as a function from a page's bytes and the HTTP header's charset to its text."""

from __future__ import annotations

import logging
from collections.abc import Callable

from data_pipeline.config import ExtractSection
from data_pipeline.extract.html import decode_page, extract_html, tidy_lines
from data_pipeline.extract.watchdog import PageRejected

Extractor = Callable[[bytes, str], str]

MAX_PAGE_BYTES = 8 * 2**20
"""Larger pages are rejected: parsed, a page takes 20 (resiliparse) to 70 (trafilatura) times its size. Common Crawl
cuts pages at 1 MiB, since 2025 at 5 MiB."""
_PAGES_BYTES_BETWEEN_RESETS = 32 * 2**20


def open_extractor(settings: ExtractSection) -> Extractor:
    """The extractor that the settings name; empty text where a page has none.

    The function raises PageRejected (`extract.too_large`) for a page over MAX_PAGE_BYTES, and whatever the library
    raises: call it through a Watchdog.
    """
    extract = _ENGINES[settings.engine]()

    def extract_bounded(page: bytes, http_charset: str) -> str:
        if len(page) > MAX_PAGE_BYTES:
            raise PageRejected("extract.too_large")
        return extract(page, http_charset)

    return extract_bounded


def _open_resiliparse() -> Extractor:
    return extract_html


def _open_trafilatura() -> Extractor:
    """Source: Barbaresi 2021, "Trafilatura"; `fast` leaves out the fallback to other extractors.

    Its duplicate detection, which remembers earlier pages, stays off: a page's text is a function of the page.
    """
    import trafilatura  # here and not above: it takes a tenth of a second and other engines do without
    from lxml import etree, html
    from trafilatura.meta import reset_caches
    from trafilatura.utils import HTML_PARSER

    # By default lxml.html asks a Python function for the class of each element it touches, a sixth of the whole time.
    HTML_PARSER.set_element_class_lookup(
        etree.ElementDefaultClassLookup(
            element=html.HtmlElement,
            comment=html.HtmlComment,
            pi=html.HtmlProcessingInstruction,
            entity=html.HtmlEntity,
        )
    )
    # A page that it cannot make sense of has no text, which is counted; it need not be said on stderr as well.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    n_bytes = 0

    def extract(page: bytes, http_charset: str) -> str:
        nonlocal n_bytes
        n_bytes += len(page)
        if n_bytes > _PAGES_BYTES_BETWEEN_RESETS:
            # Its caches hold whole lines of pages: bounded in number, not in size.
            reset_caches()
            n_bytes = len(page)
        text = trafilatura.extract(
            decode_page(page, http_charset), fast=True, include_comments=False, deduplicate=False, with_metadata=False
        )
        return tidy_lines(text or "")

    return extract


_ENGINES: dict[str, Callable[[], Extractor]] = {"resiliparse": _open_resiliparse, "trafilatura": _open_trafilatura}
