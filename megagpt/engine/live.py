"""The model of a running engine as evaluation sees it: the weights where they are, at the layout that the run has.

Below ZeRO-3 every process holds its share of the weights whole, and DeepSpeed has no part in this. Under ZeRO-3 each
holds a part of every weight, and DeepSpeed's hooks put a weight together when its module is called: by all processes
at once, so that all of them must call the same modules equally often (`GatheredDecoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megagpt.model.layers import KVCache
from megagpt.model.packed import PackedStep
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.whole import whole_sequences

if TYPE_CHECKING:
    from megagpt.engine.engine import Engine

T = TypeVar("T")


@contextmanager
def live_model(engine: Engine) -> Iterator[ParallelDecoder]:
    """The engine's model, in evaluation mode as long as this lasts. All processes enter together.

    Processes of a sequence group hold the same weights: to evaluation they are a part of the data axis. Where the
    decoder has nothing left to do, `finish` must be called, once between two exchanges (`evals.sharing`).
    """
    model, was_training = engine.model, engine.model.training
    kind = GatheredDecoder if engine.cuts_weights else ParallelDecoder
    model.eval()
    try:
        with whole_sequences(model):
            yield kind(model, engine.mesh, engine.stages)
    finally:
        model.train(was_training)


class GatheredDecoder(ParallelDecoder):
    """A model under ZeRO-3. Processes may have different work: whoever has none takes part in the others' forwards.

    Before each stretch of modules, and before each use of the head, all processes tell each other whether any of them
    still has one to do: one small all-reduce. Those that have not run the modules on a token that nobody reads.
    """

    def new_cache(self, n_rows: int, n_slots: int) -> KVCache:
        """As its base. Parts of it share its memory: it must not be copied when it is written to."""
        with torch.inference_mode(mode=False):
            return super().new_cache(n_rows, n_slots)

    def decode(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], n_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """As its base."""
        decode = super().decode
        return self._outside_inference_mode(cache, lambda: decode(tokens, cache, n_new, n_wanted))

    def score(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], wanted: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As its base."""
        score = super().score
        return self._outside_inference_mode(cache, lambda: score(tokens, cache, n_new, wanted, targets))

    def finish(self) -> None:
        """Take part in the others' forwards until nobody has one left."""
        with torch.inference_mode(mode=False), torch.no_grad():
            while self._any_works(own=False):
                token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
                super()._hidden(PackedStep(token, self.new_cache(1, 1), [1], self.packing))
                self._finish_heads()

    def _outside_inference_mode(self, cache: KVCache, run: Callable[[], T]) -> T:
        """DeepSpeed keeps some of what it puts together, and training then changes it in place.

        PyTorch refuses that for tensors that were made in inference mode, in which callers score.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            cache.keys = [_normal(keys) for keys in cache.keys]
            cache.values = [_normal(values) for values in cache.values]
            answer = run()
            self._finish_heads()
            return answer

    def _hidden(self, step: PackedStep) -> Tensor | None:
        self._any_works(own=True)
        return super()._hidden(step)

    def _head(self, x: Tensor) -> Tensor:
        self._any_works(own=True)
        return super()._head(x)

    def _finish_heads(self) -> None:
        """Some process may have more positions to project."""
        while self._any_works(own=False):
            super()._head(self.weight.new_zeros(self.packing.filled(1), self.sizes.d_model))

    def _any_works(self, *, own: bool) -> bool:
        flag = torch.tensor(float(own), device=self.device)
        torch.distributed.all_reduce(flag, ReduceOp.MAX)
        return bool(flag)


def _normal(stored: Tensor) -> Tensor:
    return stored.clone() if stored.is_inference() else stored
