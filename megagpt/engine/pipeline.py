"""The same engine where the layers are shared out over stages: DeepSpeed's pipeline, with our loss, ties and checks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megagpt.config.schema import TrainingRun
from megagpt.engine.ds_config import ds_config
from megagpt.engine.engine import Engine, EvaluationBatches, Judge, StepOutcome
from megagpt.model.batch import TokenBatch
from megagpt.model.context import Contexts
from megagpt.model.decoder import run_layers
from megagpt.model.loss import IGNORED_TARGET
from megagpt.parallel.stages import held_parts, n_parts, plan_stages


class PipelinedEngine(Engine):
    """A stage of a model under DeepSpeed's pipeline: 1F1B, or DualPipeV.

    Every process brings all micro-batches of its data-parallel coordinate; the first stage takes the inputs and the
    last one the targets. Source: Narayanan et al. 2021, section 2.2 (1F1B); DeepSeek-AI 2024, section 3.2.1 (DualPipe).
    """

    def _initialize(self, optimizer: torch.optim.Optimizer, config: TrainingRun) -> Any:
        self._is_v = config.parallel.pipeline_schedule == "dualpipev"
        self._parts = plan_stages(config)
        self._computes_loss = n_parts(config.parallel) - 1 in held_parts(config.parallel, self.mesh.pipeline_rank)
        for name, parameter in self.model.named_parameters():
            # Of what two stages hold, DeepSpeed's gradient norm counts the first stage's.
            parameter.ds_pipe_replicated = self.model.logical_name(name) != name  # type: ignore[attr-defined]
        engine, *_ = deepspeed.initialize(
            model=self._stages(config),
            optimizer=optimizer,
            config=ds_config(config, self.plan),
            dist_init_required=False,
        )
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
            schedule.ReduceTiedGrads: lambda engine: self._add_up_tied_gradients(engine),
            schedule.OptimizerStep: lambda engine: self._update(engine, type(engine)._INSTRUCTION_MAP),
            schedule.ForwardPass: lambda engine, **which: self._forward(engine, type(engine)._INSTRUCTION_MAP, which),
        }
        return engine

    def _stages(self, config: TrainingRun) -> PipelineModule:
        mesh = self.mesh
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.zero_parallel)
        layers = [layer for _, layer in self.model.layers()]
        kind = _PackedPart if config.data.isolate_documents else _Part
        parts = [kind([layers[index] for index in part], self.model.contexts) for part in plan_stages(config)]
        copies = {id(p): p.ds_pipe_replicated for p in self.model.parameters()}  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its arguments
            stages = (_VStages if self._is_v else _Stages)(parts, topology, self._loss)
        for parameter in stages.parameters():
            parameter.ds_pipe_replicated = copies[id(parameter)]
        return stages

    @property
    def stages(self) -> Sequence[range] | None:
        """As its base: in DualPipeV's V."""
        return self._parts if self._is_v else None

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
        """As its base; one forward and backward of every micro-batch through all stages."""
        micro_batches = self._begin(micro_batches, lr, judge, together=together, compare=compare)
        self._asked_to_stop, self._stopping, self._timed = stop, False, False
        self._nll_of_step = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._engine.train_batch(_for_both_ends(micro_batches))
        return self._outcome(stop=self._stopping)

    def eval_loss(self, batches: EvaluationBatches) -> tuple[float, int]:
        """As its base; the batches go through the stages one behind the other."""
        chosen = self._shares(batches)
        targets = sum(batch.n_targets for batch in chosen)
        # DualPipeV's engine finds its buffers by the number of micro-batches of a training step, whatever it is told.
        sweep = self.plan.grad_accum_steps if self._is_v else len(chosen)
        nothing = replace(chosen[0], targets=torch.full_like(chosen[0].targets, IGNORED_TARGET))
        chosen += [nothing] * (-len(chosen) % sweep)
        self._targets_per_step = 1.0
        self._nll_of_step = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self._timed = True
        self._engine.reset_activation_shape()
        for start in range(0, len(chosen), sweep):
            self._engine.eval_batch(
                _for_both_ends(chosen[start : start + sweep]),
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=sweep,
            )
        self._engine.reset_activation_shape()
        return self._mean_loss(float(self._nll_of_step), targets)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """As its base, of all stages."""
        stages: list[Any] = [None] * self.mesh.pipeline
        group = self.mesh.groups.pipeline if self.mesh.groups is not None else None
        torch.distributed.all_gather_object(stages, super().logical_shapes(), group=group)
        return {name: shape for stage in stages for name, shape in stage.items()}

    def _loss(self, outputs: Tensor | Packed, targets: Tensor) -> Tensor:
        """What the last stage gives DeepSpeed for one micro-batch."""
        if isinstance(outputs, tuple):
            outputs, _ = outputs
        nll = self.model.nll(outputs, targets)
        self._nll_of_step += nll.detach().double()
        self._losses.append(nll.detach())
        return self._weighted(nll)

    def _counted_once(self, value: float) -> float:
        return super()._counted_once(value) if self._computes_loss else 0.0

    def _add_up_tied_gradients(self, engine: Any) -> None:
        """The embedding's and the tied head's gradients, each a part of the whole, become their sum on both stages.

        DeepSpeed's own looks for them in `weight.grad` alone, and passes over them without a word where they are
        accumulated in another type (fp16, or bf16 with the optimizer on the CPU): the copies drift apart.
        """
        groups = self.mesh.groups
        for name, parameter in self.model.named_parameters():
            if name == self.model.shared_with_other_end and groups is not None:
                torch.distributed.all_reduce(_accumulated_gradient(engine, name, parameter), group=groups.ends)

    def _update(self, engine: Any, theirs: dict[type, Any]) -> None:
        _, self._stopping = self._agree(float(self._nll_of_step), stop=self._asked_to_stop)
        self._compare_where_due(stop=self._stopping)
        theirs[schedule.OptimizerStep](engine)

    def _forward(self, engine: Any, theirs: dict[type, Any], which: dict[str, Any]) -> None:
        """A micro-batch through this stage; the first of a step is timed."""
        first, self._timed = not self._timed, True
        if first:
            self._stopwatch.start()
        theirs[schedule.ForwardPass](engine, **which)
        if first:
            self._stopwatch.stop()


