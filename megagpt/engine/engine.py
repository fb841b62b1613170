"""One optimizer step, evaluation, state in and out: everything that training asks of DeepSpeed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megagpt.checkpoint.tensors import MOMENTS, SliceReader, TensorSlice
from megagpt.config.schema import TrainingRun
from megagpt.engine import slices
from megagpt.engine.adamw import fused_adamw
from megagpt.engine.bf16 import spare_copies
from megagpt.engine.corrections import unname_shared_buffers, unscale_with_the_scale_of_the_step
from megagpt.engine.disk import ScratchFile, reserve_for, swapping_through
from megagpt.engine.ds_config import ds_config
from megagpt.engine.gate import Gate
from megagpt.engine.inspect import BadGradients, Inspection, NonFinite, depth_of, gradients_inspected, origins
from megagpt.engine.loss_scale import SMALLEST, LossScale
from megagpt.engine.op_lock import use_locks_that_end_with_their_process
from megagpt.engine.replicas import bad_weights, check_replicas
from megagpt.engine.sharded import fill_in_parts
from megagpt.engine.sharded_muon import ShardedMuon
from megagpt.engine.stopwatch import Stopwatch
from megagpt.errors import ConfigError, DataError, TrainingDiverged
from megagpt.model.batch import TokenBatch
from megagpt.model.decoder import Decoder
from megagpt.model.init import initial_weights
from megagpt.parallel.apply_tensor import prepare_parameters
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.norm import global_norm
from megagpt.parallel.plan import BatchPlan

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Judge = Callable[[float, float], bool]
"""(loss in nats, gradient norm before clipping), both finite -> whether the update is made."""


class EvaluationBatches(Sized, Iterable[TokenBatch], Protocol):
    """Batches of the same shape, equally many on every process."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step gave, the same on every process."""

    loss: float
    """Mean negative log-likelihood of the step's target tokens, nats."""
    grad_norm: float
    """Global L2 norm before clipping; NaN where it is not finite."""
    skipped: bool
    """Nothing was updated: gradients overflowed in fp16, were not finite, or the judge refused the update."""
    loss_scale: float | None
    """fp16 only: of the next step, where this one's overflow, if it has one, is the scale's."""
    stop_requested: bool
    """Some process was asked to stop."""
    scale_can_fall: bool = False
    """fp16: where the gradient norm is not finite, it may be by a loss scale that is lowered for it."""


def init_distributed(timeout: timedelta, *, device_type: Literal["cuda", "cpu"]) -> None:
    """Join the process group that the launcher's environment describes."""
    use_locks_that_end_with_their_process()  # DeepSpeed loads an operation now, others with the optimizer
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    backend = "nccl" if device_type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    if backend == "gloo":
        torch.distributed.barrier()
        unname_shared_buffers()


