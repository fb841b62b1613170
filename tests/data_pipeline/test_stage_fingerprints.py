"""A finished job whose configuration changes by one key: some stage notices, unless the key cannot matter."""

import json
import random

import pytest

from data_pipeline.config import DataJob
from data_pipeline.job_sources import plan_shards
from data_pipeline.run import run_job
from data_pipeline.stages.context import JobContext
from data_pipeline.stages.order import BUILDERS, STAGES
from data_pipeline.tasks import read_record
from megagpt.config.load import section_types

WORDS = ["the", "of", "and", "in", "this", "that", "with", "have", "for", "water", "people", "other", "river", "small"]

CHANGES = {
    "url_filter.domains": [],
    "url_filter.urls": ["urls"],
    "url_filter.words": ["words"],
    "url_filter.subwords": ["words"],
    "url_filter.soft_words": ["words"],
    "url_filter.max_soft_words": 3,
    "extract.engine": "trafilatura",
    "extract.timeout_seconds": 7.0,
    "language.enabled": True,
    "language.keep": ["de"],
    "language.min_score": 0.1,
    "language.model": "words",
    "filters": {"length": {"min_words": 2}},
    "dedup.exact": False,
    "dedup.minhash": False,
    "dedup.ngram": 4,
    "dedup.bands": 7,
    "dedup.rows": 4,
    "dedup.verify_jaccard": 0.5,
    "dedup.keep": "longest",
    "dedup.units": "paragraph",
    "dedup.unit_min_words": 5,
    "dedup.substring_tokens": 60,
    "decontamination.items": [],
    "decontamination.ngram": 9,
    "decontamination.action": "report",
    "decontamination.excise_characters": 20,
    "tokenizer.kind": "tiktoken",
    "tokenizer.vocab_size": 310,
    "tokenizer.sample_bytes": 2000,
    "tokenizer.special_tokens": ["<|user|>"],
    "tokenizer.digits": "single",
    "pack.name": "other",
    "pack.val_fraction": 0.3,
    "pack.test_fraction": 0.3,
    "pack.per_source": False,
    "pack.seed": 3,
    "mixture.by": "temperature",
    "mixture.temperature": 2.0,
    "mixture.weights": {"a": 2.0, "pages": 1.0},
    "mixture.epochs": {"a": 3.0},
    "sources[].text_key": "body",
    "sources[].name": "other",
    "sources[].name_from": "subset",
    "sources[].priority": 5,
    "sources[].packages": ["rich"],
    "sources[].split": "test",
}
WITH = {
    "dedup.minhash": {"dedup.verify_jaccard": None},
    "dedup.verify_jaccard": {},
    "pack.per_source": {"mixture.by": "tokens", "mixture.epochs": {}},
    "mixture.by": {"mixture.epochs": {}},
    "mixture.temperature": {"mixture.by": "temperature", "mixture.epochs": {}},
    "mixture.weights": {"mixture.by": "weights", "mixture.epochs": {}},
}
NOT_MATTERING = {
    "out": "where the result lies",
    "executor": "who computes",
    "workers": "who computes",
    "ray.address": "who computes",
    "ray.memory_gb_per_task": "who computes",
    **dict.fromkeys(
        (f"slurm.{key}" for key in ("partition", "time_minutes", "memory_gb", "cpus_per_task", "extra")), "who computes"
    ),
    **dict.fromkeys(
        ("sources[].path", "sources[].paths_file", "sources[].crawl", "sources[].prefix", "sources[].kind"),
        "decide the shards, whose path, kind and content are in the records",
    ),
    "tokenizer.name": "only with kind: tiktoken, see below",
    "tokenizer.file": "only with kind: file, see below",
    "dedup.against": "needs another job, see test_dedup_published.py",
}


def keys(schema, prefix=""):
    for name, field in schema.model_fields.items():
        kinds = section_types(field.annotation)
        if not kinds:
            yield prefix + name
        else:
            many = "[]" if name == "sources" else ""
            for kind in kinds:
                yield from keys(kind, f"{prefix}{name}{many}.")


def write_inputs(folder):
    rng = random.Random(5)
    texts = [" ".join(rng.choice(WORDS) for _ in range(90)) for _ in range(30)]
    passage = " ".join(rng.choice(WORDS) for _ in range(70))
    rows = [{"text": f"{text}\n{passage}", "body": text, "meta": {"subset": "s"}} for text in texts]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = f"<html><body><article><p>{texts[0]} again</p></article></body></html>".encode()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/1\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        "WARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http)}\r\n\r\n"
    )
    (folder / "pages.warc").write_bytes(head.encode() + http + b"\r\n\r\n")
    (folder / "domains").write_text("bad.example\n")
    (folder / "urls").write_text("bad.example/1\n")
    (folder / "words").write_text("casino\n")
    (folder / "items.jsonl").write_text(
        json.dumps({"task": "t", "id": 0, "text": "not in any of the texts at all"}) + "\n"
    )


