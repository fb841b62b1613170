"""Faults of one rank, put into a training process by the test itself: nothing in the product knows of them."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOREVER = 600.0
SLOW = 8.0
"""Seconds of a write that takes long, and gets done."""


@dataclass(frozen=True)
class Fault:
    """What happens to one rank, once or from some moment on."""

    kind: str
    """One of FAULTS."""
    rank: int
    at: int
    """The call, counted from 1, of whatever the fault sits in: a step, an evaluation, a save."""
    until: int = 10**9
    """The last one."""


def train_with_fault(words: list[str], *faults: Fault) -> int:
    """As `processes.train_command`; the rank that a fault names has it."""
    from megagpt.train.run import main

    for fault in faults:
        if fault.rank in (int(os.environ["RANK"]), -1):
            FAULTS[fault.kind](fault)
    return main(words, os.environ)


def before(owner: Any, name: str, fault: Fault, work: Callable[[Any], None]) -> None:
    """Let a method do something else first, in the calls that the fault names."""
    original, calls = getattr(owner, name), [0]

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if fault.at <= calls[0] <= fault.until:
            work(self)
        return original(self, *args, **kwargs)

    setattr(owner, name, changed)


def _sleep(_: Any) -> None:
    time.sleep(FOREVER)


def _stop(_: Any) -> None:
    """The thread that the system chooses to stop first may be another one: this one must not go on until then."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1.0)


def _in_loader(work: Callable[[Any], None]) -> Callable[[Fault], None]:
    def install(fault: Fault) -> None:
        from megagpt.train.batches import TrainBatches

        before(TrainBatches, "step", fault, work)

    return install


def _in_eval(work: Callable[[Any], None]) -> Callable[[Fault], None]:
    def install(fault: Fault) -> None:
        from megagpt.train.batches import ValidationBatches

        before(ValidationBatches, "__iter__", fault, work)

    return install


def _in_writer(work: Callable[[Any], None]) -> Callable[[Fault], None]:
    """Before a file of a checkpoint is written, in whichever thread: one a save, two (the manifest) in rank 0."""

    def install(fault: Fault) -> None:
        from megagpt.checkpoint import fsio

        before(fsio, "write_file", fault, work)

    return install


def _in_publish(fault: Fault) -> None:
    """In what rank 0 does while the others wait for it."""
    from megagpt.checkpoint.store import CheckpointStore

    before(CheckpointStore, "publish", fault, _sleep)


def _preempted(fault: Fault) -> None:
    """The supervisor is asked to stop in a step; its disk is slow, and the next evaluation would last for ever."""
    import psutil

    def work(_: Any) -> None:
        psutil.Process().parents()[2].terminate()  # above launch.py and deepspeed
        time.sleep(2.0)  # the supervisor passes it on

    _in_step(work)(fault)
    _in_eval(_sleep)(Fault("", fault.rank, 2))  # the first one is that of step 0
    _in_writer(lambda _: time.sleep(SLOW))(Fault("", fault.rank, 1))


def _preempted_at_start(fault: Fault) -> None:
    """The supervisor is asked to stop before there is an engine; a rank is stopped then, and the others wait for it."""
    import psutil

    from megagpt.train import run

    def work(_: Any) -> None:
        psutil.Process().parents()[2].terminate()
        _stop(None)

    before(run, "build_engine", fault, work)


