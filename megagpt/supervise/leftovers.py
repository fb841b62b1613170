"""What a launcher leaves behind on this host: it has time to save, and is killed when it does not get on.

`deepspeed` on one host ends at once where it is asked to, and says nothing to its ranks; they see that it has gone,
save and end. How long that takes nobody knows better than they: each has a watch that ends it past its deadlines.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

OTHERS_SECONDS = 60.0
"""For what is left where no rank is: nothing that could be saved, at most."""
_STEP_SECONDS = 300.0
"""For the step that a rank is in when it is asked to stop."""
_ASK_AGAIN_SECONDS = 0.2
_LOOK_AGAIN_SECONDS = 1.0
"""Between two looks at a folder that other hosts may have to be asked about."""
_TOLD_AFTER_SECONDS = 5.0
_COMPLETE = re.compile(r"step_\d+")


def save_grace(save_seconds: float) -> float:
    """How long ranks may save and end without progress that can be seen from outside.

    Args:
        save_seconds: `watch.save_seconds`.
    """
    return save_seconds + _STEP_SECONDS if save_seconds else math.inf


def clear_away(session: int, checkpoints: Path, grace: Callable[[], float], say: Callable[[str], object]) -> None:
    """Wait until nothing of a launcher's session is left on this host; kill what has not got on for too long.

    Args:
        session: of the launcher.
        checkpoints: folder of the run's; while a file of one that is being written grows, the time counts anew.
        grace: seconds for ranks to save and end; asked again and again. For other processes, where no rank is left that
            is not stopped, 60 at most.
        say: shows a line to the user.
    """
    began = got_on_at = looked_at = time.monotonic()
    seen, told = progress_of(checkpoints), False
    while left := processes_of(session):
        now = time.monotonic()
        if now - looked_at > _LOOK_AGAIN_SECONDS:
            looked_at, before, seen = now, seen, progress_of(checkpoints)
            got_on_at = now if seen != before else got_on_at
        limit = grace() if any(map(_is_rank, left)) else min(grace(), OTHERS_SECONDS)
        if now - got_on_at > limit:
            say(f"killing {len(left)} processes that the launcher left behind: {[p.pid for p in left]}")
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # reaches stopped ones as well
        elif not told and now - began > _TOLD_AFTER_SECONDS:
            told = True
            say(f"waiting for {len(left)} processes to save and end; killed after {limit:.0f} s without progress")
        time.sleep(_ASK_AGAIN_SECONDS)


def progress_of(checkpoints: Path) -> frozenset[tuple[str, int]]:
    """What changes while a checkpoint is written: the folders, and the sizes of the files that are not published."""
    found: set[tuple[str, int]] = set()
    with contextlib.suppress(OSError):
        for entry in sorted(checkpoints.iterdir()):
            found.add((entry.name, 0))
            if not _COMPLETE.fullmatch(entry.name):
                found |= _sizes(entry)
    return frozenset(found)


def _sizes(folder: Path) -> set[tuple[str, int]]:
    """Of a folder that may be renamed while it is read."""
    found: set[tuple[str, int]] = set()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found.add((f"{folder.name}/{path.name}", path.stat().st_size))
    return found


def _is_rank(process: psutil.Process) -> bool:
    """A training process, by the word that DeepSpeed's launcher gives it; one that is stopped cannot save."""
    with contextlib.suppress(psutil.Error, OSError):
        named = any(word.startswith("--local_rank=") for word in process.cmdline())
        return named and process.status() != psutil.STATUS_STOPPED
    return False


def processes_of(session: int) -> list[psutil.Process]:
    """The processes of a session on this host that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
