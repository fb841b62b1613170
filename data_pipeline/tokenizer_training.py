"""The tokenizer of a job: trained on a sample of the kept documents, or one that exists, copied beside the tokens.

Byte-level BPE with GPT-2's splitting. Source: Radford et al. 2019, section 2.2; the pattern is the one of GPT-2's
encoder.py, which `tokenizers` names ByteLevel(use_regex=True).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.config import TokenizerSection
from data_pipeline.dedup.clusters import is_removed, read_removed
from data_pipeline.dedup.minhash import mix64
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

_SAMPLE_SALT = np.uint64(0x73616D706C65)
_BATCH_DOCUMENTS = 256
_BYTES = 256


def write_tokenizer(
    folder: Path,
    documents: Sequence[Path],
    removed: Path,
    text_bytes: int,
    settings: TokenizerSection,
    progress: Progress | None = None,
) -> Counts:
    """Write the tokenizer that the configuration asks for.

    Args:
        folder: where to.
        documents: docs.parquet of all shards.
        removed: removed.parquet; duplicates are not looked at.
        text_bytes: text of all documents, duplicates included, in bytes.
        settings: which tokenizer.
        progress: called with bytes of text and documents.

    Raises:
        DataError: no text to train on, a vocabulary smaller than the bytes, or a file that is no tokenizer.
    """
    if settings.kind != "train_bpe":
        spec = settings.name if settings.kind == "tiktoken" else str(settings.file)
        tokenizer = open_tokenizer(spec)
        tokenizer.save(folder)
        return Counts(0, 0, detail={"vocab_size": tokenizer.vocab_size})
    sample = _Sample(documents, read_removed(removed), settings.sample_bytes / max(text_bytes, 1), progress)
    trained = train_bpe(iter(sample), settings.vocab_size)
    if sample.n_documents == 0:
        raise DataError(
            f"tokenizer.sample_bytes = {settings.sample_bytes} of {text_bytes} bytes drew no document to train on; "
            "raise it, or look at `megagpt data status` for why so few documents are left"
        )
    trained.save(str(folder / TOKENIZER_FILE))
    detail = {
        "vocab_size": trained.get_vocab_size(),
        "vocab_size_asked": settings.vocab_size,
        "sample_documents": sample.n_documents,
        "sample_bytes": sample.n_bytes,
    }
    return Counts(sample.n_documents, sample.n_documents, detail=detail)


def train_bpe(texts: Iterator[str], vocab_size: int) -> HFTokenizer:
    """A byte-level BPE; END_OF_TEXT is token 0, then the 256 bytes, then the merges.

    The result may be smaller than asked where the texts have too few pairs to merge.

    Raises:
        DataError: vocab_size has no room for the bytes and END_OF_TEXT.
    """
    if vocab_size < _BYTES + 1:
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}; must be at least {_BYTES + 1}: 256 bytes and {END_OF_TEXT}"
        )
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def in_sample(doc_ids: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """An even draw of `share` of the documents, by a hash of the id: the same ones on every run."""
    keys = mix64(doc_ids.astype(np.uint64) ^ _SAMPLE_SALT)
    return np.asarray((keys >> np.uint64(11)).astype(np.float64) / (1 << 53) < share, np.bool_)


class _Sample:
    """The texts of the drawn documents, one batch in memory at a time; counts what it gave."""

    def __init__(
        self, documents: Sequence[Path], removed: NDArray[np.int64], share: float, progress: Progress | None
    ) -> None:
        self.n_documents = 0
        self.n_bytes = 0
        self._documents = documents
        self._removed = removed
        self._share = share
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        for path in self._documents:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
                    doc_ids = batch.column("doc_id").to_numpy()
                    drawn = in_sample(doc_ids, self._share) & ~is_removed(doc_ids, self._removed)
                    texts = batch.column("text")
                    for i in np.flatnonzero(drawn).tolist():
                        text = texts[i].as_py()
                        self.n_documents += 1
                        self.n_bytes += len(text.encode())
                        yield text
                    if self._progress is not None:
                        self._progress(texts.nbytes, len(batch))
