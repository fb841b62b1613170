"""Per shard: the tokens of every document that stays, in the shard's order.

tokens.bin/.idx      one sequence a document, the end-of-text token last
documents.parquet    doc_id, hash_high, hash_low, text_bytes, n_tokens: what packing needs to know
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.clusters import is_removed, read_removed
from data_pipeline.dedup.signatures import SIGNATURES_FILE
from data_pipeline.tasks import Counts, Progress
from megagpt.data.indexed import TokenFileWriter, token_dtype
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

TOKENS_PREFIX = "tokens"
DOCUMENTS_FILE = "documents.parquet"

_BATCH_DOCUMENTS = 256


def write_tokens(
    folder: Path,
    documents: Path,
    signatures: Path,
    removed: Path,
    tokenizer_spec: str,
    progress: Progress | None = None,
) -> Counts:
    """Encode one shard.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        signatures: folder of its signatures.
        removed: removed.parquet of the whole job.
        tokenizer_spec: what `open_tokenizer` opens.
        progress: called with bytes of text and documents.

    Raises:
        DataError: the signatures are not those of these documents.
    """
    tokenizer = open_tokenizer(tokenizer_spec)
    table = pq.read_table(signatures / SIGNATURES_FILE, columns=["doc_id", "hash_high", "hash_low", "text_bytes"])
    doc_ids = table.column("doc_id").to_numpy()
    stays = ~is_removed(doc_ids, read_removed(removed))
    lengths: list[int] = []
    at = 0
    with (
        pq.ParquetFile(documents) as file,
        TokenFileWriter(folder / TOKENS_PREFIX, token_dtype(tokenizer.vocab_size)) as writer,
    ):
        for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
            keep = stays[at : at + len(batch)]
            if not np.array_equal(batch.column("doc_id").to_numpy(), doc_ids[at : at + len(batch)]):
                raise DataError(f"{documents}: documents from row {at} on are not those of its signatures")
            texts = batch.column("text").filter(pa.array(keep)).to_pylist()
            for tokens in tokenizer.encode_batch(texts):
                document = [*tokens, tokenizer.eot_id]
                writer.add_document(document)
                lengths.append(len(document))
            at += len(batch)
            if progress is not None:
                progress(batch.column("text").nbytes, len(batch))
    kept = table.filter(pa.array(stays)).append_column("n_tokens", pa.array(lengths, pa.int64()))
    pq.write_table(kept, folder / DOCUMENTS_FILE, compression="zstd")
    return Counts(
        len(table),
        len(kept),
        {"duplicates": int((~stays).sum())},
        {
            "tokens": sum(lengths),
            "text_bytes": int(kept.column("text_bytes").to_numpy().sum()),
            "length_histogram": length_histogram(np.array(lengths, np.int64)),
        },
    )


def length_histogram(lengths: NDArray[np.int64]) -> dict[str, int]:
    """Documents by length: the key is the smallest power of two that is at least the number of tokens."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return {str(1 << power): n for power, n in sorted(Counter(powers.tolist()).items())}