def configuration(folder):
    return {
        "out": str(folder / "out"),
        "sources": [{"path": str(folder / "a.jsonl")}, {"path": str(folder / "pages.warc")}],
        "url_filter": {"domains": [str(folder / "domains")]},
        "language": {"enabled": False},
        "filters": {"length": {}},
        "dedup": {"units": "line", "substring_tokens": 50, "verify_jaccard": 0.9},
        "decontamination": {"items": [str(folder / "items.jsonl")]},
        "tokenizer": {"vocab_size": 300},
        "pack": {"val_fraction": 0.2, "per_source": True},
        "mixture": {"by": "epochs", "epochs": {"a": 2.0}},
        "workers": 1,
    }


def changed(values, key, value, folder):
    """A copy of the configuration with one key changed; names of files become paths."""
    if (isinstance(value, list) and value in (["urls"], ["words"])) or value == "words":
        value = [str(folder / name) for name in value] if isinstance(value, list) else str(folder / value)
    copy = json.loads(json.dumps(values))
    *sections, name = key.replace("[]", ".0").split(".")
    at = copy
    for section in sections:
        at = at[int(section)] if section.isdigit() else at.setdefault(section, {})
    at[name] = value
    return copy


def tasks_of(job, records):
    """What every task of the job depends on, given the records of the finished job for the stages before it."""
    context = JobContext(job, plan_shards(job), dict(records))
    return {
        (task.stage, task.partition): (json.dumps(task.config, sort_keys=True), dict(task.inputs), task.code)
        for stage in STAGES
        for task in BUILDERS[stage](context)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_inputs(folder)
    values = configuration(folder)
    job = DataJob.model_validate_json(json.dumps(values))
    run_job(job)
    records = {
        stage: [read_record(path) for path in sorted((job.out / "stages" / stage).glob("*.json"))] for stage in STAGES
    }
    records["extract"] = [record for record in records["extract"] if record is not None]  # *.poison.json is none
    return folder, values, records, tasks_of(job, records)


def test_the_unchanged_job_has_nothing_to_do(finished):
    _, values, records, before = finished
    assert tasks_of(DataJob.model_validate_json(json.dumps(values)), records) == before
    assert {stage for stage, _ in before} == set(STAGES) - {"published"}


def test_every_key_is_looked_at_here():
    assert set(keys(DataJob)) == set(CHANGES) | set(NOT_MATTERING)


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_changes_what_some_task_depends_on(finished, key):
    folder, values, records, before = finished
    after_values = changed(values, key, CHANGES[key], folder)
    for other, value in WITH.get(key, {}).items():
        after_values = changed(after_values, other, value, folder)
    after = tasks_of(DataJob.model_validate_json(json.dumps(after_values)), records)
    noticing = {stage for stage, partition in before.keys() ^ after.keys()}
    noticing |= {name[0] for name in before.keys() & after.keys() if before[name] != after[name]}
    # The manifest carries the whole configuration, so it always notices; what makes the difference has to as well.
    assert noticing - {"manifest"} or key.startswith("mixture."), noticing
    assert "manifest" in noticing


@pytest.mark.parametrize("key", ["workers", "executor", "slurm.memory_gb", "ray.memory_gb_per_task"])
def test_who_computes_changes_nothing(finished, key):
    folder, values, records, before = finished
    value = {"workers": 5, "executor": "ray"}.get(key, 9)
    assert tasks_of(DataJob.model_validate_json(json.dumps(changed(values, key, value, folder))), records) == before


def test_the_name_and_the_file_of_a_tokenizer_matter_where_they_are_read(finished):
    folder, values, records, _ = finished
    saved = folder / "out" / "tokenizer" / "tokenizer.json"

    def depends_on(**tokenizer):
        job = DataJob.model_validate_json(json.dumps({**values, "tokenizer": tokenizer}))
        return tasks_of(job, records)["tokenizer", "all"]

    assert depends_on(kind="tiktoken", name="gpt2") != depends_on(kind="tiktoken", name="o200k_base")
    (folder / "other.json").write_bytes(saved.read_bytes() + b"\n")
    assert depends_on(kind="file", file=str(saved)) != depends_on(kind="file", file=str(folder / "other.json"))


def test_a_file_that_is_named_is_hashed(finished):
    folder, values, records, before = finished
    job = DataJob.model_validate_json(json.dumps(values))
    for file, stage in (("domains", "blocklist"), ("items.jsonl", "benchmarks")):
        path = folder / file
        content = path.read_text()
        path.write_text(content.replace("bad", "worse").replace("at all", "at all at all"))
        after = tasks_of(job, records)
        path.write_text(content)
        assert {name[0] for name in before if before[name] != after[name]} == {stage}
