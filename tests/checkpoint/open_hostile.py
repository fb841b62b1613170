"""`python open_hostile.py FOLDER`: opens every checkpoint in it, in a process of its own, and says what came of it."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from megagpt.checkpoint.hf import import_hf
from megagpt.checkpoint.manage import list_checkpoints
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import MegaGPTError

FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)


def open_one(run: Path) -> None:
    (step_dir,) = (run / "checkpoints").iterdir()
    if (step_dir / "config.json").exists():
        import_hf(step_dir)
        return
    list_checkpoints(run)
    opened = open_checkpoint(step_dir)
    opened.load_model()
    if opened.manifest.tokenizer is not None:
        opened.tokenizer()


def main(folder: Path) -> None:
    runs = sorted(folder.iterdir())
    open_one(folder.parent / "good")  # everything is imported now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events: list[str] = []

    def watch(name: str, args: tuple[Any, ...]) -> None:
        if name in FORBIDDEN or (name == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
            events.append(f"{name} {args}")

    sys.addaudithook(watch)
    found = {}
    for run in runs:
        started_at = time.monotonic()
        del events[:]
        try:
            open_one(run)
            told, kind = "accepted", "accepted"
        except MegaGPTError as error:
            told, kind = str(error), "refused"
        except BaseException as error:  # noqa: BLE001 - it is the test's to judge
            told, kind = repr(error)[:500], "not handled"
        found[run.name] = {"kind": kind, "told": told, "events": list(events), "seconds": time.monotonic() - started_at}
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(json.dumps({"found": found, "more_kib": more}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
