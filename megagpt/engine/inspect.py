"""Who computed what is not finite: found by computing a step once more with eyes on every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megagpt.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class NonFinite:
    """What one process computed that is not finite."""

    rank: int
    data_parallel_rank: int
    what: str
    """loss, weight or gradient."""
    micro_batches: tuple[int, ...] = ()
    """Which of the step's; none where it is known of the step as a whole."""
    names: tuple[str, ...] = ()
    """Parameters; of gradients in the order in which backward came to them."""
    depth: tuple[int, int] = (0, 0)
    """Of the first of them: its layer in the whole model, and its place there."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a step that was computed once more gave."""

    found: list[NonFinite]
    """By rank; none where every process's own gradients are finite this time."""
    is_finite: bool
    """The loss, and the norm of the gradients that the processes have in common."""


def origins(found: Sequence[NonFinite]) -> list[NonFinite]:
    """Those from whom the others have it.

    Backward goes from the last layer to the first, and processes that share samples give each other what they compute:
    of those, whoever has it in the latest layer was the first. Weights that are not finite explain everything else.
    """
    weights = [one for one in found if one.what == "weight"]
    deepest: dict[int, tuple[int, int]] = {}
    for one in found:
        deepest[one.data_parallel_rank] = max(deepest.get(one.data_parallel_rank, (0, 0)), one.depth)
    return weights or [one for one in found if one.depth == deepest[one.data_parallel_rank]]


def depth_of(model: Decoder, name: str) -> tuple[int, int]:
    """Where a parameter stands among those of the whole model, whichever of its layers are here."""
    layer = next(index for index, (prefix, _) in enumerate(model.layers()) if name.startswith(f"{prefix}."))
    return layer, list(dict(model.named_parameters())).index(name)


@dataclass
class BadGradients:
    """Filled while backward runs."""

    names: list[str] = field(default_factory=list)
    micro: set[int] = field(default_factory=set)
    micro_batch: int | None = None
    """The one that backward is in, where that is known."""

    def note(self, name: str, gradient: Tensor) -> None:
        """Look at one gradient of one micro-batch, before it is added up and reduced."""
        if bool(torch.isfinite(gradient).all()):
            return
        if name not in self.names:
            self.names.append(name)
        if self.micro_batch is not None:
            self.micro.add(self.micro_batch)


@contextmanager
def gradients_inspected(model: Decoder) -> Iterator[BadGradients]:
    """Inside, every gradient of this process is looked at as backward gives it: much too slow for every step."""
    found = BadGradients()

    def looker(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: found.note(name, gradient)

    handles = [
        parameter.register_hook(looker(name))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
