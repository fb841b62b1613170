"""One training process from its command line to its exit code. Read it from `run_training` downwards."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from megagpt.atomic import write_file
from megagpt.checkpoint.choose import choose_step
from megagpt.checkpoint.open import CHECKPOINTS, rank_files
from megagpt.checkpoint.save import Identity, verify_together
from megagpt.checkpoint.saver import Saver
from megagpt.checkpoint.store import CheckpointStore, Manifest, Survey
from megagpt.checkpoint.tensors import SliceReader
from megagpt.config.load import dump_config
from megagpt.config.schema import TrainingRun
from megagpt.data.manifest import read_manifest
from megagpt.data.mixture import Mixture, open_mixture
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointDamaged, CheckpointUnreadable, MegaGPTError, RunBusy
from megagpt.lock import locked_folder
from megagpt.model import flops
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan, plan_batches
from megagpt.tokenizer import Tokenizer
from megagpt.train.batches import TrainBatches, ValidationBatches
from megagpt.train.beats import Member
from megagpt.train.benchmarks import Benchmarks, OpenBenchmarks, open_benchmarks
from megagpt.train.build import attention_of, build_engine
from megagpt.train.command import USAGE, Launch, parse_arguments
from megagpt.train.compatible import changed_values, check_resumable, check_tokens
from megagpt.train.describe import check_run, describe_plan, package_versions
from megagpt.train.environment import check_rendezvous
from megagpt.train.events import log_event, log_start, tell_damage
from megagpt.train.loop import Collaborators, train
from megagpt.train.metrics import CutOff, JsonlSink, Metrics, Say, Sink, TensorBoardSink, WandbSink
from megagpt.train.progress import ProgressLine
from megagpt.train.rows import METRICS, make_durable
from megagpt.train.schedule import lr_schedule
from megagpt.train.start import COLLECTIVE_TIMEOUT, process_store, start_mesh
from megagpt.train.state import TrainState
from megagpt.train.stop import StopRequest, look_at_deepspeed
from megagpt.train.watch import Watch, collective_timeout, save_timeout

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of Ctrl-C before there is anything to save, as a shell tells it."""
_SECONDS_TO_TELL = 1.0


