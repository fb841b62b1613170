"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from megagpt.config.load import Section, section_types
from megagpt.config.schema import TrainingRun

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for folder in ("megagpt", "data_pipeline", "evals", "launch") for path in (ROOT / folder).rglob("*.py")
)
MAY_READ_THE_ENVIRONMENT = {
    "megagpt/cli.py",
    "megagpt/cli_bench.py",
    "megagpt/doctor/probe.py",  # a program of its own: it is sent to each host, and tells what is there
    "megagpt/train/__main__.py",
    "megagpt/verify/__main__.py",
    "launch/evaluate.py",
    "launch/generate.py",
    "launch/pretrain.py",
    "megagpt/cli_evals.py",
    "megagpt/cli_judged.py",
    "megagpt/cli_generate.py",
    "megagpt/cli_train.py",
    "megagpt/bench/processes.py",  # reads nothing of ours: tells the processes that it starts their place and device
    "data_pipeline/executors/stage_run.py",  # reads nothing: tells worker processes how many threads to start
    "data_pipeline/executors/ray.py",  # reads nothing: tells Ray to report nothing to its makers
}
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def tree_of(path):
    return ast.parse(path.read_text())


@by_file
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@by_file
def test_no_function_is_longer_than_60_lines(path):
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in long.items() if length > 60} == {}


@by_file
def test_the_environment_is_read_at_the_entrance_only(path):
    """`os.cpu_count` and the like are no environment."""
    reads = {"environ", "getenv", "putenv", "environb"}
    found = [
        f"{path.name}:{node.lineno}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in reads
    ]
    if str(path.relative_to(ROOT)) not in MAY_READ_THE_ENVIRONMENT:
        assert found == []


@by_file
def test_nothing_is_printed_but_through_a_console(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@by_file
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree_of(path))


def fields_of(schema: type[Section], path: str = ""):
    for name, field in schema.model_fields.items():
        inner = section_types(field.annotation)
        if not inner:
            yield f"{path}{name}"
        for section in inner:
            yield from fields_of(section, f"{path}{name}.")


@pytest.mark.parametrize("field", sorted(set(fields_of(TrainingRun))))
def test_every_key_of_a_training_run_is_read_somewhere(field):
    """As `.name`, or as "name" in a table, outside of the schema: a key that nobody reads is a promise nobody keeps."""
    name = re.escape(field.rsplit(".", 1)[-1])
    readers = (ROOT / "megagpt", ROOT / "evals")
    files = [path for path in FILES if "config" not in path.parts and any(map(path.is_relative_to, readers))]
    assert any(re.search(rf'\.{name}\b|"{name}":', path.read_text()) for path in files), field


def test_no_document_or_source_holds_work_that_is_put_off():
    word = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert [str(path) for path in FILES if word.search(path.read_text())] == []
