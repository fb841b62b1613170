"""From packed sources to the shares that training reads them in."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.config import DataJob, MixtureSection, PackSection
from data_pipeline.inspect import inspect
from data_pipeline.manifest import write_manifest_of
from data_pipeline.mixture import shares, write_mixture
from data_pipeline.pack import write_packed
from data_pipeline.tasks import hash_file
from data_pipeline.tokenizer_training import train_bpe
from megagpt.cli import main
from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.data.manifest import describe_file, read_manifest, verify_token_file
from megagpt.data.mixture import open_mixture
from megagpt.errors import ConfigError
from tests.data_pipeline.encoded_shards import encoded_shard

SOURCES = ("Pile-CC", "PubMed Central", "books")
PER_SOURCE = PackSection(per_source=True, val_fraction=0.1, test_fraction=0.05)
RUN = """\
model: {family: gpt2, n_layer: 1, n_head: 1, d_model: 8, vocab_size: 1000, max_seq_len: 16}
run: {dir: runs/x}
optim: {lr: 6e-4}
train: {max_steps: 1000, global_batch_size: 100, micro_batch_size: 2}
"""


def source_of(i: int) -> str:
    return SOURCES[0 if i % 10 < 6 else 1 if i % 10 < 9 else 2]


def packed_job(folder: Path, pack: PackSection = PER_SOURCE) -> dict:
    """Token files in `folder`; returns the detail of packing."""
    shard = encoded_shard(folder / "encoded", list(range(2000)), source_of)
    return write_packed(folder, [shard], 1000, pack).detail


@pytest.mark.parametrize(
    "section",
    [
        MixtureSection(),
        MixtureSection(by="temperature", temperature=3.0),
        MixtureSection(by="weights", weights={"books": 0.5, "Pile-CC": 0.25, "PubMed Central": 0.25}),
        MixtureSection(by="epochs", epochs={"books": 4.0}),
    ],
)
def test_training_takes_the_file_as_it_is_and_reads_exactly_its_shares(tmp_path: Path, section: MixtureSection):
    packed = packed_job(tmp_path)
    mixed = write_mixture(tmp_path, packed, PER_SOURCE, section)
    (tmp_path / "run.yaml").write_text(RUN)
    config = load_config(TrainingRun, [tmp_path / "run.yaml", tmp_path / "mixture.yaml"])
    mixture = open_mixture(config.data.train, 16, 0)
    n = 20_000
    read = Counter(mixture.locate(i)[0] for i in range(n))
    tokens = {name: packed["splits"]["train"]["sources"][name]["tokens"] for name in SOURCES}
    sizes = np.array([tokens[name] for name in SOURCES], float)
    expected = {
        "tokens": sizes,
        "temperature": sizes ** (1 / 3),
        "weights": np.array([0.25, 0.25, 0.5]),
        "epochs": sizes * [1, 1, 4],
    }[section.by]
    expected /= expected.sum()
    assert [token_file.prefix.name for token_file in mixture.files] == [
        "tokens_Pile-CC_train",
        "tokens_PubMed_Central_train",
        "tokens_books_train",
    ]
    for number, name in enumerate(SOURCES):
        assert abs(read[number] - n * expected[number]) < 2
        assert abs(float(mixture.weights[number]) - expected[number]) < 1e-11
        assert mixed[name]["tokens"] == tokens[name]
        run_tokens = (sizes * [1, 1, 4]).sum() if section.by == "epochs" else sizes.sum()
        assert mixed[name]["epochs"] == pytest.approx(expected[number] * run_tokens / sizes[number])
    assert sum(mixture.weights) == 1
    assert config.data.val == tmp_path / "tokens_val"


def test_the_plan_of_a_run_shows_the_shares(tmp_path: Path):
    packed = packed_job(tmp_path)
    weights = {"books": 3.0, "Pile-CC": 1.0, "PubMed Central": 1.0}
    write_mixture(tmp_path, packed, PER_SOURCE, MixtureSection(by="weights", weights=weights))
    (tmp_path / "run.yaml").write_text(RUN)
    words = [str(tmp_path / name) for name in ("run.yaml", "mixture.yaml")]
    done = CliRunner().invoke(main, ["train", "--check", *words], catch_exceptions=False)
    assert done.exit_code == 0
    for prefix, share in (("tokens_books_train", "60"), ("tokens_Pile-CC_train", "20")):
        assert any(prefix in line and share in line for line in done.output.splitlines()), done.output


def test_the_file_says_tokens_shares_and_epochs_and_does_not_name_its_folder(tmp_path: Path):
    packed = packed_job(tmp_path)
    write_mixture(tmp_path, packed, PER_SOURCE, MixtureSection(by="epochs", epochs={"books": 2.5}))
    page = (tmp_path / "mixture.yaml").read_text()
    books = packed["splits"]["train"]["sources"]["books"]["tokens"]
    total = packed["splits"]["train"]["tokens"] + round(1.5 * books)
    row = next(line for line in page.splitlines() if line.startswith("# books"))
    assert row.split()[2:] == [f"{books:,}", f"{2.5 * books / total:.6f}", "2.500"]
    assert f"{total:,} tokens" in page
    assert str(tmp_path) not in page


def test_without_per_source_files_there_is_one_file_to_train_on(tmp_path: Path):
    pack = PackSection(name="all", val_fraction=0.1)
    packed = packed_job(tmp_path, pack)
    assert write_mixture(tmp_path, packed, pack, MixtureSection()) == {}
    (tmp_path / "run.yaml").write_text(RUN)
    config = load_config(TrainingRun, [tmp_path / "run.yaml", tmp_path / "mixture.yaml"])
    assert (config.data.train, config.data.val) == (tmp_path / "all_train", tmp_path / "all_val")


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (
            MixtureSection(by="weights", weights={"books": 1.0, "Pile-CC": 1.0}),
            "mixture.weights does not name 'PubMed Central'; every source needs a weight",
        ),
        (
            MixtureSection(by="epochs", epochs={"PubMed central": 2.0}),
            "mixture.epochs: no source named 'PubMed central' has training tokens; did you mean 'PubMed Central'?",
        ),
        (
            MixtureSection(by="weights", weights={"xyz": 2.0}),
            "mixture.weights: no source named 'xyz' has training tokens; they are Pile-CC, PubMed Central, books",
        ),
    ],
)
def test_names_that_do_not_fit_are_errors(section: MixtureSection, complaint: str):
    with pytest.raises(ConfigError) as error:
        shares(dict.fromkeys(SOURCES, 5), section)
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({"weights": {"a": 1.0}}, "weights are given but `by` is tokens"),
        ({"by": "weights", "epochs": {"a": 1.0}}, "epochs are given but `by` is weights"),
        ({"by": "weights"}, "give every source a weight"),
        ({"by": "epochs", "temperature": 2.0}, "temperature is given but `by` is epochs"),
        ({"by": "temperature"}, r"set pack\.per_source=true"),
    ],
)
def test_settings_that_would_not_be_read_are_refused(mixture: dict, complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        DataJob.model_validate_json(json.dumps({"out": "x", "sources": ["a.jsonl"], "mixture": mixture}))


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 10**14), min_size=1, max_size=30),
    st.sampled_from([MixtureSection(), MixtureSection(by="temperature", temperature=5.0), MixtureSection(by="epochs")]),
)
def test_shares_add_up_to_one_survive_being_written_and_are_near_the_exact_ones(tokens, section):
    found = shares(tokens, section)
    assert sum(found.values()) == 1
    assert all(Fraction(repr(float(f"{float(share):.12f}"))) == share > 0 for share in found.values())
    power = 1 / section.temperature
    total = sum(n**power for n in tokens.values())
    assert all(abs(float(found[source]) - n**power / total) < 40e-12 for source, n in tokens.items())


def test_a_source_without_training_documents_is_named_and_left_out(tmp_path: Path):
    packed = packed_job(tmp_path, PER_SOURCE)
    rare = {"documents": 0, "tokens": 0, "text_bytes": 0}
    packed["splits"]["train"]["sources"]["rare"] = rare
    assert "rare" not in write_mixture(tmp_path, packed, PER_SOURCE, MixtureSection())
    assert "# rare: no training documents, so it is not in the mixture" in (tmp_path / "mixture.yaml").read_text()


def test_the_manifest_says_what_the_files_hold_without_reading_them(tmp_path: Path):
    packed = packed_job(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    train_bpe(iter(["one text"]), 260).save(str(tmp_path / "tokenizer/tokenizer.json"))
    outputs = {
        path.name: {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for path in tmp_path.iterdir()
        if path.suffix in (".bin", ".idx")
    }
    job = DataJob(out=tmp_path, sources=("a.jsonl",), pack=PER_SOURCE).model_dump(mode="json")
    counts = write_manifest_of(tmp_path, packed, outputs, str(tmp_path / "tokenizer"), job)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert sorted(manifest.files) == [
        "tokens_Pile-CC_train",
        "tokens_PubMed_Central_train",
        "tokens_books_train",
        "tokens_test",
        "tokens_val",
    ]
    for name, entry in manifest.files.items():
        read = describe_file(tmp_path / name, text_bytes=entry.text_bytes, sources=entry.sources)
        assert read == entry
        verify_token_file(tmp_path / name)
    assert manifest.files["tokens_val"].sources["books"]["documents"] > 0
    assert counts.documents_in == sum(entry.n_documents for entry in manifest.files.values()) == 2000
    assert set(counts.detail["mixture"]) == set(SOURCES)
    page = inspect(tmp_path, 0)
    assert page.count("verified       sizes, offsets and hashes") == 5
    books = manifest.files["tokens_books_train"].sources["books"]
    assert f"source         books: {books['documents']:,} documents, {books['tokens']:,} tokens" in page
