"""The inputs of `megagpt bench data`, made from text that every machine with megagpt has: the installed packages."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import zstandard

from data_pipeline.document import Shard
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.warc import read_warc
from megagpt.errors import DataError

N_SHARDS = 4
EXACT_COPIES = 0.125
"""Copies a base document, as many again near copies. Source: research corpus of 24,000 + 3,000 + 3,000 documents."""
REPLACED_WORDS = 0.01
"""Share of the words of a near copy that are others."""

_ENDINGS = (".md", ".rst", ".txt", ".py")
_SHORTEST, _LONGEST = 1200, 7000
_SEED = 20_24


@dataclass(frozen=True)
class Corpus:
    """Documents with known duplicates in a folder of jsonl.zst shards."""

    folder: Path
    n_documents: int
    text_bytes: int
    exact_copies: frozenset[str]
    """Ids of documents that are a copy of another."""
    near_copies: frozenset[str]


def write_corpus(folder: Path, n_base: int) -> Corpus:
    """Base documents, exact copies and near copies, shuffled over N_SHARDS shards with `id` and `text`.

    Raises:
        DataError: the installed packages hold too little text.
    """
    rng = random.Random(_SEED)
    base = [text for text, _ in zip(installed_texts(), range(n_base), strict=False)]
    if len(base) < n_base:
        raise DataError(
            f"the installed packages hold {len(base)} pieces of text, {n_base} were asked for; ask for fewer"
        )
    n_copies = int(n_base * EXACT_COPIES)
    exact = [rng.choice(base) for _ in range(n_copies)]
    near = [_changed(rng.choice(base), rng) for _ in range(n_copies)]
    rows = [(f"base-{i}", text) for i, text in enumerate(base)]
    rows += [(f"exact-{i}", text) for i, text in enumerate(exact)]
    rows += [(f"near-{i}", text) for i, text in enumerate(near)]
    rng.shuffle(rows)
    write_shards(folder, rows)
    return Corpus(
        folder=folder,
        n_documents=len(rows),
        text_bytes=sum(len(text.encode()) for _, text in rows),
        exact_copies=frozenset(name for name, _ in rows if name.startswith("exact-")),
        near_copies=frozenset(name for name, _ in rows if name.startswith("near-")),
    )


def write_shards(folder: Path, rows: list[tuple[str, str]], n_shards: int = N_SHARDS) -> None:
    """(id, text) rows as jsonl.zst shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(n_shards):
        part = rows[shard * len(rows) // n_shards : (shard + 1) * len(rows) // n_shards]
        data = b"".join(orjson.dumps({"id": name, "text": text, "url": name}) + b"\n" for name, text in part)
        (folder / f"{shard:03d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=3).compress(data))


def read_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every row of the shards that `write_shards` wrote."""
    for path in sorted(folder.glob("*.jsonl.zst")):
        data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        for line in data.splitlines():
            row = orjson.loads(line)
            yield row["id"], row["text"]


def installed_texts() -> Iterator[str]:
    """Pieces of 1,200 to 7,000 characters, cut at blank lines, of the text and source files of installed packages.

    No text comes twice; the order is that of the sorted paths' hash, so that pieces of one package are not together.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted(path for path in root.rglob("*") if path.suffix in _ENDINGS)
    random.Random(_SEED).shuffle(files)
    seen: set[str] = set()
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        for piece in _pieces(text):
            if piece not in seen:
                seen.add(piece)
                yield piece


def copy_pages(archive: Path, folder: Path, times: int) -> tuple[int, list[str]]:
    """The pages of a WARC file `times` times, each copy a shard of its own.

    Returns:
        (pages in all, addresses of one copy).
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = archive.read_bytes()
    for number in range(times):
        (folder / f"{number:03d}.warc.gz").write_bytes(data)
    shard = Shard(0, "pages", "warc", str(archive), len(data))
    urls = [record.url for record in read_warc(shard) if isinstance(record, RawRecord) and not record.reject]
    return len(urls) * times, urls


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for block in text.split("\n\n"):
        if len(piece) + len(block) > _LONGEST and len(piece) >= _SHORTEST:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{block}" if piece else block
        if len(piece) > _LONGEST:
            piece = ""  # one block that is too long: a table of data, most likely
    if _SHORTEST <= len(piece) <= _LONGEST:
        yield piece


def _changed(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(max(1, round(len(words) * REPLACED_WORDS))):
        words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
    return " ".join(words)
