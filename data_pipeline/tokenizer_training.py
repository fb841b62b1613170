r"""The tokenizer of a job: trained on a sample of the documents, or one that exists, copied beside the tokens.

Byte-level BPE with GPT-2's splitting. Source: Radford et al. 2019, section 2.2; the pattern is the one of GPT-2's
encoder.py, which `tokenizers` names ByteLevel(use_regex=True). Numbers, by `tokenizer.digits`, before that pattern:

    gpt2          \p{N}+ of the pattern itself, an optional space before it: any run of digits is one piece
    single        Digits(individual_digits=True): each digit alone. Source: Touvron et al. 2023 (LLaMA), section 2
    up_to_three   Split(\p{N}{1,3}): from the left in groups of three, as in the pattern of tiktoken's cl100k_base
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data_pipeline.config import TokenizerSection
from data_pipeline.parquet_reader import open_rows
from data_pipeline.shuffle import mix64, unit_interval
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import ConfigError, DataError
from megagpt.tokenizer import TIKTOKEN_FILE, open_tokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

Digits = Literal["gpt2", "single", "up_to_three"]

_SAMPLE_SALT = np.uint64(0x73616D706C65)
_BATCH_DOCUMENTS = 256
_BYTES = 256


def check_tokenizer(settings: TokenizerSection, saved: Path | None = None) -> None:
    """What the last stages need of a tokenizer is missed before the first stage runs, and not after days.

    Args:
        settings: which tokenizer.
        saved: where an earlier run of the job saved it; there, an encoding needs no files of tiktoken's.

    Raises:
        ConfigError: vocabulary or special tokens cannot work.
        DataError: tiktoken's files are not there and cannot be fetched, or the file is no tokenizer.
    """
    match settings.kind:
        case "train_bpe":
            _check_special_tokens(settings.vocab_size, settings.special_tokens, settings.digits)
        case "file":
            open_tokenizer(str(settings.file))
        case "tiktoken":
            try:
                open_tokenizer(settings.name)
            except DataError:
                if saved is None or not _is_saved(settings.name, saved):
                    raise


def write_tokenizer(
    folder: Path,
    documents: Sequence[Path],
    text_bytes: int,
    settings: TokenizerSection,
    progress: Progress | None = None,
) -> Counts:
    """Write the tokenizer that the configuration asks for.

    Args:
        folder: where to.
        documents: docs.parquet of all shards: the documents that stay.
        text_bytes: their text, in bytes.
        settings: which tokenizer.
        progress: called with bytes of text and documents.

    Raises:
        DataError: no text to train on, or a file that is no tokenizer.
        ConfigError: vocabulary or special tokens cannot work.
    """
    if settings.kind != "train_bpe":
        spec = settings.name if settings.kind == "tiktoken" else str(settings.file)
        tokenizer = open_tokenizer(spec)
        tokenizer.save(folder)
        return Counts(0, 0, detail={"vocab_size": tokenizer.vocab_size})
    sample = _Sample(documents, settings.sample_bytes / max(text_bytes, 1), progress)
    trained = train_bpe(iter(sample), settings.vocab_size, settings.special_tokens, settings.digits)
    if sample.n_documents == 0:
        raise DataError(
            f"tokenizer.sample_bytes = {settings.sample_bytes} of {text_bytes} bytes drew no document to train on; "
            "raise it, or look at `megagpt data status` for why so few documents are left"
        )
    trained.save(str(folder / TOKENIZER_FILE))
    return Counts(
        sample.n_documents,
        sample.n_documents,
        detail={
            "vocab_size": trained.get_vocab_size(),
            "vocab_size_asked": settings.vocab_size,
            "special_tokens": {token: trained.token_to_id(token) for token in (END_OF_TEXT, *settings.special_tokens)},
            "digits": settings.digits,
            "sample_documents": sample.n_documents,
            "sample_bytes": sample.n_bytes,
            "sample_share": min(1.0, settings.sample_bytes / max(text_bytes, 1)),
            "sample_of_documents": sample.n_seen,
            "sample_of_bytes": text_bytes,
            "sample_selection": "documents whose keyed hash of the id, as a fraction of 1, is below sample_share",
        },
    )


def train_bpe(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str] = (), digits: Digits = "gpt2"
) -> HFTokenizer:
    """A byte-level BPE; END_OF_TEXT is token 0, then the special tokens, the 256 bytes, and the merges.

    The result may be smaller than asked where the texts have too few pairs to merge. It does not depend on how many
    threads `tokenizers` uses.

    Raises:
        ConfigError: vocab_size has no room for the bytes and special tokens, or text could make a special token.
    """
    _check_special_tokens(vocab_size, special_tokens, digits)
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting(digits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def splitting(digits: Digits) -> Any:
    """How text is cut into pieces before merges: `tokenizers` pre-tokenizer of the digit rule."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match digits:
        case "gpt2":
            return words
        case "single":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        case "up_to_three":
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), words])


def in_sample(doc_ids: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """An even draw of `share` of the documents, by a hash of the id: the same ones on every run."""
    return np.asarray(unit_interval(mix64(doc_ids.astype(np.uint64) ^ _SAMPLE_SALT)) < share, np.bool_)


def _check_special_tokens(vocab_size: int, special_tokens: Sequence[str], digits: Digits) -> None:
    least = _BYTES + 1 + len(special_tokens)
    if vocab_size < least:
        more = f" and {len(special_tokens)} special token(s)" if special_tokens else ""
        raise ConfigError(
            f"tokenizer.vocab_size = {vocab_size}; must be at least {least}: 256 bytes, {END_OF_TEXT}{more}"
        )
    names = [END_OF_TEXT, *special_tokens]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"tokenizer.special_tokens: {', '.join(twice)} is there twice; {END_OF_TEXT} always is, without being named"
        )
    for name in special_tokens:
        # `tokenizers` knows tokens by name only: a merge that spells the name would get its id. Merges stay inside a
        # piece, so a name that is always cut in two is safe; of other characters than these, byte-level BPE spells
        # bytes with, such as a space.
        plain = name.isascii() and name.isprintable() and " " not in name
        if not plain or len(splitting(digits).pre_tokenize_str(name)) < 2:
            raise ConfigError(
                f"tokenizer.special_tokens: text could make the token {name!r}; choose a name of ASCII letters and "
                "signs, both of them and no spaces, such as <|assistant|>"
            )


def _is_saved(name: str, folder: Path) -> bool:
    try:
        return bool(open_tokenizer(folder / TIKTOKEN_FILE).describe()["name"] == name)
    except DataError:
        return False


class _Sample:
    """The texts of the drawn documents, one batch in memory at a time; counts what it gave."""

    def __init__(self, documents: Sequence[Path], share: float, progress: Progress | None) -> None:
        self.n_seen = 0
        self.n_documents = 0
        self.n_bytes = 0
        self._documents = documents
        self._share = share
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        for path in self._documents:
            with open_rows(path) as file:
                for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
                    drawn = in_sample(batch.column("doc_id").to_numpy(), self._share)
                    texts = batch.column("text")
                    for i in np.flatnonzero(drawn).tolist():
                        text = texts[i].as_py()
                        self.n_documents += 1
                        self.n_bytes += len(text.encode())
                        yield text
                    self.n_seen += len(batch)
                    if self._progress is not None:
                        self._progress(texts.nbytes, len(batch))
