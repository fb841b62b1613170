"""`megagpt eval run` in every process of a launcher: the same evaluation, its work shared out over a mesh."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console

from evals.results import TaskResult
from evals.run import DTYPES, EvalRequest, run_evals
from evals.sharing import Sharing
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.errors import MegaGPTError
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.mesh import Mesh
from megagpt.train.beats import Member
from megagpt.train.command import Launch
from megagpt.train.shared import read_share, shared_mesh
from megagpt.train.start import COLLECTIVE_TIMEOUT, process_store
from megagpt.train.stop import look_at_deepspeed
from megagpt.train.watch import Watch, collective_timeout

_SECONDS_TO_TELL = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How the processes share the model; what is left of them shares the work."""

    tensor: int = 1
    pipeline: int = 1
    cut_weights: bool = False
    """Over what is left as well, as under ZeRO-3."""


def run_together(request: EvalRequest, launch: Launch, layout: Layout, console: Console) -> Sequence[TaskResult]:
    """Evaluate in this process's place. The results are the same on all; the main one has written them.

    Whatever ends one process ends all of them: the watch of training (`watch.eval_seconds` from one exchange of
    answers to the next) writes its stacks and its history to the run's evals/. They end with `deepspeed` too; what
    was answered by then is on disk.

    Raises:
        MegaGPTError: as `run_evals`, on every process.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    settings = checkpoint.config.watch
    with Watch(
        settings, checkpoint.run_dir / "evals", launch.rank, launcher_gone=look_at_deepspeed(), saves=False
    ) as watch:
        timeout = collective_timeout(settings, COLLECTIVE_TIMEOUT)
        mesh = shared_mesh(checkpoint, launch, **asdict(layout), timeout=timeout)
        watch.join(process_store(), mesh.gather(Member.of_this_process(mesh.rank)))
        model = mesh.together(lambda: _read(checkpoint, mesh, request, cut_weights=layout.cut_weights))
        watch.enter("eval", 0)
        sharing = Sharing(mesh, settle=model.finish, on_round=partial(watch.enter, "eval"))
        results = run_evals(request, console, lambda _: model, sharing)
        mesh.barrier()
    torch.distributed.destroy_process_group()
    return results


def _read(checkpoint: Checkpoint, mesh: Mesh, request: EvalRequest, *, cut_weights: bool) -> ParallelDecoder:
    """In fp32 so that the scores are those of one process; in half precision sums round off more than that anyway."""
    exact = request.dtype == "fp32"
    return read_share(checkpoint, mesh, DTYPES[request.dtype], exact=exact, cut_weights=cut_weights)


def exit_code(error: MegaGPTError, launch: Launch) -> int:
    """What a process ends with; all but the first of a host wait, so that the launcher sees the one that tells."""
    if launch.local_rank != 0:
        time.sleep(_SECONDS_TO_TELL)
    return error.exit_code
