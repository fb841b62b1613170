r"""A byte-level BPE of Hugging Face `tokenizers` as a tiktoken encoding: the same ids, about four times faster.

Both merge the pair of lowest rank first, leftmost first. tiktoken ranks a pair by the bytes that it makes, `tokenizers`
by the two tokens that it is made of. These are the same if tokens are numbered in the order of merges and every token's
own bytes are encoded as that token: then no other two tokens that spell it can meet. (Whether two tokens can stand side
by side depends on nothing around them, at every stage of merging; and a token's bytes, merged as far as the merge
before its own, are the two tokens of its merge.) Both conditions are checked for every token; where one does not hold,
or the file asks for anything that is not known here, there is no such encoding and `tokenizers` does the work.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++"
_SIGNS = r" ?[^\s\p{L}\p{N}]++"
# Numbers are cut out first: the white space before one is as if it stood at the end of a text, one piece.
_SPACES = r"\s++(?=\p{N}|$)|\s+(?!\S)|\s"
GPT2_PATTERN = rf"{_WORDS}| ?\p{{N}}++|{_SIGNS}|\s++$|\s+(?!\S)|\s"
"""tiktoken's own form of GPT-2's."""
SINGLE_DIGITS_PATTERN = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
THREE_DIGITS_PATTERN = rf"{_WORDS}|\p{{N}}{{1,3}}+|{_SIGNS}|{_SPACES}"
_PATTERNS: tuple[tuple[Any, str], ...] = (
    (_BYTE_LEVEL, GPT2_PATTERN),
    ([{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL], SINGLE_DIGITS_PATTERN),
    (
        [
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
            _BYTE_LEVEL,
        ],
        THREE_DIGITS_PATTERN,
    ),
)
"""How text is cut into pieces, in a tokenizer.json and for tiktoken."""

_PLAIN_MODEL = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}


def equal_encoding(tokenizer: Any) -> Any | None:
    """The `tiktoken.Encoding` that gives every text the ids that `tokenizer` gives it, special tokens' names as text.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with `encode_special_tokens` set.

    Returns:
        None where there is none, or none that can be shown to be equal.
    """
    import tiktoken

    content = json.loads(tokenizer.to_str())
    pattern = _pattern_of(content["pre_tokenizer"])
    added = content["added_tokens"]
    model = {key: content["model"].get(key) or value for key, value in _PLAIN_MODEL.items()}
    if pattern is None or content["normalizer"] is not None or model != _PLAIN_MODEL:
        return None
    if not added or not all(token["special"] for token in added):
        return None
    ranks = _ranks(content["model"], {token["content"] for token in added})
    if ranks is None or not _each_is_its_own_encoding(tokenizer.model, content["model"]["merges"]):
        return None
    specials = {token["content"]: token["id"] for token in added}
    return tiktoken.Encoding("byte_bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _pattern_of(splitting: Mapping[str, Any] | None) -> str | None:
    if splitting is None:
        return None
    parts = splitting["pretokenizers"] if splitting["type"] == "Sequence" else splitting

    def without_offsets(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != "trim_offsets"}

    known = list(map(without_offsets, parts)) if isinstance(parts, list) else without_offsets(parts)
    return next((pattern for form, pattern in _PATTERNS if form == known), None)


def _ranks(model: Mapping[str, Any], specials: set[str]) -> dict[bytes, int] | None:
    """Bytes of each token -> id; None if ids do not follow the merges, or a token is neither byte nor merge."""
    letters = byte_letters()
    vocabulary: dict[str, int] = model["vocab"]
    made = [left + right for left, right in model["merges"]]
    ordinary = vocabulary.keys() - specials
    ids = [vocabulary.get(token, -1) for token in made]
    rising = all(before < after for before, after in itertools.pairwise(ids))
    if not rising or len(set(made)) != len(made) or ordinary != {*letters, *made}:
        return None
    return {bytes(letters[letter] for letter in token): vocabulary[token] for token in ordinary}


def _each_is_its_own_encoding(model: Any, merges: list[list[str]]) -> bool:
    return all(len(model.tokenize(left + right)) == 1 for left, right in merges)


def byte_letters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary. Source: GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
