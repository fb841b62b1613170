"""The tokenizer in a GGUF file as a tokenizer.json: byte-level BPE, whose parts stand there in full.

A GGUF file names the way in which text is cut into pieces; llama.cpp's code says what a name means. The names here are
those whose meaning is written down below; for any other one the model's own tokenizer.json must be given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megagpt.byte_bpe import byte_letters
from megagpt.errors import CheckpointError

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SINGLE_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
        {**_GPT2, "use_regex": False},
    ],
}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""tokenizer.ggml.pre -> how text is cut. Source: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe` and `load`."""
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")
"""A piece that is in the vocabulary is that token, whatever the merges say. Source: `ignore_merges` there."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_PREFIX = "tokenizer.ggml."


def rebuild_tokenizer(metadata: Mapping[str, Any], n_rows: int, where: str) -> str:
    """The text of a tokenizer.json.

    Control tokens become special ones, user-defined ones are found in a text like words. Where the file says that a
    text begins with its BOS, so does what `tokenizers` makes of it; megagpt adds nothing in either case.

    Args:
        metadata: of the GGUF file.
        n_rows: of the embedding: ids must be below.
        where: the file's path, for messages.

    Raises:
        CheckpointError: another kind of tokenizer, or one that contradicts itself.
    """
    for key, known in (("model", ("gpt2",)), ("pre", tuple(PRE_TOKENIZERS))):
        value = metadata.get(_PREFIX + key)
        if not isinstance(value, str) or value not in known:
            raise _cannot(where, key, f"is {_shown(value)}; only {', '.join(known)} can be rebuilt")
    tokens = _strings(metadata, "tokens", where)
    kinds = _kinds(metadata, tokens, where)
    if len(tokens) > n_rows:
        raise _cannot(where, "tokens", f"has {len(tokens)} tokens, the embedding {n_rows} rows")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise _cannot(where, "tokens", f"has {twice!r} twice")
    _check_spelling(tokens, kinds, where)
    pre = metadata[_PREFIX + "pre"]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], kind) for i, kind in enumerate(kinds) if kind not in (_NORMAL, _UNUSED)],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": _ends(metadata, tokens, where),
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": vocabulary,
            "merges": _merges(metadata, vocabulary, where),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _strings(metadata, "merges", where)]
    for rank, merge in enumerate(merges):
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise _cannot(where, "merges", f"has {' '.join(merge)!r} as number {rank}, which is no merge of two tokens")
    return merges


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> list[int]:
    found = metadata.get(_PREFIX + "token_type")
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or len(found) != len(tokens):
        raise _cannot(
            where, "token_type", f"is {_shown(found)}; a list of {len(tokens)} whole numbers, one a token, is"
        )
    kinds: list[int] = found.tolist()
    known = (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)
    for i, kind in enumerate(kinds):
        if kind not in known:
            raise _cannot(where, "token_type", f"says {kind} of token {i}, {tokens[i]!r}; known are {known}")
    return kinds


def _check_spelling(tokens: Sequence[str], kinds: Sequence[int], where: str) -> None:
    """Ordinary tokens are spelled in the letters that stand for bytes; others can be found in no text."""
    letters = byte_letters().keys()
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if not token or (kind == _NORMAL and not letters >= set(token)):
            raise _cannot(where, "tokens", f"has {token!r} as number {i}, which is not spelled in the letters of bytes")


def _added(i: int, token: str, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": token, **flags, "special": kind != _USER_DEFINED}


def _ends(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> dict[str, Any] | None:
    """What `tokenizers` adds before and behind a text, if the file asks for it."""
    bos, eos = (_end(metadata, name, tokens, where) for name in ("bos", "eos"))
    if bos is None and eos is None:
        return None

    def template(text: str, type_id: int) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": text, "type_id": type_id}}
        outer = [token and {"SpecialToken": {"id": token, "type_id": type_id}} for token in (bos, eos)]
        return [piece for piece in (outer[0], inner, outer[1]) if piece]

    added = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in (bos, eos) if token}
    single = template("A", 0)
    return {"type": "TemplateProcessing", "single": single, "pair": single + template("B", 1), "special_tokens": added}


def _end(metadata: Mapping[str, Any], name: str, tokens: Sequence[str], where: str) -> str | None:
    """The token that the file wants at one end of every text."""
    number, wanted = metadata.get(f"{_PREFIX}{name}_token_id"), metadata.get(f"{_PREFIX}add_{name}_token", False)
    if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
        raise _cannot(where, f"{name}_token_id", f"is {_shown(number)}; there are {len(tokens)} tokens")
    if type(wanted) is not bool or (wanted and number is None):
        raise _cannot(where, f"add_{name}_token", f"is {_shown(wanted)}, and {name}_token_id is {_shown(number)}")
    return tokens[number] if wanted and number is not None else None


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = metadata.get(_PREFIX + key)
    if not isinstance(value, list):
        raise _cannot(where, key, f"is {_shown(value)}; a list of strings is")
    return value


def _cannot(where: str, key: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {_PREFIX}{key} {problem[:400]}; give the model's own tokenizer.json with --tokenizer FILE"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return f"a list of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:200]
