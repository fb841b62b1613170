"""Every call of a save that changes the file system passes through one function of the test's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR

Handler = Callable[[str, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]
"""(name of the call, the call itself, its arguments) -> its result."""


@contextmanager
def standing_in(handler: Handler) -> Iterator[None]:
    """Let `handler` make the calls: of any thread, files opened for reading left out."""

    def stand_in(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & _WRITES:
                return call(*args, **kwargs)
            if name == "write" and not path_of(args[0]).is_absolute():  # a pipe
                return call(*args, **kwargs)
            return handler(name, lambda: call(*args, **kwargs), args, kwargs)

        return called

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(patch.object(os, name, stand_in(name, getattr(os, name))))
        yield


def path_of(descriptor: int) -> Path:
    """Where an open file is."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def place_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
    """The path that a call is about, also where it counts from an open folder."""
    if isinstance(args[0], int):
        return path_of(args[0])
    folder = kwargs.get("dir_fd")
    return Path(args[0]) if folder is None else path_of(folder) / args[0]
