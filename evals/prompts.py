"""lm-eval's building of requests, without compiling every template again for every document.

lm-eval 0.4.13 renders a prompt with `env.from_string(template).render(**doc)` (`utils.apply_template`); jinja2 keeps
no template that was made from a string: building MMLU's five-shot requests, it parses and compiles the same texts seven
times a document, which takes 97% of the time. A compiled template holds nothing of what it rendered, so one can be
kept: the requests are the same to the byte.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lm_eval.utils

MOST_TEMPLATES = 1024
"""Compiled templates that are kept; a task has about three."""


@contextmanager
def kept_templates() -> Iterator[None]:
    """Inside, lm-eval compiles each template once; outside, it is as it was."""
    original = lm_eval.utils.apply_template
    compiled = functools.lru_cache(MOST_TEMPLATES)(lm_eval.utils.env.from_string)

    def apply_template(template: str, doc: Mapping[str, Any]) -> str:
        text: str = compiled(template).render(**doc)
        return text

    lm_eval.utils.apply_template = apply_template
    try:
        yield
    finally:
        lm_eval.utils.apply_template = original
