import importlib
import sys
from functools import cache

import pytest

from data_pipeline import documents, encode, extract_task, filter_task, tokenizer_training, url_blocklist
from data_pipeline.code_fingerprint import code_fingerprint, libraries_of, reachable_modules
from data_pipeline.filters.registry import FILTERS


@pytest.mark.parametrize(
    ("module", "modules"),
    [
        (url_blocklist, ["filters.url_filter", "filters.word_list"]),
        (extract_task, ["filters.url_filter", "extract.engines", "extract.watchdog", "sources.warc", "parquet_writer"]),
        (filter_task, ["language", "filters.kernels", "classify.hashed", "sources.jsonl"]),
        (documents, ["dedup.cutting", "dedup.minhash", "decontamination.match"]),
    ],
)
def test_modules_are_found_through_modules_and_inside_functions(module, modules):
    found = reachable_modules(module.__name__)
    assert {f"data_pipeline.{name}" for name in modules} <= set(found)
    assert "data_pipeline.config" not in found


def test_every_filter_is_part_of_the_filter_stage_and_of_no_other():
    files = {f"data_pipeline.filters.{bind.__module__.rpartition('.')[2]}" for _, bind in FILTERS.values()}
    assert files <= set(reachable_modules(filter_task.__name__))
    assert not files & set(reachable_modules(extract_task.__name__))


def test_stages_depend_on_the_modules_of_megagpt_that_they_use():
    assert {"megagpt.tokenizer", "megagpt.byte_bpe", "megagpt.data.indexed"} <= set(reachable_modules(encode.__name__))
    for module in (filter_task, documents):
        assert {"megagpt.text.text_classes", "megagpt.text.word_hashes"} <= set(reachable_modules(module.__name__))
    assert {"tokenizers", "tiktoken", "numpy"} <= {line.partition(" ")[0] for line in libraries_of(encode.__name__)}
    assert "megagpt.tokenizer" in reachable_modules(tokenizer_training.__name__)


def test_what_python_itself_loads_is_covered():
    """Whatever importing a stage's module loads of data_pipeline is reached by reading its import statements."""
    for module in (url_blocklist, extract_task, filter_task, documents, encode):
        found = set(reachable_modules(module.__name__))
        seen = {
            value.__module__
            for name in found
            for value in vars(sys.modules.get(name) or importlib.import_module(name)).values()
            if callable(value) and str(getattr(value, "__module__", "")).startswith(("data_pipeline", "megagpt"))
        }
        left_out = {"data_pipeline.config", "data_pipeline.tasks", "megagpt.atomic", "megagpt.errors"}
        assert seen - found <= left_out


def test_the_version_of_a_library_and_a_further_package_change_it(monkeypatch):
    from data_pipeline import code_fingerprint as module

    before = code_fingerprint(encode.write_tokens)
    assert before == code_fingerprint(encode.write_tokens) != code_fingerprint(encode.write_tokens, ("duckdb",))
    monkeypatch.setattr(module, "_fingerprint", cache(module._fingerprint.__wrapped__))
    monkeypatch.setattr(module, "_versions", lambda names: [f"{name} of tomorrow" for name in names])
    assert code_fingerprint(encode.write_tokens) != before


def test_the_source_of_a_module_that_is_reached_changes_it(monkeypatch, tmp_path):
    from data_pipeline import code_fingerprint as module

    before = code_fingerprint(encode.write_tokens)
    changed = tmp_path / "tokenizer.py"
    changed.write_bytes(reachable_modules(encode.__name__)["megagpt.tokenizer"].read_bytes() + b"# edited\n")
    other = {**reachable_modules(encode.__name__), "megagpt.tokenizer": changed}
    monkeypatch.setattr(module, "_fingerprint", cache(module._fingerprint.__wrapped__))
    monkeypatch.setattr(module, "reachable_modules", lambda _: other)
    assert code_fingerprint(encode.write_tokens) != before
