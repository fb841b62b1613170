"""The command tree: quick, helpful, and without a traceback. What the commands do is tested where it is done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megagpt import __version__
from megagpt.cli import main
from tests.tiny import run_words

ROOT = Path(__file__).resolve().parent.parent


def commands(group: click.Group, *path: str):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)


def invoke(*words):
    return CliRunner().invoke(main, list(words))


def python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def best_seconds(code: str, times: int = 3) -> float:
    """The fastest of several: a busy machine makes it longer, never shorter."""
    measured = []
    for _ in range(times):
        started_at = time.perf_counter()
        python(code)
        measured.append(time.perf_counter() - started_at)
    return min(measured)


def test_importing_the_command_line_loads_no_heavy_package():
    heavy = "{'torch', 'deepspeed', 'numpy', 'pydantic', 'transformers', 'datasets', 'rich', 'ruamel'}"
    assert python(f"import sys, megagpt.cli; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_help_is_there_in_the_blink_of_an_eye():
    """0.3 s for the import and 0.5 s for the help, over what Python itself takes to start."""
    empty = best_seconds("pass")
    assert best_seconds("import megagpt.cli") - empty < 0.3
    assert best_seconds("import sys; sys.argv[1:] = ['--help']; from megagpt.cli import main; main()") - empty < 0.5


@pytest.mark.parametrize("path", list(commands(main)), ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(path):
    result = invoke(*path, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"  megagpt {' '.join(path)} " in result.output or f"  megagpt {' '.join(path)}\n" in result.output
    first_line = result.output.split("\n\n")[1].strip()
    assert first_line.endswith("."), "a sentence says what the command does"


def test_no_line_of_any_help_is_broken_inside_an_example():
    for path in commands(main):
        examples = invoke(*path, "--help").output.split("Examples:\n")[1]
        assert all(line.startswith(("  megagpt ", "  deepspeed ")) for line in examples.splitlines() if line.strip())


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["data", "frobnicate"], ["report"], ["train"], ["eval", "run", "--limit", "0"]]
)
def test_a_wrong_command_line_ends_with_2_and_shows_the_usage(words):
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert "Traceback" not in result.output


def test_the_version_is_told():
    assert __version__ in invoke("--version").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such configuration file"),
        (["train", "optim.lr=fast"], "optim.lr"),
        (["data", "run", "absent.yaml"], "absent.yaml: no such configuration file"),
        (["checkpoint", "list", "absent"], "absent/checkpoints: no such folder"),
        (["checkpoint", "verify", "absent"], "absent/checkpoints: no such folder"),
        (["generate", "--checkpoint", "absent", "--prompt", "a"], "absent"),
        (["convert", "to-hf", "absent", "out"], "absent"),
        (["convert", "from-hf", "absent", "out"], "absent"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["train", "data"])
def test_the_reference_names_every_section_and_the_schema_is_json(job):
    schema = json.loads(invoke("config", "schema", "--job", job).output)
    docs = invoke("config", "docs", "--job", job).output
    assert schema["properties"]
    for section in schema["properties"]:
        assert section in docs


def test_check_prints_the_plan_without_torch(tmp_path, tokens):
    words = ["train", "--check", "--processes", "2", *run_words(tmp_path / "run", tokens)]
    code = f"""
import sys
sys.argv[1:] = {words!r}
from megagpt.cli import main
try:
    main()
except SystemExit as end:
    print(end.code, sorted({{'torch', 'deepspeed'}} & set(sys.modules)))
"""
    out = python(code)
    assert "8 sequences x 16 tokens = 128 a step" in out
    assert out.splitlines()[-1] == "0 []"
    assert not (tmp_path / "run").exists()
