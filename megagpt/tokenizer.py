"""Text to token ids and back: tiktoken's encodings and Hugging Face `tokenizers` files behind one protocol.

Whatever a text says, it never makes the separator between documents: the letters `<|endoftext|>` in a
document are encoded as letters. Only `eot_id`, appended by whoever packs documents, ends one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megagpt.atomic import write_file
from megagpt.byte_bpe import equal_encoding
from megagpt.errors import DataError, unread

_OPENAI = "https://openaipublic.blob.core.windows.net"
TIKTOKEN_SOURCES = {
    "gpt2": (f"{_OPENAI}/gpt-2/encodings/main/vocab.bpe", f"{_OPENAI}/gpt-2/encodings/main/encoder.json"),
    "cl100k_base": (f"{_OPENAI}/encodings/cl100k_base.tiktoken",),
    "o200k_base": (f"{_OPENAI}/encodings/o200k_base.tiktoken",),
}
"""Encoding -> the files that tiktoken loads it from; in its cache a file is named by the sha1 of its address."""
TIKTOKEN_NAMES = tuple(TIKTOKEN_SOURCES)
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What the end of a document is called, by GPT-2, GPT-NeoX and Qwen; Llama 3; Llama 1 and 2; Gemma.

The first one that a tokenizer has counts."""

HF_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tiktoken.json"
SAVED_FOLDER = "tokenizer"
"""Where a data job saves its tokenizer, beside manifest.json."""

TokenArray = npt.NDArray[np.uint32]