class _Stages(PipelineModule):  # type: ignore[misc]
    """What DeepSpeed takes for layers are our parts, one a stage."""

    def __init__(self, parts: Sequence[nn.Module], topology: PipeModelDataParallelTopology, loss_fn: Any) -> None:
        self._n_parts = len(parts)
        super().__init__(parts, topology=topology, loss_fn=loss_fn)

    def _partition_layers(self, method: str = "uniform") -> None:  # noqa: ARG002 - theirs
        self.parts = list(range(self._n_parts + 1))
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class _VStages(DualPipeVModule, _Stages):  # type: ignore[misc]
    """As `_Stages`, twice as many: each process holds one on the way out and one on the way back."""


class _Part(nn.Module):
    """Layers that follow each other: what one stage runs."""

    def __init__(self, layers: Sequence[nn.Module], contexts: Contexts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.contexts = contexts

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, to be sent: with a sequence cut over the tensor group its strides are permuted.
        return run_layers(self.layers, x, self.contexts(None)).contiguous()


class _PackedPart(_Part):
    """Documents travel with the activations, as integers: each stage makes its context of them, once a micro-batch."""

    def forward(self, given: Packed) -> Packed:  # type: ignore[override]
        x, documents = given
        return run_layers(self.layers, x, self.contexts(documents)).contiguous(), documents


Packed = tuple[Tensor, Tensor]
"""Activations (b, T, C), or tokens (b, T), and the documents (b, T) of a micro-batch."""


def _for_both_ends(batches: Sequence[TokenBatch]) -> Iterator[tuple[Tensor | Packed, Tensor]]:
    for batch in batches:
        yield batch.inputs if batch.documents is None else (batch.inputs, batch.documents), batch.targets


def _accumulated_gradient(engine: Any, name: str, parameter: Any) -> Tensor:
    """Where DeepSpeed has added up a parameter's gradient over the micro-batches."""
    if engine.using_bf16_optimizer:
        gradient = parameter._hp_grad
    elif getattr(engine.optimizer, "use_grad_accum_attribute", False):
        gradient = parameter.grad_accum
    else:
        gradient = parameter.grad
    if gradient is None:
        raise RuntimeError(f"{name}: DeepSpeed has put its gradient where this version does not find it")
    return gradient  # type: ignore[no-any-return]
