"""All shards' tokens -> NAME_train and NAME_val, documents globally shuffled, and manifest.json.

Order and split are pure functions of (seed, document): no worker, shard boundary or earlier run changes them. The order
is the sorted order of a keyed hash of the ids; a document is validation if a keyed hash of its normalised text
falls below val_fraction, so copies of a text can never lie on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.config import PackSection
from data_pipeline.dedup.minhash import UInt64Array, mix64
from data_pipeline.encode import DOCUMENTS_FILE, TOKENS_PREFIX
from data_pipeline.tasks import Counts, Progress, hash_json
from megagpt.data.indexed import TokenFile, TokenFileWriter, token_dtype
from megagpt.data.manifest import Manifest, describe_file, write_manifest
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

SPLITS = ("train", "val")

_ORDER_SALT, _SPLIT_SALT = 0x6F72646572, 0x73706C6974
_REPORT_EVERY = 1000


@dataclass(frozen=True)
class DocumentTable:
    """One row for every document of the job, 44 bytes each: all that is held in memory."""

    doc_id: NDArray[np.int64]
    shard: NDArray[np.int32]
    """Position in the list of shard folders."""
    row: NDArray[np.int64]
    """Position in the shard's token file."""
    text_bytes: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    is_val: NDArray[np.bool_]


def shuffled(doc_ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Positions of `doc_ids` in shuffled order, the same however the ids were ordered before."""
    keys = mix64(doc_ids.astype(np.uint64) ^ _salt(seed, _ORDER_SALT))
    return np.lexsort((doc_ids, keys))


def in_validation(hash_high: UInt64Array, hash_low: UInt64Array, seed: int, val_fraction: float) -> NDArray[np.bool_]:
    """Which documents are validation, by the content hash of each."""
    keys = mix64(hash_low ^ mix64(hash_high ^ _salt(seed, _SPLIT_SALT)))
    # The upper 53 bits as a fraction of 1, exactly.
    fraction = (keys >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return np.asarray(fraction < val_fraction, np.bool_)


def write_packed(
    folder: Path,
    shards: Sequence[Path],
    sources: Sequence[str],
    vocab_size: int,
    settings: PackSection,
    progress: Progress | None = None,
) -> Counts:
    """Write both pairs of token files.

    Args:
        folder: where to.
        shards: folders of encoded shards.
        sources: name of the source of each.
        vocab_size: of the tokenizer; decides the type of the tokens.
        settings: name, seed, split.
        progress: called with bytes of text and documents.

    Raises:
        DataError: a split would be empty.
    """
    table = _read_documents(shards, settings)
    _check_splits(table.is_val, settings)
    token_files = [TokenFile.open(shard / TOKENS_PREFIX) for shard in shards]
    order = shuffled(table.doc_id, settings.seed)
    detail: dict[str, Any] = {}
    for split in SPLITS:
        chosen = order[table.is_val[order] == (split == "val")]
        with TokenFileWriter(folder / f"{settings.name}_{split}", token_dtype(vocab_size)) as writer:
            for start in range(0, len(chosen), _REPORT_EVERY):
                part = chosen[start : start + _REPORT_EVERY]
                for i in part:
                    writer.add_document(token_files[table.shard[i]].document(int(table.row[i])))
                if progress is not None:
                    progress(int(table.text_bytes[part].sum()), len(part))
            n_tokens = writer.n_tokens
        detail[split] = _describe_split(table, chosen, sources, n_tokens)
    n_documents = sum(detail[split]["documents"] for split in SPLITS)
    return Counts(len(table.doc_id), n_documents, detail=detail)


def write_manifest_of(
    folder: Path,
    job_folder: Path,
    name: str,
    splits: dict[str, Any],
    tokenizer_spec: str,
    job: dict[str, Any],
    progress: Progress | None = None,
) -> Counts:
    """Write manifest.json for the packed files.

    Args:
        folder: where to.
        job_folder: where the token files lie.
        name: prefix of the token files.
        splits: the detail of `write_packed`.
        tokenizer_spec: what `open_tokenizer` opens.
        job: the configuration, without what cannot change the tokens.
        progress: called with bytes of the token files.
    """
    files = {
        f"{name}_{split}": describe_file(
            job_folder / f"{name}_{split}", text_bytes=values["text_bytes"], sources=values["sources"]
        )
        for split, values in splits.items()
    }
    tokenizer = open_tokenizer(tokenizer_spec).describe()
    write_manifest(folder, Manifest(tokenizer=tokenizer, files=files, job=job, job_hash=hash_json(job)))
    if progress is not None:
        progress(sum(entry.bin.bytes for entry in files.values()), 0)
    n_documents = sum(entry.n_documents for entry in files.values())
    return Counts(n_documents, n_documents)


def _salt(seed: int, purpose: int) -> np.uint64:
    # Two's complement, so that every int64 seed is good; seeds beyond are taken modulo 2**64.
    value = np.array([(seed ^ (purpose << 16)) % (1 << 64)], np.uint64)
    return np.uint64(mix64(value)[0])


def _read_documents(shards: Sequence[Path], settings: PackSection) -> DocumentTable:
    tables = [pq.read_table(shard / DOCUMENTS_FILE) for shard in shards]

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([table.column(name).to_numpy() for table in tables])

    is_val = in_validation(column("hash_high"), column("hash_low"), settings.seed, settings.val_fraction)
    return DocumentTable(
        doc_id=column("doc_id"),
        shard=np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables]),
        row=np.concatenate([np.arange(len(table), dtype=np.int64) for table in tables]),
        text_bytes=column("text_bytes"),
        n_tokens=column("n_tokens"),
        is_val=is_val,
    )


def _check_splits(is_val: NDArray[np.bool_], settings: PackSection) -> None:
    n, n_val = len(is_val), int(is_val.sum())
    if n == 0:
        raise DataError(
            "no document is left after filters and deduplication, so there is nothing to pack; "
            "`megagpt data status` shows which rule rejected them"
        )
    if n_val in (0, n):
        empty, fix = ("validation", "raise") if n_val == 0 else ("training", "lower")
        raise DataError(
            f"pack.val_fraction = {settings.val_fraction} of {n} documents leaves the {empty} split empty; "
            f"{fix} pack.val_fraction, choose another pack.seed or add documents"
        )


def _describe_split(
    table: DocumentTable, chosen: NDArray[np.int64], sources: Sequence[str], n_tokens: int
) -> dict[str, Any]:
    """Documents, tokens and text bytes of a split, whole and by source."""
    by_source: dict[str, dict[str, int]] = {}
    by_shard = {name: np.zeros(len(sources), np.int64) for name in ("documents", "tokens", "text_bytes")}
    for name, amounts in (
        ("documents", 1),
        ("tokens", table.n_tokens[chosen]),
        ("text_bytes", table.text_bytes[chosen]),
    ):
        np.add.at(by_shard[name], table.shard[chosen], amounts)
    for shard, source in enumerate(sources):
        values = by_source.setdefault(source, dict.fromkeys(by_shard, 0))
        for name, amounts_of in by_shard.items():
            values[name] += int(amounts_of[shard])
    return {
        "documents": len(chosen),
        "tokens": n_tokens,
        "text_bytes": int(table.text_bytes[chosen].sum()),
        "sources": by_source,
    }