def main(argv: Sequence[str], environment: Mapping[str, str], opener: OpenBenchmarks | None = None) -> int:
    """Run one process; the exit code. `opener` brings what scores `eval.tasks`."""
    launch = Launch.from_environment(environment)
    console = Console(quiet=launch.rank != 0)
    try:
        arguments = parse_arguments(argv)
        if arguments.help:
            console.print(USAGE, highlight=False, markup=False)
            return 0
        config = arguments.load()
        if arguments.check:
            checked = check_run(config, launch.world_size)
            console.print(checked, highlight=False, markup=False, soft_wrap=True)
            return 0
        plan = plan_batches(config, launch.world_size)
        check_rendezvous(environment)
        run_training(config, plan, launch, console, opener)
    except MegaGPTError as error:
        if launch.local_rank != 0:
            # The launcher ends all ranks when it sees one that has ended, and the one that tells shall come to it.
            time.sleep(_SECONDS_TO_TELL)
        else:  # each host tells: a file may be missing on one of them alone
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def exit_process(code: int) -> NoReturn:
    """End at once, without the interpreter's teardown.

    Everything is written and closed by now. Threads of gloo and of DeepSpeed's process groups may still be joinable
    when their objects are destroyed, which aborts the process ("terminate called without an active exception") after
    its work is done, and the launcher then reports a run that succeeded as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_training(
    config: TrainingRun, plan: BatchPlan, launch: Launch, console: Console, opener: OpenBenchmarks | None = None
) -> None:
    """Train one run to its end: data, mesh, model, engine, state, loop."""
    busy = RunBusy(f"{config.run.dir}: another process trains here; wait for it to end, or set another run.dir")
    launcher_gone = look_at_deepspeed()
    watching = Watch(config.watch, config.run.dir, launch.rank, launcher_gone=launcher_gone)
    with watching as watch, ExitStack() as held:
        mixture = open_mixture(config.data.train, plan.seq_len, config.run.seed)
        tokenizer = check_tokens(config, mixture)
        mesh = start_mesh(launch, config.parallel, collective_timeout(config.watch, COLLECTIVE_TIMEOUT))
        watch.join(process_store(), mesh.gather(Member.of_this_process(mesh.rank)))
        mesh.on_main(lambda: held.enter_context(locked_folder(config.run.dir, busy)))
        benchmarks = mesh.together(lambda: open_benchmarks(config, tokenizer, mesh, opener))
        opened = Opened(plan, mixture, tokenizer, benchmarks, launcher_gone)
        _train_in_folder(config, opened, mesh, console, watch)
    torch.distributed.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Opened:
    """What a run has before there is a model."""

    plan: BatchPlan
    mixture: Mixture
    tokenizer: Tokenizer | None
    benchmarks: Benchmarks | None
    launcher_gone: Callable[[], bool]


def _train_in_folder(config: TrainingRun, opened: Opened, mesh: Mesh, console: Console, watch: Watch) -> None:
    plan, mixture = opened.plan, opened.mixture
    validation = _open_validation(config, plan, mesh)
    store = CheckpointStore(config.run.dir / CHECKPOINTS)
    newest = _newest_checkpoint(store, config, mixture, mesh, console)
    if newest is not None and newest.step >= config.train.max_steps:
        console.print(f"{config.run.dir}: complete at step {newest.step}; nothing to do", highlight=False, markup=False)
        return
    engine = build_engine(config, plan, mesh)
    state = mesh.together(lambda: _restore(engine, store, newest))
    identity = mesh.together(lambda: _identity(config, mixture, opened.tokenizer, mesh))
    changes = _changes(newest, identity)
    mesh.on_main(lambda: _write_run_files(config, plan, engine, identity))
    progress = ProgressLine(console, config.train.max_steps, state.step, shown=mesh.is_main and config.log.progress)
    metrics, cut_off = mesh.together(lambda: _open_metrics(config, state, mesh, progress.say))
    stop = StopRequest(opened.launcher_gone)
    told = {"world_size": plan.world_size} | ({"changed": changes} if changes else {})
    mesh.on_main(lambda: log_start(config.run.dir, state.step, cut_off, **told))
    with progress, closing(metrics), _saver(config, engine, store, identity, progress, watch) as saver:
        progress.say(_greeting(config, state, engine))
        for line in () if opened.benchmarks is None else opened.benchmarks.lines:
            progress.say(line)
        for key, (before, now) in changes.items():
            progress.say(f"changed since the checkpoint: {key} from {before!r} to {now!r}")
        final = train(
            config,
            state,
            Collaborators(
                engine=engine,
                batches=TrainBatches(mixture, plan, mesh),
                validation=validation,
                benchmarks=opened.benchmarks,
                schedule=lr_schedule(config.optim, config.train.max_steps),
                metrics=metrics,
                progress=progress,
                stop=stop,
                saver=saver,
                restore=lambda: _restore_newest(engine, store, config),
                watch=watch,
                event=partial(log_event, config.run.dir) if mesh.is_main else _no_event,
                mfu_per_token_rate=_mfu_per_token_rate(config, plan, mesh),
            ),
        )
    if final.step < config.train.max_steps:
        mesh.on_main(lambda: log_event(config.run.dir, "stopped", final.step, cause=stop.cause))
    else:
        mesh.on_main(lambda: log_event(config.run.dir, "finished", final.step))


def _newest_checkpoint(
    store: CheckpointStore, config: TrainingRun, mixture: Mixture, mesh: Mesh, console: Console
) -> Manifest | None:
    """The checkpoint to go on from, verified; None to start at step 0."""
    found = _survey(store, mesh)
    step = choose_step(store.folder, found, config.checkpoint.resume)
    for name, why in found.rejected.items():
        console.print(f"{store.folder / name}: not taken: it {why}", highlight=False, markup=False, soft_wrap=True)
    if step is None:
        return None
    manifest = _verified(store, found.steps, config, mesh)
    check_resumable(config, manifest, mixture.fingerprint, store.step_dir(manifest.step))
    return manifest


def _survey(store: CheckpointStore, mesh: Mesh) -> Survey:
    """What the main process sees. A shared folder may look older from any host, for a while after a restart.

    Raises:
        CheckpointUnreadable: another process sees a newer checkpoint.
    """
    surveys = mesh.gather(mesh.together(store.survey))
    newest = [found.steps[-1] if found.steps else -1 for found in surveys]
    if max(newest) > newest[0]:
        rank = newest.index(max(newest))
        raise CheckpointUnreadable(
            f"{store.step_dir(max(newest))}: rank {rank} sees it and rank 0 does not: it sees "
            + (f"step {newest[0]}" if surveys[0].steps else "no checkpoint")
            + ". All hosts must see the same folder; where they do after a while, the same command goes on"
        )
    return surveys[0]


def _verified(store: CheckpointStore, steps: list[int], config: TrainingRun, mesh: Mesh) -> Manifest:
    """The newest checkpoint that is whole; the only one that is left is never set aside, nor what cannot be read."""
    for step in reversed(steps[1:]):
        try:
            return verify_together(store.step_dir(step), mesh)
        except CheckpointDamaged as error:
            if not config.checkpoint.fall_back:
                raise
            cause = str(error)
            mesh.on_main(lambda: store.set_aside(step))  # noqa: B023 - called at once
            mesh.on_main(lambda: log_event(config.run.dir, "set_aside", step, cause=cause))  # noqa: B023
    return verify_together(store.step_dir(steps[0]), mesh)


def _restore(engine: Engine, store: CheckpointStore, newest: Manifest | None) -> TrainState:
    if newest is None:
        return TrainState()
    state = TrainState.from_dict(newest.state)
    with SliceReader(rank_files(store.step_dir(newest.step), newest)) as reader:
        engine.restore(reader, state.engine)
    return state


def _restore_newest(engine: Engine, store: CheckpointStore, config: TrainingRun) -> TrainState | None:
    """Put a running engine back to its newest checkpoint that is whole, as at a start; None where there is none."""
    found = _survey(store, engine.mesh)
    found.check_newest_readable(store.folder)
    if not found.steps:
        return None
    manifest = _verified(store, found.steps, config, engine.mesh)
    return engine.mesh.together(lambda: _restore(engine, store, manifest))


def _no_event(name: str, step: int, **details: Any) -> None:
    """The main process writes the run's history."""


