"""What a training process is told: its command line and the launcher's environment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.load import load_config, split_arguments
from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError

USAGE = """\
usage: deepspeed [--num_accelerators N | --hostfile H] launch/pretrain.py CONFIG.yaml ... [KEY=VALUE ...] [--check]

Train a model. Several YAML files add up; KEY=VALUE overrides (a key's path and a YAML value).

  deepspeed launch/pretrain.py configs/quickstart.yaml
  deepspeed --num_accelerators 2 launch/pretrain.py configs/quickstart.yaml parallel.zero_stage=2 run.dir=runs/two
  deepspeed --hostfile hosts launch/pretrain.py configs/model/gpt2_124m.yaml my_run.yaml optim.lr=3e-4

The same command goes on from the newest checkpoint (checkpoint.resume: auto | never | must).
--check resolves the configuration, prints the plan and exits; it needs no accelerator.
`megagpt config docs` lists every key. Exit codes: 0 done or stopped by a signal after saving, 2 wrong input,
3 training diverged or replicas differ, 4 a rank hung or was lost, 5 another process trains in the run's folder,
6 the last save failed, 7 a disk, the network or a host failed, and may work again. `megagpt train --restarts N` starts
again after all but 2 and 3.
"""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A parsed command line."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    check: bool
    help: bool

    def load(self) -> TrainingRun:
        """The configuration that the files and overrides add up to."""
        return load_config(TrainingRun, self.files, self.overrides)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Split a command line into files, overrides and switches.

    Raises:
        ConfigError: an option that does not exist.
    """
    switches = {"--check", "--help", "-h"} & set(argv)
    # DeepSpeed's launcher adds --local_rank; the environment says it too.
    rest = [word for word in argv if word not in switches and not word.startswith("--local_rank")]
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"command line: unknown option {word!r}; there are --check and --help")
    files, overrides = split_arguments(rest)
    return Arguments(files, overrides, check="--check" in switches, help=bool(switches & {"--help", "-h"}))


def launcher_command(
    processes: int | None, launcher_args: str, words: Sequence[str], more: Sequence[str] = ()
) -> list[str]:
    """The command that starts the DeepSpeed launcher of this very environment.

    Args:
        processes: on each host; DeepSpeed's default where None.
        launcher_args: the user's own arguments of the launcher.
        words: configuration files and overrides.
        more: arguments of the launcher that follow from other options.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    counted = ["--num_accelerators", str(processes)] if processes else []
    return [str(launcher), *counted, *more, *shlex.split(launcher_args), "--module", "megagpt.train", *words]


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says through the environment; one process where it says nothing."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int | None
    """OMP_NUM_THREADS, where it is set."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and OMP_NUM_THREADS."""
        world_size = int(environment.get("WORLD_SIZE", "1"))
        threads = environment.get("OMP_NUM_THREADS")
        return cls(
            rank=int(environment.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_world_size=int(environment.get("LOCAL_SIZE", str(world_size))),
            threads=int(threads) if threads else None,
        )