class Engine:
    """A model under DeepSpeed. `PipelinedEngine` is the same where the layers are shared out over stages.

    Args:
        model: from `megagpt.train.build.build_share`: with its initial weights, on the CPU, the same on every process
            of a data axis; under ZeRO-3 without them.
        param_groups: torch optimizer groups over the model's parameters.
    """

    def __init__(
        self,
        model: Decoder,
        param_groups: list[dict[str, Any]],
        config: TrainingRun,
        plan: BatchPlan,
        mesh: Mesh,
    ) -> None:
        self.mesh = mesh
        self.plan = plan
        self.model = model
        self.dtype = TORCH_DTYPES[config.train.dtype]
        self._zero_stage = config.parallel.zero_stage
        self._norm_is_told = config.parallel.zero_stage > 0 or config.optim.name == "muon"
        _check_dtype(config.train.dtype, mesh.device)
        prepare_parameters(model, model.shards, mesh)
        self._engine = self._initialize(self._optimizer(param_groups, config), config)
        self._loss_scale: LossScale | None = None
        if config.train.dtype == "fp16":
            unscale_with_the_scale_of_the_step(self._engine.optimizer)
            self._loss_scale = LossScale(self._engine.optimizer)
        spare_copies(self._engine, mesh.zero_parallel)
        self._gate = Gate(self._engine.optimizer)
        self._judge: Judge | None = None
        self._together = self._compares = False
        self._losses: list[Tensor] = []
        self._inspected: BadGradients | None = None
        self._stopwatch = Stopwatch(mesh.device)

    def _optimizer(self, param_groups: list[dict[str, Any]], config: TrainingRun) -> torch.optim.Optimizer:
        if config.optim.name == "adamw":
            tied = self.model.shared_with_other_end is not None
            return fused_adamw(param_groups, config.optim, wherever_they_lie=tied)
        is_sharded = config.parallel.zero_stage > 0
        optimizer = ShardedMuon(self.model, param_groups, config.optim, self.mesh, sharded=is_sharded, dtype=self.dtype)
        self.model.to(self.dtype)  # DeepSpeed is told fp32, in which it has no wrapper that would step in between
        return optimizer

    def _initialize(self, optimizer: torch.optim.Optimizer, config: TrainingRun) -> Any:
        settings = ds_config(config, self.plan)
        if self._zero_stage == 3:
            values = initial_weights(self.model, config.run.seed)
            fill_in_parts(self.model, values, self.dtype, settings, self.mesh)
        folder = config.parallel.nvme_dir
        scratch = self.mesh.together(lambda: ScratchFile(folder)) if folder is not None else None
        with swapping_through(scratch):
            engine, *_ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=settings,
                mpu=self.mesh.mpu,
                dist_init_required=False,
            )
        if scratch is not None:
            self.mesh.together(lambda: reserve_for(engine.optimizer, scratch))
        return engine

    @property
    def optimizer_class(self) -> str:
        """The class that DeepSpeed chose: it decides how gradients are accumulated and sharded."""
        return type(self._engine.optimizer).__name__

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's, for the files of this package."""
        return self._engine.optimizer

    @property
    def cuts_weights(self) -> bool:
        """Each process holds a part of every weight; a weight is there while its module runs."""
        return self._zero_stage == 3

    @property
    def stages(self) -> Sequence[range] | None:
        """The layers of each stretch (indices into `Decoder.layers()`) where a process holds two of them."""
        return None

    def train_step(
        self,
        micro_batches: Sequence[TokenBatch],
        lr: float,
        *,
        stop: Callable[[], bool] = bool,
        judge: Judge | None = None,
        together: bool = False,
        compare: bool = False,
    ) -> StepOutcome:
        """Forward and backward over this process's micro-batches, clip, update.

        Args:
            micro_batches: `grad_accum_steps` of `micro_batch_size` sequences.
            lr: learning rate of this step.
            stop: whether this process was asked to stop; called when all its forwards are done, and every process
                learns of it with the loss.
            judge: asked before the update. With one, a loss or norm that is not finite drops the update too, and the
                caller sees it in what this returns.
            together: where any process's judge refuses, all refuse; costs a small collective. For judges that
                decide more than what is finite.
            compare: `check_replicas` between backward and update, as also where a process was asked to stop: under
                ZeRO-1 and 2 the update overwrites a weight that differs, and what was computed with it stays.

        Raises:
            TrainingDiverged: on all processes together and before the update: the loss or the gradient norm is not
                finite (without a judge), or replicas differ.
        """
        micro_batches = self._begin(micro_batches, lr, judge, together=together, compare=compare)
        self._engine.train()
        nll, stopping = torch.zeros((), dtype=torch.float64, device=self.mesh.device), False
        last = len(micro_batches) - 1
        for index, batch in enumerate(micro_batches):
            # The engine's own count goes wrong when the batch size changes in mid-run.
            self._engine.set_gradient_accumulation_boundary(index == last)
            if index == 0:
                self._stopwatch.start()
            micro_nll = self._nll(batch)
            if index == 0:
                self._stopwatch.stop()
            nll += micro_nll.detach()
            self._losses.append(micro_nll.detach())
            if index == last:
                _, stopping = self._agree(float(nll), stop=stop)
            if self._inspected is not None:
                self._inspected.micro_batch = index
            self._engine.backward(self._weighted(micro_nll))
            if index == last:
                self._compare_where_due(stop=stopping)
            if index == last and not self._norm_is_told:
                self._gate.passes(self._norm_without_zero())
            self._engine.step()
        return self._outcome(stop=stopping)

    @property
    def forward_seconds(self) -> float:
        """This process's time for the forward of the first micro-batch of the last step.

        A measure of its speed where it waits for no other meanwhile: under ZeRO-0 to 2 without tensor and sequence
        parallelism. Where it does, the processes that wait for each other show the time of the slowest.
        """
        return self._stopwatch.seconds

    def blame(self) -> list[NonFinite]:
        """Whose loss of the last step is not finite, and where; or whose weights. All processes call it."""
        bad = tuple(index for index, nll in enumerate(self._losses) if not math.isfinite(float(nll)))
        loss = NonFinite(self.mesh.rank, self.mesh.data_parallel_rank, "loss", bad)
        weight = NonFinite(self.mesh.rank, self.mesh.data_parallel_rank, "weight", names=bad_weights(self.model))
        return origins(self._gathered(loss) + self._gathered(weight))

    def inspect_step(self, micro_batches: Sequence[TokenBatch], lr: float, *, unscaled: bool = False) -> Inspection:
        """Compute a step's gradients again, without an update, to find who computes what is not finite.

        All processes call it, with the random numbers of that step.

        Args:
            micro_batches: of that step.
            lr: of that step.
            unscaled: in fp16, with a loss scale of 1 in place of that step's: what is finite then was an overflow.
        """
        scale = self._loss_scale
        with ExitStack() as inside:
            found = inside.enter_context(gradients_inspected(self.model))
            if scale is not None:
                inside.enter_context(scale.set_aside(SMALLEST if unscaled else scale.of_step))
            self._inspected = found
            outcome = self.train_step(micro_batches, lr, judge=lambda loss, norm: False)  # noqa: ARG005
            self._inspected = None
        names = tuple(self.model.logical_name(name) for name in found.names)
        depth = max((depth_of(self.model, name) for name in found.names), default=(0, 0))
        micro = tuple(sorted(found.micro))
        own = NonFinite(self.mesh.rank, self.mesh.data_parallel_rank, "gradient", micro, names, depth)
        is_finite = math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)
        return Inspection(origins(self._gathered(own)) or self.blame(), is_finite)

    @property
    def loss_scale(self) -> float | None:
        """fp16 only: of the next step."""
        return self._loss_scale.value if self._loss_scale is not None else None

    def take_back_loss_scale(self) -> None:
        """fp16: the last step was dropped for what is no overflow; its scale is the next one's too."""
        if self._loss_scale is not None:
            self._loss_scale.take_back()

    def _gathered(self, own: NonFinite) -> list[NonFinite]:
        return [one for one in self.mesh.gather(own) if one.micro_batches or one.names]

    def eval_loss(self, batches: EvaluationBatches) -> tuple[float, int]:
        """Mean loss in nats over all processes' batches, and the number of target tokens.

        Every process must bring equally many batches: under ZeRO-3 each forward is a collective.
        """
        nll, targets = 0.0, 0
        self._engine.eval()
        with torch.no_grad():
            for batch in self._shares(batches):
                nll += float(self._nll(batch))
                targets += batch.n_targets
        return self._mean_loss(nll, targets)

    def _begin(
        self, micro_batches: Sequence[TokenBatch], lr: float, judge: Judge | None, *, together: bool, compare: bool
    ) -> list[TokenBatch]:
        """This process's part of each; count the step's targets: every one of them weighs the same in the loss."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._judge, self._together, self._compares = judge, together, compare
        if self._loss_scale is not None:
            self._loss_scale.begin()
        self._losses.clear()
        self._loss_of_step = math.nan
        self._gate.open(self._passes)
        shares = self._shares(micro_batches)
        (total,) = self.mesh.sum(self._counted_once(sum(batch.n_targets for batch in shares)))
        if total == 0:
            raise DataError("no target token counts in this step: look at the data of this step")
        self._targets_per_step = total
        return shares

    def _shares(self, batches: Iterable[TokenBatch]) -> list[TokenBatch]:
        return [batch.share(self.mesh.sequence_rank, self.mesh.sequence) for batch in batches]

    def _agree(self, nll: float, *, stop: Callable[[], bool]) -> tuple[float, bool]:
        """The step's loss over all processes, and whether any of them was asked to stop."""
        total, stops = self.mesh.sum(self._counted_once(nll), float(stop()))
        loss = self._loss_of_step = total / self._targets_per_step
        if self._judge is None:
            self._check_finite("loss", loss)
        return loss, stops > 0

    def _compare_where_due(self, *, stop: bool) -> None:
        """Between backward and update. Where the run was asked to stop, this step is saved."""
        if self._compares or stop:
            self.check_replicas()

    def _passes(self, norm: float) -> bool:
        """What the gate asks before the update; where `together`, the same answer on all processes."""
        loss = self._loss_of_step
        passes = math.isfinite(norm) and math.isfinite(loss) and (self._judge is None or self._judge(loss, norm))
        if self._together:
            (refusals,) = self.mesh.sum(float(not passes))
            passes = refusals == 0
        return passes

    def _mean_loss(self, nll: float, targets: int) -> tuple[float, int]:
        total_nll, total_targets = self.mesh.sum(self._counted_once(nll), self._counted_once(targets))
        if total_targets == 0:
            raise DataError("no target token counts in the validation sequences: every document in them has one token")
        return total_nll / total_targets, int(total_targets)

    def check_replicas(self) -> None:
        """Compare the weights of processes that must hold the same, and look whether all are finite.

        Raises:
            TrainingDiverged: on every process, naming what differs.
        """
        check_replicas(self.model, self.mesh, self._replicated_state(), cut_over_data=self._zero_stage == 3)

    def _replicated_state(self) -> dict[str, Tensor]:
        """Adam moments that every process of a data axis holds whole: under ZeRO-0."""
        if self._zero_stage > 0 or isinstance(self._engine.optimizer, ShardedMuon):
            return {}
        state = self._engine.optimizer.state
        return {
            f"{kind} of {self.model.logical_name(name)}": state[parameter][kind]
            for name, parameter in self.model.named_parameters()
            for kind in MOMENTS
            if kind in state.get(parameter, ())
        }

    def owned_slices(self) -> Iterator[TensorSlice]:
        """This process's part of weights and optimizer state, for a checkpoint."""
        return slices.owned_slices(self._engine.optimizer, self.model, self.mesh)

    def engine_state(self) -> dict[str, float]:
        """Counters of the optimizer that are no tensors."""
        state: dict[str, float] = {"adam_step": slices.adam_step(self._engine.optimizer)}
        if self._loss_scale is not None:
            state |= self._loss_scale.state()
        return state

    def restore(self, reader: SliceReader, state: Mapping[str, float]) -> None:
        """Take weights, moments and counters from a checkpoint of any layout."""
        reader.check_model(self.logical_shapes())

        def read(name: str, kind: str, start: int, numel: int) -> Tensor:
            return reader.read(self.model.logical_name(name), kind, start, numel, self.model.shards.get(name))

        slices.restore_slices(self._engine.optimizer, self.model, self.mesh.zero_rank, read, int(state["adam_step"]))
        if self._loss_scale is not None:
            self._loss_scale.restore(state)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter as if there were one process."""
        shards = self.model.shards
        return {
            self.model.logical_name(name): shards[name].shape
            if name in shards
            else tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self.model.named_parameters()
        }

    def _nll(self, batch: TokenBatch) -> Tensor:
        """Summed negative log-likelihood of the batch's targets, nats."""
        batch = batch.to(self.mesh.device)
        return self.model.nll(self._engine(batch.inputs, documents=batch.documents), batch.targets)

    def _counted_once(self, value: float) -> float:
        """Processes that work on the same samples have the same value: one of them brings it into a sum over all."""
        return value if self.mesh.tensor_rank == 0 else 0.0

    def _weighted(self, micro_nll: Tensor) -> Tensor:
        """The loss that DeepSpeed is given.

        After its mean over processes and micro-batches, each target token of the whole step weighs the same.
        """
        return micro_nll * (self.mesh.zero_parallel * self.plan.grad_accum_steps / self._targets_per_step)

    def _norm_without_zero(self) -> float:
        """ZeRO-0 clips without telling the norm; gradients are reduced by now, so take it here."""
        gradients = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        return global_norm(gradients, self.model.shards, self.mesh)

    def _outcome(self, *, stop: bool) -> StepOutcome:
        applied = bool(self._engine.was_step_applied())
        self._gate.close()
        norm = self._gate.norm if self._gate.norm is not None else math.nan
        if applied and self._norm_is_told:
            norm = float(self._engine.get_global_grad_norm())
        scale = self._loss_scale
        if scale is None:
            if self._judge is None:
                # DeepSpeed passes over non-finite gradients without a word; to us they end the run.
                self._check_finite("gradient norm", norm if applied else math.nan)
            return StepOutcome(self._loss_of_step, norm, not applied, None, stop)
        if not applied and (math.isfinite(norm) or not math.isfinite(self._loss_of_step)):
            scale.take_back()
        return StepOutcome(self._loss_of_step, norm, not applied, scale.value, stop, scale.can_fall)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"{what} is {value}; the step was not saved and the last checkpoint stands. "
                "Lower optim.lr, lengthen optim.warmup_steps, or look at the data of this step"
            )


def _check_dtype(dtype: str, device: torch.device) -> None:
    """DeepSpeed refuses a precision that the device cannot do with a traceback; say it in our words."""
    accelerator = get_accelerator()
    if dtype == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(f"train.dtype is fp16, which DeepSpeed cannot run on this {device.type}; use bf16 or fp32")
    if dtype == "bf16" and not accelerator.is_bf16_supported():
        raise ConfigError(f"train.dtype is bf16, which this {device.type} cannot run; use fp16 or fp32")
