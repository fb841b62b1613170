"""Per shard: the tokens of every document that stays, in the shard's order.

tokens.bin/.idx      one sequence a document, the end-of-text token last
documents.parquet    doc_id, hash_high, hash_low, text_bytes, n_tokens, source: what packing needs to know
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.signatures import utf8_of
from data_pipeline.fast_bpe import FastBpe
from data_pipeline.histogram import in_order, size_classes
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress, hash_file
from megagpt.data.indexed import TokenFileWriter, token_dtype
from megagpt.errors import DataError
from megagpt.tokenizer import TokenArray, Tokenizer, open_tokenizer

TEXTS_FILE, HASHES_FILE = "docs.parquet", "hashes.parquet"
"""What the stage before wrote: texts, and content hashes in the same order."""
TOKENS_PREFIX = "tokens"
ENCODED_FILE = "documents.parquet"
ENCODED_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
        ("text_bytes", pa.int64()),
        ("n_tokens", pa.int64()),
        ("source", pa.string()),
    ]
)

_BATCH_DOCUMENTS = 256
_GROUP_ROWS = 1 << 16


def write_tokens(folder: Path, documents: Path, tokenizer_spec: str, progress: Progress | None = None) -> Counts:
    """Encode one shard.

    Args:
        folder: where to.
        documents: folder of its documents: docs.parquet and hashes.parquet.
        tokenizer_spec: what `open_tokenizer` opens.
        progress: called with bytes of text and documents.

    Raises:
        DataError: the hashes are not those of these documents, or a text was encoded with the separator in it.
    """
    tokenizer, fast = _open(tokenizer_spec)
    counts = Counts(0, 0, detail={"tokens": 0, "text_bytes": 0})
    histogram: Counter[str] = Counter()
    with (
        pq.ParquetWriter(folder / ENCODED_FILE, ENCODED_SCHEMA, compression="zstd") as rows,
        TokenFileWriter(folder / TOKENS_PREFIX, token_dtype(tokenizer.vocab_size)) as writer,
    ):
        group: list[pa.Table] = []
        for batch, facts in _documents(documents):
            tokens, lengths = encode_column(tokenizer, fast, batch.column("text"))
            writer.add_documents(tokens, lengths)
            histogram.update(size_classes(lengths.tolist()))
            facts = facts.append_column("n_tokens", pa.array(lengths, pa.int64()))
            group.append(facts.select(ENCODED_SCHEMA.names).cast(ENCODED_SCHEMA))
            if sum(map(len, group)) >= _GROUP_ROWS:
                rows.write_table(pa.concat_tables(group))
                group.clear()
            counts.documents_in += len(batch)
            counts.detail["text_bytes"] += int(facts.column("text_bytes").to_numpy().sum())
            if progress is not None:
                progress(batch.column("text").nbytes, len(batch))
        if group:
            rows.write_table(pa.concat_tables(group))
        counts.detail["tokens"] = writer.n_tokens
    counts.documents_out = counts.documents_in
    counts.detail["length_histogram"] = in_order(histogram)
    return counts


def encode_column(tokenizer: Tokenizer, fast: FastBpe | None, texts: pa.Array) -> tuple[TokenArray, NDArray[np.int64]]:
    """As `encode_documents`, for texts that lie in an Arrow array.

    Args:
        tokenizer: decides the ids.
        fast: the same ids for less; None: the tokenizer has no such way.
        texts: strings without nulls.
    """
    if fast is None:
        return encode_documents(tokenizer, texts.to_pylist())
    tokens, lengths = fast.encode(*utf8_of(texts), tokenizer.eot_id)
    _check_separators(tokenizer.eot_id, tokens, lengths, texts)
    return tokens, lengths


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
    """Tokens of all texts in one array, each text followed by the end-of-text token, and the length of each.

    Raises:
        DataError: a text's own tokens hold the separator, so that it would be read as several documents.
    """
    end = np.array([tokenizer.eot_id], np.uint32)
    pieces = tokenizer.encode_batch_numpy(texts)
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1
    tokens = np.concatenate([part for piece in pieces for part in (piece, end)] or [end[:0]])
    _check_separators(tokenizer.eot_id, tokens, lengths, texts)
    return tokens, lengths


def _open(spec: str) -> tuple[Tokenizer, FastBpe | None]:
    """The tokenizer and its fast way, which remembers the pieces of the shards before."""
    path = Path(spec)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return _open_content(spec, tuple(map(hash_file, files)))


@functools.lru_cache(maxsize=1)
def _open_content(spec: str, _hashes: tuple[str, ...]) -> tuple[Tokenizer, FastBpe | None]:
    tokenizer = open_tokenizer(spec)
    return tokenizer, FastBpe.of(tokenizer.tiktoken_encoding)


def _check_separators(eot_id: int, tokens: TokenArray, lengths: NDArray[np.int64], texts: Sequence[str]) -> None:
    ends = np.flatnonzero(tokens == eot_id) + 1
    if len(ends) != len(lengths):
        # The first separator too many is the first one that stands where no document ends.
        first = int(np.argmin(ends[: len(lengths)] == np.cumsum(lengths)))
        raise DataError(
            f"the tokenizer encodes a text with its own separator, token {eot_id}, in it, so the document "
            f"{str(texts[first])[:80]!r} ... would be cut in two; use a tokenizer whose end-of-text token is a special "
            "one"
        )


def _documents(folder: Path) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
    """Texts and the rows of their hashes, in step, a few hundred documents at a time."""
    path = folder / TEXTS_FILE
    with open_rows(path) as texts, open_rows(folder / HASHES_FILE) as hashes:
        if texts.metadata.num_rows != hashes.metadata.num_rows:
            raise DataError(
                f"{path}: {texts.metadata.num_rows} documents, but {HASHES_FILE} beside it has "
                f"{hashes.metadata.num_rows}"
            )
        waiting = hashes.schema_arrow.empty_table()
        following = hashes.iter_batches(_GROUP_ROWS)
        n_read = 0
        for batch in texts.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
            while len(waiting) < len(batch):
                waiting = pa.concat_tables([waiting, pa.Table.from_batches([next(following)])])
            facts, waiting = waiting.slice(0, len(batch)), waiting.slice(len(batch))
            if not np.array_equal(batch.column("doc_id").to_numpy(), facts.column("doc_id").to_numpy()):
                raise DataError(f"{path}: documents from row {n_read} on are not those of {HASHES_FILE}")
            n_read += len(batch)
            yield batch, facts
