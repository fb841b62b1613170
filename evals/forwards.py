"""Running a plan: nodes in batches, each row behind a copy of the keys and values of the nodes above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from evals.prefix_tree import Continuation, Node, Plan
from megagpt.model.decoder import DecoderSizes
from megagpt.model.layers import KVCache
from megagpt.model.scoring import ScoringModel

CACHE_BYTES = 1 << 30
"""Most memory for keys and values (of the whole model, counted as fp32); one row a level of the tree always fits."""

SHORT = 64
"""Tokens: of rows that are shorter, more than `batch_size` run together, until they are as many as if they had it."""

CPU_TOKENS = 1024
"""Tokens a thread of one forward on a CPU, where rows are many: more, and activations do not stay in its cache."""


def slot_bytes(sizes: DecoderSizes) -> int:
    """Bytes that a token's keys and values take."""
    return 2 * sizes.n_layer * sizes.n_kv_head * sizes.d_head * 4


@dataclass(frozen=True, slots=True)
class Answer:
    """How probable one continuation is."""

    log_probabilities: tuple[float, ...]
    """Of each scored token, nats."""
    greedy: tuple[bool, ...]
    """Whether each is the most probable token."""

    @property
    def total(self) -> float:
        """Their sum, rounded once: it does not depend on where the sum was taken apart."""
        return math.fsum(self.log_probabilities)

    @property
    def is_greedy(self) -> bool:
        """Whether the model would have written it."""
        return all(self.greedy)


OnAnswer = Callable[[int, Answer], None]
"""Told the number of a continuation and its answer as soon as it is known."""


class _Rows:
    """Memory of one level of the tree, used by one batch after the other."""

    def __init__(self, above: KVCache, cache: KVCache) -> None:
        self._above = above
        self._cache = cache
        self._parents: list[int | None] = [None] * len(cache.lengths)

    def take(self, parents: Sequence[int]) -> KVCache:
        """A cache whose row i begins with the keys and values of row `parents[i]` above.

        They are copied only where another parent's were: a batch writes behind them.
        """
        new = [row for row, parent in enumerate(parents) if self._parents[row] != parent]
        if new:
            self._cache.copy_rows(new, self._above, [parents[row] for row in new])
        for row, parent in enumerate(parents):
            self._parents[row] = parent
        taken = self._cache.part(slice(len(parents)))
        taken.lengths = [self._above.lengths[parent] for parent in parents]
        return taken


class PlanRunner:
    """One plan on one model."""

    def __init__(
        self,
        model: ScoringModel,
        continuations: Sequence[Continuation],
        batch_size: int,
        on_answer: OnAnswer,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.on_answer = on_answer
        self.n_forwards = 0
        self._log_probabilities = [[0.0] * each.n_scored for each in continuations]
        self._greedy = [[False] * each.n_scored for each in continuations]
        self._missing = [each.n_scored for each in continuations]
        self._slot_bytes = slot_bytes(model.sizes)
        self._cache_bytes = self._level_bytes = cache_bytes
        self._most_tokens = CPU_TOKENS * torch.get_num_threads() if model.device.type == "cpu" else math.inf

    @torch.inference_mode()
    def run(self, plan: Plan) -> None:
        """Answer everything; processes that share the model make the same forwards in the same order."""
        levels = max((root.height for root in plan.roots), default=1)
        self._level_bytes = self._cache_bytes // levels
        self._run_nodes([(node, 0) for node in plan.roots], None)

    def _run_nodes(self, nodes: list[tuple[Node, int]], above: KVCache | None) -> None:
        """Nodes, each with its row in the cache above it; then what is below them, before the next batch."""
        # Roots by length: what runs out of memory does so at once, and similar lengths share a batch. Others by their
        # row above, so that one batch after the other begins with the same keys and values.
        nodes.sort(key=lambda item: (item[1], -len(item[0].tokens), item[0].tokens))
        batches = list(self._batches(nodes))
        n_rows, n_slots = max(map(len, batches)), max(node.end for node, _ in nodes)
        rows = None if above is None else _Rows(above, self.model.new_cache(n_rows, n_slots))
        for batch in batches:
            if rows is None:
                cache = self.model.new_cache(len(batch), max(node.end for node, _ in batch))
            else:
                cache = rows.take([row for _, row in batch])
            self._forward([node for node, _ in batch], cache)
            below = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if below:
                self._run_nodes(below, cache)

    def _batches(self, nodes: Sequence[tuple[Node, int]]) -> Iterator[Sequence[tuple[Node, int]]]:
        """Stretches of the list that run together."""
        most = max(1, self._level_bytes // (self._slot_bytes * max(node.end for node, _ in nodes)))
        start = 0
        while start < len(nodes):
            end, longest = start, 0
            while end < len(nodes) and end - start < most:
                longest = max(longest, len(nodes[end][0].tokens))
                n_rows = end - start + 1
                if n_rows > self.batch_size and n_rows * longest > SHORT * self.batch_size:
                    break
                if n_rows > 1 and n_rows * longest > self._most_tokens:
                    break
                end += 1
            yield nodes[start:end]
            start = end

    def _forward(self, nodes: Sequence[Node], cache: KVCache) -> None:
        width = max(len(node.tokens) for node in nodes)
        device = self.model.device
        tokens = torch.tensor([[*node.tokens, *[0] * (width - len(node.tokens))] for node in nodes], device=device)
        reads = [(row, read) for row, node in enumerate(nodes) for read in node.reads]
        wanted = [row * width + read.first + i for row, read in reads for i in range(len(read.targets))]
        targets = [target for _, read in reads for target in read.targets]
        log_probabilities, greedy = self.model.score(
            tokens,
            cache,
            [len(node.tokens) for node in nodes],
            torch.tensor(wanted, dtype=torch.int64, device=device),
            torch.tensor(targets, dtype=torch.int64, device=device),
        )
        self.n_forwards += 1
        self._collect(nodes, log_probabilities.tolist(), greedy.tolist())

    def _collect(self, nodes: Sequence[Node], log_probabilities: list[float], greedy: list[bool]) -> None:
        start = 0
        for read in (read for node in nodes for read in node.reads):
            n, index = len(read.targets), read.continuation
            self._log_probabilities[index][read.at : read.at + n] = log_probabilities[start : start + n]
            self._greedy[index][read.at : read.at + n] = greedy[start : start + n]
            self._missing[index] -= n
            start += n
            if not self._missing[index]:
                self.on_answer(index, Answer(tuple(self._log_probabilities[index]), tuple(self._greedy[index])))
