"""The command line of a training process, and what the launcher's environment says."""

import sys
from pathlib import Path

import pytest

from megagpt.errors import ConfigError
from megagpt.train.command import Launch, launcher_command, parse_arguments


def test_files_overrides_and_switches_may_come_in_any_order():
    found = parse_arguments(["optim.lr=1", "a.yaml", "--check", "b.yml", "run.dir=x=y"])
    assert found.files == (Path("a.yaml"), Path("b.yml"))
    assert found.overrides == ("optim.lr=1", "run.dir=x=y")
    assert (found.check, found.help) == (True, False)


def test_the_launchers_own_word_is_passed_over():
    assert parse_arguments(["--local_rank=1", "a.yaml"]).files == (Path("a.yaml"),)


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="unknown option '--chekc'; there are --check and --help"):
        parse_arguments(["--chekc", "a.yaml"])


def test_without_a_launcher_there_is_one_process():
    assert Launch.from_environment({}) == Launch(0, 1, 0, 1, None)


def test_the_launchers_environment_is_read():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "OMP_NUM_THREADS": "3"}
    assert Launch.from_environment(environment) == Launch(5, 8, 1, 4, 3)


def test_the_launcher_of_this_environment_is_started():
    command = launcher_command(2, "--hostfile 'my hosts'", ["a.yaml", "optim.lr=1"])
    assert command[0] == str(Path(sys.executable).with_name("deepspeed"))
    assert command[1:] == [
        "--num_accelerators",
        "2",
        "--hostfile",
        "my hosts",
        "--module",
        "megagpt.train",
        "a.yaml",
        "optim.lr=1",
    ]
    assert "--num_accelerators" not in launcher_command(None, "", ["a.yaml"])