class Tokenizer(Protocol):
    """What the rest of megagpt knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""

    @property
    def eot_id(self) -> int:
        """The token that separates documents."""

    @property
    def fingerprint(self) -> str:
        """xxh3_128 of all that decides which ids a text gets, wherever the tokenizer lies."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no token is added at either end and none of them is `eot_id`.

        Raises:
            DataError: the text holds half of a surrogate pair, which no tokenizer can encode.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster where the tokenizer can."""

    def encode_batch_numpy(self, texts: Sequence[str]) -> list[TokenArray]:
        """`encode` of each text as an array, (n_tokens,) each: no Python number is made where the tokenizer can."""

    @property
    def tiktoken_encoding(self) -> Any | None:
        """A `tiktoken.Encoding` that gives every text the ids that `encode` gives it; None: there is none."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, special tokens their names.

        Raises:
            DataError: there is no token of that id.
        """

    def describe(self) -> dict[str, Any]:
        """What a manifest says about it: kind, name or file, vocab_size, eot_id, fingerprint."""

    def save(self, folder: Path) -> Path:
        """Write it into `folder`, so that `open_tokenizer(folder)` needs nothing else; returns the file."""


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """Open a tiktoken encoding by name, a Hugging Face tokenizer.json, or a folder that `save` wrote.

    Raises:
        DataError: there is nothing of that name, the file is damaged, or it has no end-of-text token.
    """
    if spec in TIKTOKEN_NAMES:
        return TiktokenTokenizer(_load_tiktoken(str(spec)))
    path = Path(spec)
    if path.is_dir():
        path = _file_in(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise DataError(
            f"tokenizer '{spec}' is neither a file nor a folder, nor one of {', '.join(TIKTOKEN_NAMES)} (tiktoken)"
        ) from None
    except OSError as error:
        raise unread(error, DataError, f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer file, which is JSON: {error}") from None
    if isinstance(content, dict) and content.get("kind") == "tiktoken":
        return TiktokenTokenizer(_parse_tiktoken(path, content))
    return HFTokenizer(text, path)


def open_recorded_tokenizer(folder: Path, described: Mapping[str, Any]) -> Tokenizer:
    """Open the tokenizer that token files in `folder` were made with.

    It is looked for in folder/tokenizer, then in the folder itself; a tiktoken encoding that is in neither is
    loaded by its name.

    Args:
        folder: of the token files and their manifest.json.
        described: what the manifest says of the tokenizer, made by `Tokenizer.describe`.

    Raises:
        DataError: it is not there, or it is another one than the manifest describes.
    """
    name = TIKTOKEN_FILE if described.get("kind") == "tiktoken" else str(described.get("file", HF_FILE))
    places = [folder / SAVED_FOLDER / name, folder / name]
    saved = next((path for path in places if path.is_file()), None)
    if saved is None and described.get("kind") != "tiktoken":
        raise DataError(
            f"{folder}: the manifest names a tokenizer, but neither {SAVED_FOLDER}/{name} nor {name} is there; "
            "copy it beside the token files, or name it with data.tokenizer"
        )
    tokenizer = open_tokenizer(saved or str(described.get("name")))
    if tokenizer.fingerprint != described.get("fingerprint"):
        raise DataError(
            f"{saved or described.get('name')}: tokenizer with fingerprint {tokenizer.fingerprint}, but the manifest "
            f"in {folder} says that the tokens were made with {described.get('fingerprint')}"
        )
    return tokenizer


class TiktokenTokenizer:
    """A `tiktoken.Encoding`."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        if not set(EOT_TOKENS) & set(encoding._special_tokens):
            raise DataError(_no_eot(f"tiktoken encoding {encoding.name}", sorted(encoding._special_tokens)))

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return int(self._encoding.n_vocab)

    @property
    def eot_id(self) -> int:
        """The token that separates documents."""
        specials: dict[str, int] = self._encoding._special_tokens
        return next(specials[token] for token in EOT_TOKENS if token in specials)

    @functools.cached_property
    def fingerprint(self) -> str:
        """xxh3_128 of pattern, special tokens and ranks."""
        ranks = sorted((rank, token.hex()) for token, rank in self._encoding._mergeable_ranks.items())
        specials = sorted(self._encoding._special_tokens.items())
        return _hash(["tiktoken", self._encoding._pat_str, specials, ranks])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which special tokens' names are ordinary text."""
        _check_unicode(text)
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in this thread: data jobs run one process a core already."""
        return [self.encode(text) for text in texts]

    def encode_batch_numpy(self, texts: Sequence[str]) -> list[TokenArray]:
        """`encode` of each text as uint32, copied from tiktoken's own buffer."""
        return _encode_to_numpy(self._encoding, texts)

    @property
    def tiktoken_encoding(self) -> Any:
        """The encoding itself."""
        return self._encoding

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        try:
            text: str = self._encoding.decode(list(ids), errors="replace")
        except (KeyError, OverflowError):
            raise DataError(_no_such_token(ids, self._known_ids(), self.vocab_size)) from None
        return text

    def describe(self) -> dict[str, Any]:
        """What a manifest says about it."""
        return {"kind": "tiktoken", "name": self._encoding.name, **_facts(self)}

    def save(self, folder: Path) -> Path:
        """Write pattern, ranks and special tokens: reading it needs no network and no cache of tiktoken's."""
        ranks = sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])
        content = {
            "kind": "tiktoken",
            "name": self._encoding.name,
            "pattern": self._encoding._pat_str,
            "special_tokens": self._encoding._special_tokens,
            "ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
        }
        path = folder / TIKTOKEN_FILE
        write_file(path, json.dumps(content, indent=0).encode())
        return path

    def _known_ids(self) -> set[int]:
        return {*self._encoding._mergeable_ranks.values(), *self._encoding._special_tokens.values()}