def _identity(config: TrainingRun, mixture: Mixture, tokenizer: Tokenizer | None, mesh: Mesh) -> Identity:
    files: tuple[Path, ...] = ()
    if tokenizer is not None and mesh.is_main:
        folder = config.run.dir / "tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        files = (tokenizer.save(folder),)
    return Identity(
        config=json.loads(config.model_dump_json()),
        data_fingerprint=mixture.fingerprint,
        tokenizer=tokenizer.describe() if tokenizer is not None else None,
        tokenizer_files=files,
        versions=package_versions(),
    )


def _write_run_files(config: TrainingRun, plan: BatchPlan, engine: Engine, identity: Identity) -> None:
    """What makes the run's folder tell its own story."""
    run_dir = config.run.dir
    run_dir.mkdir(parents=True, exist_ok=True)
    described = describe_plan(config, plan) | {"optimizer": engine.optimizer_class}
    described["attention"] = attention_of(config, engine.mesh.device.type).name
    data = read_manifest(_first_prefix(config))
    described["data_manifest_hash"] = data.hash if data is not None else None
    write_file(run_dir / "config.yaml", dump_config(config).encode())
    write_file(run_dir / "versions.json", (json.dumps(identity.versions, indent=1) + "\n").encode())
    write_file(run_dir / "plan.json", (json.dumps(described, indent=1) + "\n").encode())


