"""`megagpt train` and `megagpt plan`: thin, as cli.py; imports stand inside the command."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, WITH_EXTRA_WORDS, examples
from megagpt.errors import ConfigError


@click.command(
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt train configs/quickstart.yaml",
        "megagpt train --processes 2 configs/quickstart.yaml parallel.zero_stage=2 run.dir=runs/two",
        "megagpt train --hostfile hosts configs/model/gpt2_124m.yaml my_run.yaml optim.lr=3e-4",
        "megagpt train --hostfile hosts --hosts 16 --restarts 5 my_run.yaml    # the others in the file are spare",
        "megagpt train --launcher-args '--master_port 29600' configs/quickstart.yaml",
        "megagpt train --check configs/quickstart.yaml",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--processes", type=click.IntRange(min=1), help="Processes (accelerators) on each host; DeepSpeed's default."
)
@click.option("--hostfile", type=PATH, help="Lines `NAME slots=N`, as for `deepspeed --hostfile`; this host if none.")
@click.option("--launcher-args", default="", help="Further arguments of the `deepspeed` launcher, as one string.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    help="Start again after a failure; give up when so many restarts in a row brought no new checkpoint. With "
    "--hostfile, hosts that do not answer are left out, and the file is read again each time.",
)
@click.option("--hosts", type=click.IntRange(min=1), help="With --restarts: use so many hosts, keep the others spare.")
@click.option("--ssh-port", type=int, help="With --restarts: as for deepspeed --ssh_port.")
@click.option(
    "--wait",
    default=5.0,
    show_default=True,
    help="With --restarts: seconds before the first one; doubled after each "
    "further failure without progress, 300 at most.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    help="With --restarts: seconds that processes of this host have to save and end by themselves after a stop or a "
    "failure, counted anew while their save grows; then they are killed. Unset: watch.save_seconds and 300 more; "
    "without limit where that is 0. A second Ctrl-C kills them at once.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Resolve the configuration, print the plan for --processes (1 where not given) and exit; no accelerator is "
    "needed.",
)
def train(configs: tuple[str, ...], processes: int | None, check: bool, **options: Any) -> None:  # noqa: FBT001
    """Train a model under the DeepSpeed launcher. CONFIGS are YAML files, then KEY=VALUE overrides.

    Exit codes: 0 done, or stopped by a signal after saving; 2 wrong input; 3 training diverged; 4 a rank hung or was
    lost; 5 another process trains in the run's folder; 6 the last save failed; 7 a disk, the network or a host failed,
    and may work again; 130 (Ctrl-C) and 143 (SIGTERM): stopped with nothing saved; 1 a fault of the program. With
    --restarts, 2 and 3 end the run at once; everything else is tried again, too few hosts that answer among it.

    SIGTERM, SIGUSR1 or Ctrl-C: the step that is being computed is finished and saved, evaluations that are due then are
    left out. On one host, the ranks then have as long as they need (--grace). On several, DeepSpeed's launcher sends
    them SIGTERM over ssh and kills them 30 seconds later (deepspeed/launcher/launch.py): where a save takes longer, let
    the scheduler signal the ranks themselves, as srun does.
    """
    from megagpt.train.command import launcher_command, parse_arguments

    config = parse_arguments(configs).load()  # wrong input is told before any process starts
    if check:
        from megagpt.train.describe import check_run

        click.echo(check_run(config, processes or 1))
        return
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = partial(launcher_command, processes, options["launcher_args"])
    if options["hosts"] is not None and options["hostfile"] is None:
        raise ConfigError("--hosts says how many of --hostfile to use; say --hostfile too")
    if options["restarts"] is not None:
        click.get_current_context().exit(_supervise(config, command, environment, configs, **options))
    if options["hosts"] is not None:
        raise ConfigError("--hosts goes with --restarts; without it, say --launcher-args '--num_nodes N'")
    if options["grace"] is not None:
        raise ConfigError("--grace goes with --restarts; without it, the launcher itself decides")
    if options["ssh_port"] is not None:
        raise ConfigError("--ssh-port goes with --restarts; without it, say --launcher-args '--ssh_port N'")
    words = command(configs, _hostfile_words(options["hostfile"]))
    os.execve(words[0], words, environment)  # signals then reach the launcher itself


def _supervise(config: Any, command: Any, environment: dict[str, str], configs: tuple[str, ...], **options: Any) -> int:
    from megagpt.supervise.hosts import Hosts
    from megagpt.supervise.leftovers import save_grace
    from megagpt.supervise.supervisor import Patience, Supervisor

    def say(line: str) -> None:
        click.secho(f"megagpt: {line}", fg="yellow", err=True)

    hostfile: Path | None = options["hostfile"]
    port = [] if options["ssh_port"] is None else ["--ssh_port", str(options["ssh_port"])]
    hosts = Hosts(hostfile, config, options["hosts"], options["ssh_port"], say) if hostfile is not None else None

    def words() -> list[str]:
        chosen = hosts.launcher_arguments() if hosts is not None else []
        found: list[str] = command((*configs, "checkpoint.fall_back=true"), [*port, *chosen])
        return found

    # pdsh waits for ssh, and ssh by itself for ever for a host that has gone.
    environment.setdefault("PDSH_SSH_ARGS_APPEND", "-o ServerAliveInterval=15 -o ServerAliveCountMax=4")
    grace: float | None = options["grace"]
    seconds = save_grace(config.watch.save_seconds) if grace is None else grace
    patience = Patience(options["restarts"], options["wait"], grace_seconds=seconds)
    supervisor = Supervisor(config.run.dir, words, environment, patience, say, config.train.max_steps)
    return supervisor.run()


def _hostfile_words(hostfile: Path | None) -> list[str]:
    return [] if hostfile is None else ["--hostfile", str(hostfile)]


@click.command(
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt plan configs/model/llama_7b.yaml my_run.yaml --world-size 64 --memory 70 --per-node 8",
        "megagpt plan configs/quickstart.yaml --world-size 4",
        "megagpt plan my_run.yaml train.micro_batch_size=2 --world-size 512 --memory 70 --json",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option("--world-size", type=click.IntRange(min=1), required=True, help="Processes (accelerators) of the run.")
@click.option("--memory", type=float, help="GiB of an accelerator: leave out what needs more.")
@click.option("--per-node", type=click.IntRange(min=1), help="Accelerators of a host: no tensor group over two.")
@click.option("--top", type=click.IntRange(min=1), default=15, show_default=True, help="Layouts to show.")
@click.option("--json", "json_out", is_flag=True, help="Print all of them as JSON, with the words that choose each.")
def plan(configs: tuple[str, ...], top: int, json_out: bool, **options: Any) -> None:  # noqa: FBT001
    """Every layout that can run on a number of processes, with its memory, the most promising first.

    CONFIGS are those of a run; degrees, ZeRO stage and recomputation are varied, all else stays. Memory is by the
    formulas that `megagpt bench layouts` compares with what tensors really need. The order is a rule of thumb (time
    lost to recomputation and to waiting stages, then traffic), not a measurement. Below the table stand the words of
    the first one.
    """
    from rich.console import Console

    from megagpt.train.command import parse_arguments
    from megagpt.train.layout_table import as_json, as_table, plan_layouts

    found = plan_layouts(parse_arguments(configs).load(), options["world_size"], options["memory"], options["per_node"])
    if json_out:
        click.echo(as_json(found))
        return
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    console.print(as_table(found, top))
    click.echo(found[0].overrides)
