"""Inputs that begin alike, as a tree: what they share runs through the model once.

A planner without a model: it says which tokens are computed, in which order, and where scores are read off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

LEAST_SHARED = 8
"""Shared tokens that are worth a step of their own; fewer are computed again in each branch."""


Tokens = npt.NDArray[np.uint32]
TOKEN = np.dtype(">u4")
"""Big-endian: bytes sort as the tokens do, and comparing two inputs is one memcmp."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """One input, and the tokens that its last `n_scored` predictions are compared with."""

    inputs: bytes
    """Tokens as `TOKEN`s: four bytes a token, where a Python number takes 36."""
    targets: tuple[int, ...]

    @classmethod
    def of(cls, inputs: npt.ArrayLike, targets: Iterable[int]) -> Continuation:
        """From token ids."""
        return cls(np.asarray(inputs, dtype=TOKEN).tobytes(), tuple(targets))

    @property
    def n_inputs(self) -> int:
        """Tokens that are run."""
        return len(self.inputs) // TOKEN.itemsize

    @property
    def n_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.targets)

    def tokens(self) -> list[int]:
        """The input's ids."""
        return np.frombuffer(self.inputs, dtype=TOKEN).tolist()  # type: ignore[no-any-return]


@dataclass(slots=True)
class Read:
    """Predictions of one node's tokens that one continuation is scored by."""

    continuation: int
    """Its number among those that were planned."""
    first: int
    """Where they begin, in tokens from the node's beginning."""
    targets: tuple[int, ...]
    at: int
    """Where they begin among the continuation's scored tokens."""


@dataclass(slots=True)
class Node:
    """Tokens that run together, behind those of all nodes above."""

    start: int
    """Tokens above."""
    tokens: tuple[int, ...]
    children: list[Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Tokens of the whole path."""
        return self.start + len(self.tokens)

    @property
    def height(self) -> int:
        """Nodes on the longest way down, this one included."""
        return 1 + max((child.height for child in self.children), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """All forward work of a list of continuations."""

    roots: list[Node]
    n_tokens: int
    """Tokens that run through the model."""
    n_tokens_naive: int
    """Tokens of all inputs, each by itself: as many as without any sharing."""

    def nodes(self) -> Iterator[Node]:
        """Every node."""
        waiting = list(self.roots)
        while waiting:
            node = waiting.pop()
            waiting += node.children
            yield node


@dataclass(slots=True)
class _Branch:
    """A node of the full tree; `owner` is an input that runs through it, `end` where it ends there."""

    end: int
    owner: int
    children: list[_Branch] = field(default_factory=list)
    is_input: bool = True


def plan_forwards(continuations: Sequence[Continuation], *, share_prefixes: bool = True) -> Plan:
    """Find what inputs share.

    Args:
        continuations: what is to be scored.
        share_prefixes: whether inputs that only begin alike share what they can; equal inputs always run once.
    """
    order = sorted({each.inputs for each in continuations})
    number = {inputs: index for index, inputs in enumerate(order)}
    arrays = [np.frombuffer(inputs, dtype=TOKEN) for inputs in order]
    branches = _full_tree(arrays) if share_prefixes else [_Branch(len(a), i) for i, a in enumerate(arrays)]
    paths: dict[int, list[Node]] = {}
    roots = _worthwhile(branches, arrays, paths)
    for index, continuation in enumerate(continuations):
        _place_reads(index, continuation, paths[number[continuation.inputs]])
    found = Plan(roots, 0, sum(each.n_inputs for each in continuations))
    return Plan(roots, sum(len(node.tokens) for node in found.nodes()), found.n_tokens_naive)


def cut_in_parts(continuations: Sequence[Continuation], n_parts: int) -> list[list[Continuation]]:
    """Parts for processes that share the work: neighbours in the prefix tree stay together, costs are alike.

    Args:
        continuations: what is to be scored.
        n_parts: at most so many; what two parts share runs in both.
    """
    order = sorted(continuations, key=lambda each: (each.inputs, each.targets))
    costs, before = [], np.empty(0, dtype=TOKEN)
    for each in order:
        array = np.frombuffer(each.inputs, dtype=TOKEN)
        costs.append(len(array) - _common(before, array))
        before = array
    parts: list[list[Continuation]] = [[] for _ in range(n_parts)]
    share = max(1, sum(costs)) / n_parts
    done = 0
    for each, cost in zip(order, costs, strict=True):
        parts[min(n_parts - 1, int(done / share))].append(each)
        done += cost
    return [part for part in parts if part]


def _full_tree(arrays: Sequence[Tokens]) -> list[_Branch]:
    """The compressed prefix tree of sorted inputs, by their longest common prefixes with the one before."""
    top = _Branch(0, 0, is_input=False)
    open_branches = [top]
    for index, array in enumerate(arrays):
        common = _common(arrays[index - 1], array) if index else 0
        closed = None
        while open_branches[-1].end > common:
            closed = open_branches.pop()
        if closed is not None and open_branches[-1].end < common:
            fork = _Branch(common, index, [closed], is_input=False)
            open_branches[-1].children[-1] = fork
            open_branches.append(fork)
        leaf = _Branch(len(array), index)
        open_branches[-1].children.append(leaf)
        open_branches.append(leaf)
    return top.children


def _common(a: Tokens, b: Tokens) -> int:
    """Tokens that two inputs share at the beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _worthwhile(branches: Sequence[_Branch], arrays: Sequence[Tokens], paths: dict[int, list[Node]]) -> list[Node]:
    """The tree without forks that save too little; fills in the path of nodes of every input."""
    roots: list[Node] = []
    waiting: list[tuple[_Branch, list[Node]]] = [(branch, []) for branch in reversed(branches)]
    while waiting:
        branch, above = waiting.pop()
        start = above[-1].end if above else 0
        is_node = not branch.children or branch.end - start >= LEAST_SHARED
        path = above
        if branch.is_input or is_node:
            node = Node(start, tuple(arrays[branch.owner][start : branch.end].tolist()))
            (above[-1].children if above else roots).append(node)
            path = [*above, node]
        if branch.is_input:
            paths[branch.owner] = path
        waiting += [(child, path if is_node else above) for child in reversed(branch.children)]
    return roots


def _place_reads(index: int, continuation: Continuation, path: Sequence[Node]) -> None:
    """Each scored position is read where its token runs."""
    first_scored = continuation.n_inputs - continuation.n_scored
    for node in path:
        begin, end = max(node.start, first_scored), node.end
        if begin < end:
            at = begin - first_scored
            targets = continuation.targets[at : at + end - begin]
            node.reads.append(Read(index, begin - node.start, targets, at))
