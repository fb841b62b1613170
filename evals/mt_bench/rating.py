"""A judgement's text -> its rating."""

from __future__ import annotations

import re

from evals.judge.ask import FAILED

_PATTERNS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
"""In this order. Source: FastChat, llm_judge/common.py."""
LOWEST, HIGHEST = 1.0, 10.0


def parse_rating(text: str) -> float:
    """The first `[[5]]`, else the first `[5]`; `FAILED` where there is none or it is not from 1 to 10."""
    for pattern in _PATTERNS:
        if found := pattern.search(text):
            rating = float(found.group(1))
            return rating if LOWEST <= rating <= HIGHEST else FAILED
    return FAILED