def _changes(newest: Manifest | None, identity: Identity) -> dict[str, tuple[Any, Any]]:
    """Configuration keys and package versions that are not those of the checkpoint: name -> (before, now)."""
    if newest is None or newest.data_fingerprint is None:  # imported weights had no run before
        return {}
    versions = changed_values(newest.versions, identity.versions, "versions.")
    return changed_values(newest.config, identity.config) | versions


def _first_prefix(config: TrainingRun) -> Path:
    train_data = config.data.train
    return train_data if isinstance(train_data, Path) else train_data[0].prefix


def _open_metrics(config: TrainingRun, state: TrainState, mesh: Mesh, say: Say) -> tuple[Metrics, CutOff]:
    if not mesh.is_main:
        return Metrics([], say), CutOff()
    run_dir = config.run.dir
    last_kept = state.step or -1  # a run that starts at step 0 evaluates there again
    jsonl = JsonlSink(run_dir / METRICS, last_kept, say)
    tell_damage(run_dir, state, jsonl, say)
    sinks: list[Sink] = [jsonl]
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", last_kept))
    if config.log.wandb_project is not None:
        sinks.append(WandbSink(config.log.wandb_project, run_dir, json.loads(config.model_dump_json())))
    return Metrics(sinks, say), jsonl.cut_off


def _open_validation(config: TrainingRun, plan: BatchPlan, mesh: Mesh) -> ValidationBatches | None:
    if config.data.val is None or not config.eval.every:
        return None
    return ValidationBatches(config.data.val, config.eval.sequences, plan, mesh)


def _saver(
    config: TrainingRun,
    engine: Engine,
    store: CheckpointStore,
    identity: Identity,
    progress: ProgressLine,
    watch: Watch,
) -> Saver:
    story = _Story(config.run.dir, progress, is_main=engine.mesh.is_main)
    timeout = save_timeout(config.watch)
    slices = engine.owned_slices
    return Saver(store, engine.mesh, config.checkpoint, identity, slices, story, timeout, watch.writing)


@dataclass(frozen=True, slots=True)
class _Story:
    """Terminal and history of the run, for the saver."""

    run_dir: Path
    progress: ProgressLine
    is_main: bool

    def say(self, message: str) -> None:
        """A line on the terminal of the main process."""
        self.progress.say(message)

    def event(self, name: str, step: int, **details: Any) -> None:
        """A line of events.jsonl."""
        if self.is_main:
            log_event(self.run_dir, name, step, **details)

    def make_durable(self) -> None:
        """Flush metrics.jsonl and events.jsonl; a checkpoint is not given up for them."""
        if self.is_main:
            try:
                make_durable(self.run_dir)
            except OSError as error:
                self.say(f"warning: {self.run_dir}: metrics and events may not survive a power cut: {error}")


def _mfu_per_token_rate(config: TrainingRun, plan: BatchPlan, mesh: Mesh) -> float | None:
    peak = config.log.peak_tflops
    if peak is None and mesh.device.type == "cuda":
        peak = flops.peak_tflops(torch.cuda.get_device_name(mesh.device))
    if peak is None:
        return None
    return float(flops.flops_per_token(config.model, plan.seq_len)) / (peak * 1e12 * mesh.world_size)


def _greeting(config: TrainingRun, state: TrainState, engine: Engine) -> str:
    start = f"resuming at step {state.step}" if state.step else "starting"
    return (
        f"{config.run.dir}: {start}; {flops.parameter_count(config.model):,} parameters, {config.train.dtype}, "
        f"ZeRO-{config.parallel.zero_stage} over {engine.mesh.world_size} processes ({engine.optimizer_class})"
    )