class HFTokenizer:
    """A tokenizer.json of Hugging Face `tokenizers`, without its truncation, padding, BOS and EOS."""

    def __init__(self, text: str, path: Path) -> None:
        """Read the content of the file at `path`, which errors name."""
        from tokenizers import Tokenizer as RustTokenizer

        try:
            tokenizer = RustTokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise DataError(f"{path}: not a tokenizer.json that `tokenizers` can read: {error}") from error
        tokenizer.no_truncation()  # it would cut documents without a word
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens' names in a text are ordinary text
        self._text = text
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._ids = set(self._vocabulary.values())
        name = next((token for token in EOT_TOKENS if token in self._vocabulary), None)
        if name is None:
            specials = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
            raise DataError(_no_eot(str(path), specials))
        self._eot_id = self._vocabulary[name]
        self._check_separator(name, path)

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return max(self._ids) + 1

    @property
    def eot_id(self) -> int:
        """The token that separates documents."""
        return self._eot_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """xxh3_128 of normaliser, pre-tokeniser, model and added tokens, however the file spells merges."""
        content = json.loads(self._tokenizer.to_str())
        model = content["model"]
        merges = model.get("merges", [])
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return _hash([content[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which special tokens' names are ordinary text."""
        _check_unicode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on as many threads as `tokenizers` uses."""
        for text in texts:
            _check_unicode(text)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_batch_numpy(self, texts: Sequence[str]) -> list[TokenArray]:
        """`encode` of each text as uint32; a plain byte-level BPE through tiktoken, which is several times faster."""
        if self.tiktoken_encoding is None:
            return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]
        return _encode_to_numpy(self.tiktoken_encoding, texts)

    @functools.cached_property
    def tiktoken_encoding(self) -> Any | None:
        """An equal encoding of tiktoken's; None: there is none that can be shown to be equal."""
        return equal_encoding(self._tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        if not self._ids.issuperset(ids):
            raise DataError(_no_such_token(ids, self._ids, self.vocab_size))
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def describe(self) -> dict[str, Any]:
        """What a manifest says about it; `file` is the name that `save` gives it."""
        return {"kind": "hf", "file": HF_FILE, **_facts(self)}

    def save(self, folder: Path) -> Path:
        """Write the file as it was read."""
        path = folder / HF_FILE
        write_file(path, self._text.encode())
        return path

    def _check_separator(self, name: str, path: Path) -> None:
        for text in (name, f"a {name} b", f"a{name}b", f"\n{name}\n"):
            if self._eot_id in self.encode(text):
                raise DataError(
                    f"{path}: the text {text!r} is encoded with the separator's own id {self._eot_id}, so a "
                    f'document that mentions {name} would be cut in two; mark the added token as "special": true'
                )


def _encode_to_numpy(encoding: Any, texts: Sequence[str]) -> list[TokenArray]:
    """By a `tiktoken.Encoding`, special tokens' names as text."""
    for text in texts:
        _check_unicode(text)
    return [encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=()) for text in texts]


def _file_in(folder: Path) -> Path:
    found = [folder / name for name in (HF_FILE, TIKTOKEN_FILE) if (folder / name).is_file()]
    if len(found) != 1:
        holds = " and ".join(path.name for path in found) or "neither"
        raise DataError(f"{folder}: a tokenizer's folder holds {HF_FILE} or {TIKTOKEN_FILE}, this one {holds}")
    return found[0]


def _load_tiktoken(name: str) -> Any:
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a damaged file
        files = " and ".join(
            f"{hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()} (from {source})"
            for source in TIKTOKEN_SOURCES[name]
        )
        raise DataError(
            f"tiktoken cannot load '{name}': {error}. Without a network, set TIKTOKEN_CACHE_DIR to a folder that "
            f"holds {files}, as one does that tiktoken filled on another machine; or name a folder with a "
            f"{TIKTOKEN_FILE} that was saved there"
        ) from None


def _parse_tiktoken(path: Path, content: dict[str, Any]) -> Any:
    import tiktoken

    try:
        return tiktoken.Encoding(
            content["name"],
            pat_str=content["pattern"],
            mergeable_ranks={base64.b64decode(token): rank for token, rank in content["ranks"].items()},
            special_tokens=content["special_tokens"],
        )
    except KeyError as error:
        raise DataError(f"{path}: key {error} is missing; expected name, pattern, ranks, special_tokens") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a {TIKTOKEN_FILE} that megagpt wrote: {error}") from None


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "fingerprint": tokenizer.fingerprint,
    }


def _hash(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds {text[error.start]!r} at character {error.start}: half of a surrogate pair is no "
            "character; replace it before encoding"
        ) from None


def _no_eot(where: str, specials: Sequence[str]) -> str:
    return (
        f"{where}: has no end-of-text token to separate documents; one of {', '.join(EOT_TOKENS)} is "
        f"accepted, its special tokens are {', '.join(specials) or 'none'}"
    )


def _no_such_token(ids: Sequence[int], known: set[int], vocab_size: int) -> str:
    bad = next(i for i in ids if i not in known)
    return f"token id {bad} is not in the tokenizer, whose vocabulary size is {vocab_size}"
