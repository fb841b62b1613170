"""Parameters laid end to end, of which each process updates a stretch: for optimizers that work element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class FlatShard:
    """The fp32 master weights of this process's stretch.

    Source: Rajbhandari et al. 2020, section 5.1 (ZeRO-1 of the optimizer state).

    Args:
        parameters: with their values in fp32; the same, in the same order, on every process.
        rank: which stretch is this process's.
        degree: how many there are, all of the same length; the last ones are padded.
        device: where the weights lie.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rank: int, degree: int, device: torch.device) -> None:
        self._parameters = list(parameters)
        self._degree = degree
        self._share = -(-sum(parameter.numel() for parameter in parameters) // degree)
        self._start = rank * self._share
        self.weight = nn.Parameter(torch.zeros(self._share, device=device))
        """(share,) fp32."""
        with torch.no_grad():
            for parameter, theirs, mine in self.pieces():
                self.weight[mine] = parameter.flatten()[theirs].to(device, torch.float32)

    def pieces(self) -> Iterator[tuple[nn.Parameter, slice, slice]]:
        """Each parameter that reaches into the stretch: where in the flattened parameter, and where in the stretch."""
        before = 0
        for parameter in self._parameters:
            start = max(before, self._start)
            stop = min(before + parameter.numel(), self._start + self._share)
            if start < stop:
                theirs = slice(start - before, stop - before)
                yield parameter, theirs, slice(start - self._start, stop - self._start)
            before += parameter.numel()

    def take_gradients(self, gradient_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Give the stretch its part of the parameters' gradients."""
        gradient = torch.zeros_like(self.weight)
        for parameter, theirs, mine in self.pieces():
            gradient[mine] = gradient_of(parameter).flatten()[theirs]
        self.weight.grad = gradient

    @torch.no_grad()
    def give_weights(self, group: ProcessGroup | None) -> None:
        """Bring the stretches of all processes of the group into the parameters."""
        own = self.weight.to(self._parameters[0].dtype)
        whole = own
        if self._degree > 1:
            whole = own.new_empty(self._degree * self._share)
            torch.distributed.all_gather_into_tensor(whole, own, group=group)
        before = 0
        for parameter in self._parameters:
            parameter.copy_(whole[before : before + parameter.numel()].view_as(parameter))
            before += parameter.numel()
