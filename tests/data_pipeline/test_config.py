from pathlib import Path

import pytest

from data_pipeline.config import DataJob, Source
from megagpt.config.load import dump_config, load_config
from megagpt.errors import ConfigError


def load(*overrides: str) -> DataJob:
    return load_config(DataJob, [], ["out=x", *overrides])


def test_a_bare_string_among_the_sources_is_a_path() -> None:
    job = load("sources=[a.jsonl, {kind: python_docs, packages: [click, rich]}]", "language.keep=[en, de]")
    assert job.sources == (Source(path="a.jsonl"), Source(kind="python_docs", packages=("click", "rich")))
    assert job.language.keep == ("en", "de")


def test_what_is_written_down_of_a_job_reads_back_equal(tmp_path: Path) -> None:
    job = load("sources=[a.jsonl, {kind: python_docs, packages: [click]}]", "filters.gopher_quality.stop_words=[x]")
    (tmp_path / "job.yaml").write_text(dump_config(job))
    assert load_config(DataJob, [tmp_path / "job.yaml"]) == job


def test_json_schema_knows_of_bare_strings() -> None:
    items = DataJob.model_json_schema()["properties"]["sources"]["items"]
    assert items == {"anyOf": [{"$ref": "#/$defs/Source"}, {"type": "string"}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources=[{pth: a}]", "unknown key 'sources.0.pth'; did you mean 'path'?"),
        ("sources=[{path: 3}]", "sources.0.path: input should be text, got 3"),
        ("sources=a", "sources: input should be a list, got 'a'"),
        ("sources=[]", "sources: list should have at least 1 item, got []"),
        ("filters={finweb: {}}", "filters: unknown filter 'finweb'; did you mean 'fineweb'?"),
        ("filters.c4.min_sentence=2", "filters.c4: unknown threshold 'min_sentence'; did you mean 'min_sentences'?"),
    ],
)
def test_a_wrong_job_is_one_message_before_anything_is_done(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("sources=[a.jsonl]", override)
    assert str(raised.value) == f"command line: {message}"
