r"""Tables over all Unicode code points that compiled kernels look characters up in.

They are made from Python's own regular expressions and `str.lower`, so that a kernel and a pattern agree on every
character.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray

N_CODE_POINTS = 0x110000

_WORD_RUNS = re.compile(r"\w+")


@functools.cache
def is_word_character() -> NDArray[np.bool_]:
    r"""Whether `\w` matches, by code point; (0x110000,), read only."""
    table = np.zeros(N_CODE_POINTS, np.bool_)
    for run in _WORD_RUNS.finditer(_all_characters()):
        table[run.start() : run.end()] = True
    table.flags.writeable = False
    return table


@functools.cache
def lower_case() -> NDArray[np.uint32]:
    """The lower case of each character by itself, by code point; (0x110000,), read only.

    Two characters differ from `str.lower`: the Turkish capital I with a dot becomes a plain i (of the two characters
    that Unicode has for it, the second is no word character and would cut the word), and the final sigma becomes the
    ordinary one, which needs no look at the neighbours.
    """
    # With these three out of the way no other lower case depends on its neighbours or is longer than one character.
    characters = _all_characters().replace("\u0130", "i").replace("\u03a3", "\u03c3").replace("\u03c2", "\u03c3")
    return np.frombuffer(characters.lower().encode("utf-32-le", "surrogatepass"), "<u4")


@functools.cache
def word_lower_case() -> NDArray[np.uint32]:
    r"""`lower_case` where `\w` matches and 0 elsewhere: one look-up for both; (0x110000,), read only."""
    table = np.where(is_word_character(), lower_case(), np.uint32(0))
    table.flags.writeable = False
    return table


@functools.cache
def _all_characters() -> str:
    return np.arange(N_CODE_POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