def _without_group(fault: Fault) -> None:
    """A collective of the thread that writes fails: the first one after its file."""
    import threading

    def work(_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        thread, original = threading.get_ident(), torch.distributed.all_gather_object

        def changed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise RuntimeError("Socket closed (put here by a test)")
            return original(*args, **kwargs)

        torch.distributed.all_gather_object = changed  # type: ignore[assignment]

    _in_writer(work)(fault)


def _without_beats(fault: Fault) -> None:
    """The process works on, and nobody hears of it."""
    from megagpt.train.beats import Beats

    all_beats: list[Beats] = []
    before(Beats, "__init__", Fault("", 0, 1), all_beats.append)
    _in_loader(lambda _: [beats.close() for beats in all_beats] and None)(fault)


def _in_save(fault: Fault) -> None:
    from megagpt.engine.engine import Engine

    before(Engine, "owned_slices", fault, _sleep)


def _in_step(work: Callable[[Any], None]) -> Callable[[Fault], None]:
    """Before a step's forward, with its batch at hand; a step that is computed again counts again."""

    def install(fault: Fault) -> None:
        from megagpt.engine.engine import Engine

        before(Engine, "_begin", fault, work)

    return install


def _before_comparison(work: Callable[[Any], None]) -> Callable[[Fault], None]:
    def install(fault: Fault) -> None:
        from megagpt.engine.engine import Engine

        before(Engine, "check_replicas", fault, work)

    return install


def _bad_gradient(value: float) -> Callable[[Any], None]:
    """What comes back through the last block's last matrix, once: in the first micro-batch of the step."""

    def work(engine: Any) -> None:
        *_, last = (one for name, one in engine.model.named_modules() if name.endswith("down"))
        handles: list[Any] = []

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> None:
            handles[0].remove()
            output.register_hook(lambda gradient: gradient * value)

        handles.append(last.register_forward_hook(spoil))

    return work


def _bad_weight(engine: Any) -> None:
    with torch.no_grad():
        parameter = next(iter(engine.model.parameters()))
        getattr(parameter, "ds_tensor", parameter).view(-1)[5] = float("inf")  # under ZeRO-3 its part of it


def _flipped_bit(engine: Any) -> None:
    with torch.no_grad():
        parameter = dict(engine.model.named_parameters())["blocks.1.attention.output.weight"]
        # `data`: autograd shall not learn of it.
        parameter.data.view(-1)[:1].view(torch.int32 if parameter.element_size() == 4 else torch.int16).bitwise_xor_(1)


def _flipped_after_forward(engine: Any) -> None:
    """In the step's first micro-batch, after the blocks' forward and before backward."""
    handles: list[Any] = []

    def flip(module: Any, inputs: Any, output: torch.Tensor) -> None:
        handles[0].remove()
        _flipped_bit(engine)

    handles.append(engine.model.final_norm.register_forward_hook(flip))


def _fp16_on_the_cpu(_: Fault) -> None:
    """DeepSpeed refuses it for its speed alone."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True


def _bad_loss(fault: Fault) -> None:
    from megagpt.engine.engine import Engine

    original, calls = Engine._nll, [0]

    def changed(self: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        nll = original(self, batch)
        return nll * float("nan") if fault.at <= calls[0] <= fault.until else nll

    Engine._nll = changed  # type: ignore[method-assign]


def _spike(fault: Fault) -> None:
    """The data of a batch are noise: its index is counted from 0 here, however often it is read."""
    from megagpt.train.batches import TrainBatches

    original = TrainBatches.step

    def changed(self: Any, batch: int) -> Any:
        micro_batches = original(self, batch)
        if not fault.at <= batch <= fault.until:
            return micro_batches
        from dataclasses import replace

        return [replace(one, targets=(one.inputs * 7 + 30) % 61) for one in micro_batches]

    TrainBatches.step = changed  # type: ignore[method-assign]


def _slow_forward(fault: Fault) -> None:
    """Every rank's forward takes 20 ms longer, and that of the fault's rank another 4.4 ms: 20% slower."""
    from megagpt.engine.engine import Engine

    original = Engine._nll
    seconds = 0.020 if fault.rank == -1 else 0.0044

    def changed(self: Any, batch: Any) -> torch.Tensor:
        time.sleep(seconds)
        return original(self, batch)

    Engine._nll = changed  # type: ignore[method-assign]


def _no_room_for_config(fault: Fault) -> None:
    from megagpt.train import run

    original = run.write_file

    def changed(target: Path, content: bytes) -> None:
        if target.name == "config.yaml":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        original(target, content)

    run.write_file = changed


def _no_lock(fault: Fault) -> None:
    import fcntl

    def changed(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = changed


def _no_checkpoint_seen(fault: Fault) -> None:
    from megagpt.checkpoint.store import CheckpointStore, Survey

    CheckpointStore.survey = lambda self: Survey([], {})  # type: ignore[method-assign]


def _no_room_in_save(fault: Fault) -> None:
    from megagpt.checkpoint.store import CheckpointStore

    def work(store: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder))

    before(CheckpointStore, "begin", fault, work)


def _damages_the_newest(fault: Fault) -> None:
    from megagpt.checkpoint.store import CheckpointStore
    from megagpt.train.run import CHECKPOINTS

    original = CheckpointStore.publish

    def changed(self: Any, manifest: Any, *args: Any) -> Path:
        target = original(self, manifest, *args)
        if manifest.step == 40 and not target.with_suffix(".damaged").exists():
            assert target.parent.name == CHECKPOINTS
            damaged = target / "rank_00000.safetensors"
            content = bytearray(damaged.read_bytes())
            content[-1] ^= 1
            damaged.write_bytes(content)
        return target

    CheckpointStore.publish = changed  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Fault], None]] = {
    "sleeps in loader": _in_loader(_sleep),
    "stopped": _in_loader(_stop),
    "killed": _in_loader(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "raises": _in_loader(lambda _: 1 / 0),
    "holds the interpreter": _in_loader(lambda _: ctypes.PyDLL(None).sleep(int(FOREVER))),
    "sleeps in step": _in_step(_sleep),
    "sleeps in eval": _in_eval(_sleep),
    "asked to stop in eval": _in_eval(lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "asked to stop in step": _in_step(lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "stopped in eval": _in_eval(_stop),
    "killed in eval": _in_eval(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "sleeps in save": _in_save,
    "sleeps in writer": _in_writer(_sleep),
    "stopped in writer": _in_writer(_stop),
    "killed in writer": _in_writer(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "preempted": _preempted,
    "preempted at start": _preempted_at_start,
    "sleeps in publish": _in_publish,
    "loses the group of saves": _without_group,
    "gives no sign of life": _without_beats,
    "slow steps": _in_step(lambda _: time.sleep(0.05)),
    "nan gradient": _in_step(_bad_gradient(float("nan"))),
    "inf gradient": _in_step(_bad_gradient(float("inf"))),
    "inf weight": _in_step(_bad_weight),
    "nan loss": _bad_loss,
    "flipped bit in step": _in_step(_flipped_bit),
    "flipped bit after forward": _in_step(_flipped_after_forward),
    "asked to stop": _in_loader(lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "fp16 on the CPU": _fp16_on_the_cpu,
    "flipped bit": _before_comparison(_flipped_bit),
    "inf weight after update": _before_comparison(_bad_weight),
    "noise": _spike,
    "slow forward": _slow_forward,
    "no room for config.yaml": _no_room_for_config,
    "no lock": _no_lock,
    "sees no checkpoint": _no_checkpoint_seen,
    "no room in save": _no_room_in_save,
    "damages the newest checkpoint": _damages_the_newest,
}
