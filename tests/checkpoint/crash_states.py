"""What a power cut can leave of what a save has done: the method of ALICE and BOB (Pillai et al., OSDI 2014).

A save's calls are recorded. At any point of the record, what was flushed is on disk, and of everything else any part:
each entry of a folder and each write by itself, in any order, and of a write any sectors. A name is durable when its
folder was flushed after it was given, data when its file was. `rename` is atomic. That is what POSIX promises, and less
than any file system in use keeps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.checkpoint.calls import place_of, standing_in

SECTOR = 512


@dataclass(frozen=True)
class Call:
    """One call that changed the file system, or (`acknowledged`) the moment when a save was said to be done."""

    name: str
    path: str
    """Relative to the folder that is recorded."""
    target: str = ""
    """Of a rename."""
    content: bytes = b""
    """Of a write, which goes behind the ones before it."""
    step: int = 0
    at: int = 0
    """Nanoseconds of a clock that all processes share: of a write its begin, of all else its end."""


class Recorder:
    """Records the calls below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[Call] = []

    def handle(self, name: str, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began, place = time.monotonic_ns(), place_of(args, kwargs)
        result = call()
        if not place.is_relative_to(self.root):
            return result
        path = str(place.relative_to(self.root))
        now = time.monotonic_ns()
        if name == "write":
            self.calls.append(Call(name, path, content=bytes(args[1])[:result], at=began))
        elif name in ("rename", "replace"):
            self.calls.append(Call("rename", path, target=str(Path(args[1]).relative_to(self.root)), at=now))
        else:
            self.calls.append(Call(name, path, at=now))
        return result

    def acknowledge(self, step: int) -> None:
        self.calls.append(Call("acknowledged", "", step=step, at=time.monotonic_ns()))


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    recorder = Recorder(root.resolve())
    with standing_in(recorder.handle):
        yield recorder


@dataclass
class _Node:
    """A file or a folder, whatever its name is now."""

    is_folder: bool
    entries: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Effect:
    """What a call does to one node. A rename is one effect on its folder."""

    index: int
    """Its place among all effects."""
    node: int
    entries: tuple[tuple[str, int | None], ...] = ()
    """Name -> node it is given to; None removes it."""
    offset: int = 0
    content: bytes = b""


class History:
    """A record as effects and flushes."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = sorted(calls, key=lambda call: call.at)
        self._nodes: list[_Node] = [_Node(is_folder=True)]
        self._sizes: dict[int, int] = {}
        self.steps: list[tuple[str, Any]] = []
        """("effect", it) | ("flush", node) | ("acknowledged", step), in order."""
        for call in self.calls:
            getattr(self, f"_{call.name}")(call)

    def _find(self, path: Path) -> int:
        node = 0
        for part in path.parts:
            node = self._nodes[node].entries[part]
        return node

    def _entry(self, path: Path, node: int | None, *others: tuple[str, int | None]) -> None:
        folder = self._find(path.parent)
        for name, given in (*others, (path.name, node)):
            if given is None:
                del self._nodes[folder].entries[name]
            else:
                self._nodes[folder].entries[name] = given
        self.steps.append(("effect", _Effect(len(self.steps), folder, (*others, (path.name, node)))))

    def _made(self, call: Call, *, is_folder: bool) -> None:
        path = Path(call.path)
        known = self._nodes[self._find(path.parent)].entries
        if path.name in known:
            assert is_folder, f"{path} is written over"
            return
        self._nodes.append(_Node(is_folder))
        self._entry(path, len(self._nodes) - 1)

    def _mkdir(self, call: Call) -> None:
        self._made(call, is_folder=True)

    def _open(self, call: Call) -> None:
        self._made(call, is_folder=False)

    def _write(self, call: Call) -> None:
        node = self._find(Path(call.path))
        offset = self._sizes.get(node, 0)
        self._sizes[node] = offset + len(call.content)
        self.steps.append(("effect", _Effect(len(self.steps), node, offset=offset, content=call.content)))

    def _fsync(self, call: Call) -> None:
        self.steps.append(("flush", self._find(Path(call.path))))

    def _rename(self, call: Call) -> None:
        old, new = Path(call.path), Path(call.target)
        assert old.parent == new.parent
        self._entry(new, self._find(old), (old.name, None))

    def _unlink(self, call: Call) -> None:
        self._entry(Path(call.path), None)

    _rmdir = _unlink

    def _acknowledged(self, call: Call) -> None:
        self.steps.append(("acknowledged", call.step))

    def at(self, length: int) -> tuple[list[_Effect], list[_Effect], int | None]:
        """After so many steps: what is durable, what need not be, and the newest step that was acknowledged."""
        durable: list[_Effect] = []
        pending: list[_Effect] = []
        acknowledged = None
        for kind, what in self.steps[:length]:
            if kind == "effect":
                pending.append(what)
            elif kind == "flush":
                durable += [one for one in pending if one.node == what]
                pending = [one for one in pending if one.node != what]
            else:
                acknowledged = what
        return durable, pending, acknowledged

    def lay_out(self, effects: Sequence[_Effect], root: Path) -> None:
        """Make the files that these effects leave."""
        entries: dict[int, dict[str, int]] = {}
        data: dict[int, bytearray] = {}
        for one in sorted(effects, key=lambda one: one.index):
            if one.entries:
                folder = entries.setdefault(one.node, {})
                for name, node in one.entries:
                    if node is None:
                        folder.pop(name, None)
                    else:
                        folder[name] = node
            else:
                content = data.setdefault(one.node, bytearray())
                content.extend(bytes(max(0, one.offset + len(one.content) - len(content))))
                content[one.offset : one.offset + len(one.content)] = one.content
        self._lay_out(0, root, entries, data)

    def _lay_out(self, node: int, path: Path, entries: dict[int, dict[str, int]], data: dict[int, bytearray]) -> None:
        if not self._nodes[node].is_folder:
            path.write_bytes(data.get(node, b""))
            return
        path.mkdir()
        for name, inner in entries.get(node, {}).items():
            self._lay_out(inner, path / name, entries, data)


def torn(one: _Effect, choose: random.Random) -> _Effect:
    """Some sectors of a write: the first ones, any of them, or its length with zeros or rubbish in it."""
    content, cut = one.content, choose.randrange(len(one.content) + 1)
    how = choose.randrange(4)
    if how == 0:
        left = content[: cut // SECTOR * SECTOR] if len(content) > SECTOR else content[:cut]
    elif how == 1:
        left = bytes(len(content))
    elif how == 2:
        left = content[:cut] + choose.randbytes(len(content) - cut)
    else:
        pieces = [content[i : i + SECTOR] for i in range(0, len(content), SECTOR)]
        left = b"".join(piece if choose.random() < 0.5 else bytes(len(piece)) for piece in pieces)
    return replace(one, content=left)


Check = Callable[[Path, int | None], str | None]
"""(what a crash left, the newest step that was acknowledged before) -> what is wrong with it, or None."""


def crash_states(history: History, n_random: int, seed: int, where: Path) -> Iterator[tuple[str, Path, int | None]]:
    """Every prefix with all and with nothing of what is pending, then random ones: a name, the files, the promise."""
    choose = random.Random(seed)
    number = 0

    def state(name: str, effects: Sequence[_Effect]) -> tuple[str, Path]:
        nonlocal number
        number += 1
        path = where / f"{number:06d}"
        history.lay_out(effects, path)
        return name, path

    for length in range(len(history.steps) + 1):
        durable, pending, acknowledged = history.at(length)
        yield (*state(f"after {length} calls, all kept", [*durable, *pending]), acknowledged)
        yield (*state(f"after {length} calls, nothing kept", durable), acknowledged)
    for _ in range(n_random):
        length = choose.randrange(len(history.steps) + 1)
        durable, pending, acknowledged = history.at(length)
        kept = list(durable)
        for one in pending:
            fate = choose.random()
            if fate < 0.4:
                kept.append(one)
            elif fate < 0.7 and one.content:
                kept.append(torn(one, choose))
        yield (*state(f"after {length} calls, some kept", kept), acknowledged)


def violations(history: History, check: Check, n_random: int, seed: int, where: Path) -> tuple[int, list[str]]:
    """How many states there were, and what is wrong with them."""
    where.mkdir()
    found: list[str] = []
    count = 0
    for name, path, acknowledged in crash_states(history, n_random, seed, where):
        count += 1
        problem = check(path, acknowledged)
        if problem is not None:
            found.append(f"{name}: {problem}")
    return count, found


def without_flushing(calls: Sequence[Call], *, folders: bool) -> list[Call]:
    """A record as if the files had not been flushed, or the folders."""
    files = {call.path for call in calls if call.name == "open"}
    return [call for call in calls if call.name != "fsync" or (call.path in files) == folders]
