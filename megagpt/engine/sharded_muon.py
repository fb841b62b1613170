"""Muon for hidden matrices and AdamW for the rest, with fp32 master weights and whole matrices in one process each.

DeepSpeed's ZeRO lays parameters end to end and cuts them anywhere, so that no process has a matrix to orthogonalise. So
DeepSpeed is told stage 0 here, and reduces the gradients; what ZeRO-1 would shard is sharded by whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.checkpoint.tensors import MOMENTS, MOMENTUM, WEIGHT, TensorSlice
from megagpt.config.schema import OptimSection
from megagpt.engine.flat_shard import FlatShard
from megagpt.engine.muon import SCALES, momentum_direction, orthogonalized
from megagpt.model.decoder import Decoder
from megagpt.parallel.matrices import HiddenMatrix, hidden_matrices, share_out
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.norm import global_norm

Reader = Callable[[str, str, int, int], Tensor]
"""(tensor name, value kind, flat start, numel) -> 1-D fp32 tensor."""

_CLIP_EPS = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


class ShardedMuon(torch.optim.Optimizer):
    """One `step` clips the raw gradients by their global norm and updates every parameter.

    Made while the model is in fp32; the model may be cast to `dtype` afterwards. Of the matrices, each process updates
    those that it owns and sends them to the others. Everything else is updated element by element, so that it is shared
    out evenly, cut anywhere.

    Args:
        model: what this process holds, with its initial weights in fp32.
        param_groups: torch optimizer groups over the model's parameters.
        optim: learning rates, momentum, decay, clipping.
        mesh: this process's place.
        sharded: share the state out over the data-parallel processes (`parallel.zero_stage` 1); otherwise all hold it.
        dtype: of the model in training, and of the iteration.

    Source: Liu et al. 2025, section 2.3 (matrices shared out, gathered whole); Jordan's distributed muon.py (each
    process updates the matrices it owns).
    """

    def __init__(
        self,
        model: Decoder,
        param_groups: list[dict[str, Any]],
        optim: OptimSection,
        mesh: Mesh,
        *,
        sharded: bool,
        dtype: torch.dtype,
    ) -> None:
        self._matrices = hidden_matrices(model)
        hidden = {id(matrix.parameter) for matrix in self._matrices}
        rest = [
            group | {"params": [parameter for parameter in group["params"] if id(parameter) not in hidden]}
            for group in param_groups
        ]
        matrices = {"params": [matrix.parameter for matrix in self._matrices], "weight_decay": optim.weight_decay}
        super().__init__([matrices, *(group for group in rest if group["params"])], {"lr": optim.lr})
        self.steps = 0
        """Updates that were made."""
        self.passes: Callable[[float], bool] = math.isfinite
        """Asked with the gradient norm, before clipping, whether to update."""
        self.overflow = False
        """Whether the last step made no update: DeepSpeed's name for it."""
        self._optim, self._mesh, self._shards, self._dtype = optim, mesh, model.shards, dtype
        self._named = dict(model.named_parameters())
        self._degree, self._rank = (mesh.zero_parallel, mesh.zero_rank) if sharded else (1, 0)
        self._writes = sharded or mesh.zero_rank == 0
        self._owners = share_out(self._matrices, self._degree)
        for matrix in self._owned_matrices():
            weight = matrix.parameter.detach().to(mesh.device, torch.float32, copy=True)
            self.state[matrix.parameter] = {WEIGHT: weight, MOMENTUM: torch.zeros_like(weight)}
        self._flats = [
            FlatShard(group["params"], self._rank, self._degree, mesh.device) for group in self.param_groups[1:]
        ]
        self._pieces = {
            parameter: (flat, theirs, mine) for flat in self._flats for parameter, theirs, mine in flat.pieces()
        }
        self._adamw = torch.optim.AdamW(
            [
                {"params": [flat.weight], "weight_decay": group["weight_decay"]}
                for flat, group in zip(self._flats, self.param_groups[1:], strict=True)
            ],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=mesh.device.type == "cuda",
        )
        self._sums: dict[nn.Parameter, Tensor] = {}
        if dtype != torch.float32:
            for parameter in self._named.values():
                parameter.register_post_accumulate_grad_hook(self._add_up)  # type: ignore[no-untyped-call]

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """What DeepSpeed averages over the data-parallel processes, in place: its name for it."""
        return [self._gradient(parameter) for parameter in self._named.values()], {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature
        """Clip and update. Where the norm does not pass nothing is updated: the engine tells."""
        self._global_grad_norm = global_norm(
            ((name, self._gradient(parameter)) for name, parameter in self._named.items()), self._shards, self._mesh
        )
        self.overflow = not self.passes(self._global_grad_norm)
        if not self.overflow:
            self._clip()
            self._update_matrices()
            self._update_rest()
            self.steps += 1
        self._sums.clear()

    def owned_slice(self, name: str, parameter: nn.Parameter) -> TensorSlice | None:
        """This process's part of a parameter's weight and state, if it has any that it must write."""
        if not self._writes:
            return None
        if parameter in self.state:
            values = {kind: value.view(-1) for kind, value in self.state[parameter].items()}
            return TensorSlice(name, tuple(parameter.shape), 0, values)
        if parameter in self._pieces:
            flat, theirs, mine = self._pieces[parameter]
            state = self._adamw.state.get(flat.weight) or dict.fromkeys(MOMENTS, torch.zeros_like(flat.weight))
            values = {WEIGHT: flat.weight.detach()[mine], **{kind: state[kind][mine] for kind in MOMENTS}}
            return TensorSlice(name, tuple(parameter.shape), theirs.start, values)
        return None

    @torch.no_grad()
    def restore(self, read: Reader, steps: int) -> None:
        """Take weights and state from logical tensors; before the first step all of the state is zero."""
        self.steps = steps
        for flat in self._flats:
            self._adamw.state[flat.weight] = {
                "step": torch.tensor(float(steps), device=flat.weight.device if flat.weight.is_cuda else None),
                **{kind: torch.zeros_like(flat.weight) for kind in MOMENTS},
            }
        for name, parameter in self._named.items():
            parameter.copy_(read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))
            if parameter in self.state:
                for kind in (WEIGHT, MOMENTUM) if steps else (WEIGHT,):
                    self.state[parameter][kind].copy_(read(name, kind, 0, parameter.numel()).view_as(parameter))
            if parameter in self._pieces:
                flat, theirs, mine = self._pieces[parameter]
                held = {WEIGHT: flat.weight} | (self._adamw.state[flat.weight] if steps else {})
                for kind in held.keys() - {"step"}:
                    held[kind][mine].copy_(read(name, kind, theirs.start, theirs.stop - theirs.start))

    def _owned_matrices(self) -> Iterator[HiddenMatrix]:
        return (matrix for matrix in self._matrices if self._owners[matrix.name] == self._rank)

    def _add_up(self, parameter: Any) -> None:
        """Gradients of micro-batches add up in fp32: sums in bf16 lose what is small."""
        gradient = parameter.grad
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)
        else:
            self._sums[parameter] = gradient.float()
        parameter.grad = None

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self._sums.get(parameter, parameter.grad)
        if gradient is None:
            raise RuntimeError("a parameter took no part in the loss: every process must reduce the same gradients")
        return gradient

    def _clip(self) -> None:
        """Scale the raw gradients down to the largest norm; the updates are nobody's to clip."""
        factor = self._optim.grad_clip / (self._global_grad_norm + _CLIP_EPS)
        if self._optim.grad_clip > 0 and factor < 1:
            for parameter in self._named.values():
                self._gradient(parameter).mul_(factor)

    def _update_matrices(self) -> None:
        group, muon = self.param_groups[0], self._optim.muon
        lr = group["lr"] * (1.0 if muon.lr is None else muon.lr / self._optim.lr)
        scale, tensor_group = SCALES[muon.scale], self._groups[0]

        def update_of(whole: Tensor) -> Tensor:
            n_rows, n_columns = whole.shape
            return orthogonalized(whole, muon.ns_steps, self._dtype) * scale(n_rows, n_columns)

        for matrix in self._owned_matrices():
            state = self.state[matrix.parameter]
            gradient = self._gradient(matrix.parameter)
            direction = momentum_direction(gradient, state[MOMENTUM], muon.momentum, nesterov=muon.nesterov)
            update = matrix.map_whole(direction, update_of, tensor_group)
            state[WEIGHT].mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
            matrix.parameter.copy_(state[WEIGHT])
        if self._degree > 1:
            self._send_matrices()

    def _send_matrices(self) -> None:
        sent = [
            torch.distributed.broadcast(
                matrix.parameter.data,
                group=self._groups[1],
                group_src=self._owners[matrix.name],
                async_op=True,
            )
            for matrix in self._matrices
        ]
        for work in sent:
            assert work is not None  # noqa: S101 - this process is in the group
            work.wait()

    def _update_rest(self) -> None:
        for flat, group, ours in zip(self._flats, self.param_groups[1:], self._adamw.param_groups, strict=True):
            ours["lr"] = group["lr"]
            flat.take_gradients(self._gradient)
        self._adamw.step()
        for flat in self._flats:
            flat.give_weights(self._groups[1])
            flat.weight.grad = None

    @property
    def _groups(self) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """Tensor, and data x sequence; None is the world."""
        groups = self._mesh.groups
        return (groups.tensor, groups.zero) if groups is not None else (None, None)
