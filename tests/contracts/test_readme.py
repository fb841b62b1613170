"""Every command that README.md, a help text or the usage of training shows can be typed: nothing is started here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from data_pipeline.config import DataJob
from megagpt.cli import main
from megagpt.config.load import load_config, split_arguments
from megagpt.config.schema import TrainingRun
from megagpt.train.command import USAGE, parse_arguments

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROGRAMS = ("make", "megagpt", "deepspeed", "pre-commit")


def block_lines(text):
    """Lines of indented code blocks, without the environment's folder."""
    return [line.strip().removeprefix(".venv/bin/") for line in text.splitlines() if line.startswith("    ")]


def examples(command):
    """Example lines of a command's help and of all below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    return [*own, *(line for one in below for line in examples(one))]


def commands():
    usage = [line.strip() for line in USAGE.splitlines() if line.startswith("  deepspeed ")]
    lines = dict.fromkeys([*block_lines(README), *usage, *examples(main)])
    return [
        line for line in lines if line.startswith(tuple(f"{program} " for program in PROGRAMS)) and "->" not in line
    ]


def check_configuration(schema, words):
    """Files under configs/ must be there; where all files are, the configuration must load."""
    files, overrides = split_arguments(words)
    for file in files:
        assert not str(file).startswith("configs/") or (ROOT / file).exists(), file
    if all((ROOT / file).exists() for file in files):
        load_config(schema, [ROOT / file for file in files], overrides)


def check_training_words(words):
    arguments = parse_arguments(words)
    check_configuration(TrainingRun, [*map(str, arguments.files), *arguments.overrides])


def check_megagpt(words):
    command = main
    while isinstance(command, click.Group):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    given = command.make_context(command.name, list(words)).params
    if command is main.commands["train"]:
        check_training_words(given["configs"])
    elif command is main.commands["data"].commands["run"]:
        check_configuration(DataJob, given["configs"])


def check_deepspeed(words):
    from deepspeed.launcher.runner import parse_args

    given = parse_args(words)
    assert (ROOT / given.user_script).exists()
    if given.user_script == "launch/generate.py":
        check_megagpt(["generate", *given.user_args])
    elif given.user_script == "launch/evaluate.py":
        check_megagpt(["eval", "run", *given.user_args])
    else:
        check_training_words(given.user_args)


def check_make(words):
    for word in words:
        variable = word.partition("=")[0] if "=" in word else None
        expected = rf"^{variable} \?=" if variable else rf"^{word}:"
        assert re.search(expected, MAKEFILE, re.MULTILINE), word


def check_pre_commit(words):
    assert words == ["install"]
    assert (ROOT / ".pre-commit-config.yaml").exists()


CHECKS = dict(zip(PROGRAMS, (check_make, check_megagpt, check_deepspeed, check_pre_commit), strict=True))


def test_commands_are_found_in_all_three_places():
    found = commands()
    assert {"make quickstart", "pre-commit install"} <= {line.partition("  ")[0] for line in found}
    assert any(line.startswith("deepspeed --hostfile hosts") for line in found), "the usage of training"
    assert len(found) > 40


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_can_be_typed(line):
    program, *words = shlex.split(line.partition(" > ")[0], comments=True)
    CHECKS[program](words)


@pytest.mark.parametrize(
    "line",
    [
        "make quickfinish",
        "make quickstart EVALDATA=x",
        "megagpt frobnicate",
        "megagpt eval run --checkpoint r --task heldout",
        "megagpt train configs/quickstart.yaml optim.lrr=1",
        "megagpt train configs/absent.yaml my_run.yaml",
        "deepspeed --accelerators 2 launch/pretrain.py configs/quickstart.yaml",
        "deepspeed launch/train.py configs/quickstart.yaml",
    ],
)
def test_this_test_can_fail(line):
    program, *words = shlex.split(line)
    with pytest.raises((Exception, SystemExit)):
        CHECKS[program](words)


def test_every_file_that_the_readme_names_is_there():
    folders = "megagpt|data_pipeline|evals|launch|configs|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w./]*)`", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
