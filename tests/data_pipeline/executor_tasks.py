"""Tasks for the tests of executors, in a module that worker processes can import."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.config import DataJob
from data_pipeline.executors.base import Executor
from data_pipeline.extract.watchdog import Watchdog
from data_pipeline.tasks import Counts, Finished, Task, commit, execute, read_record
from megagpt.errors import DataError

N_RECORDS = 20


def fine(folder: Path, seed: int, progress=None) -> Counts:
    """Two files whose bytes depend on the arguments alone; one record in five is rejected."""
    (folder / "deeper").mkdir()
    kept = [ordinal for ordinal in range(N_RECORDS) if ordinal % 5]
    (folder / "kept.txt").write_text("".join(hashlib.sha256(f"{seed} {n}".encode()).hexdigest() for n in kept))
    (folder / "deeper" / "seed.json").write_text(json.dumps({"seed": seed}))
    progress(N_RECORDS, N_RECORDS)
    return Counts(N_RECORDS, len(kept), {"fifth": N_RECORDS - len(kept)})


def slow(folder: Path, seed: int, progress=None) -> Counts:
    """As `fine`, in a second and a half."""
    for _ in range(15):
        time.sleep(0.1)
        progress(1, 0)
    return fine(folder, seed, lambda n_bytes, n_documents: progress(5, n_documents))


def killed(folder: Path, seed: int, tombs: Path, times: int, progress=None) -> Counts:
    """As `fine`, but the first attempts are killed in the middle of their work, `times` in all."""
    (folder / "half").write_text("written by an attempt that was killed" if seed else "")
    if len(list(tombs.iterdir())) < times:
        (tombs / f"{time.time_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    (folder / "half").unlink()
    return fine(folder, seed, progress)


def poisoned(folder: Path, poison: Path, deadly: Sequence[int], tombs: Path, progress=None) -> Counts:
    """Pages that crash the process, under the watchdog that leaves them out of the next attempt."""

    def extract(page: bytes, charset: str) -> str:
        if int(page) in deadly:
            (tombs / page.decode()).touch()
            faulthandler._sigsegv()
        return page.decode()

    kept, reasons = [], Counter()
    with Watchdog(20.0, poison) as watchdog:
        for ordinal in range(N_RECORDS):
            text, reason = watchdog.run(ordinal, extract, str(ordinal).encode(), "")
            if reason:
                reasons[reason] += 1
            else:
                kept.append(text)
    (folder / "kept.txt").write_text(" ".join(kept))
    return Counts(N_RECORDS, len(kept), dict(reasons))


def says(folder: Path, what: str, progress=None) -> Counts:
    """Ends with an error."""
    if what == "data":
        raise DataError("line 3 is no JSON")
    if what == "disk":
        raise OSError(28, "No space left on device")
    raise ZeroDivisionError("division by zero")


def greedy(folder: Path, pid_file: Path, n_bytes: int, progress=None) -> Counts:
    """Holds on to memory that was written to, and notes in which process."""
    pid_file.write_text(str(os.getpid()))
    if n_bytes:
        _HELD.append(b"x" * n_bytes)
    return Counts(0, 0)


_HELD: list[bytes] = []


def task(number: int, work: Callable[..., Counts], *arguments, poison: Path | None = None) -> Task:
    """A task of the stage `map` over a shard of 20 bytes."""
    partition = f"{number:06d}"
    target = Path("stages/map") / partition
    return Task("map", partition, f"{number}.jsonl", work, arguments, {}, "code", {}, target, N_RECORDS, poison=poison)


def poisoned_task(number: int, job_folder: Path, deadly: Sequence[int], tombs: Path) -> Task:
    poison = Path(f"stages/map/{number:06d}.poison.json")
    return task(number, poisoned, job_folder / poison, tuple(deadly), tombs, poison=poison)


def run(executor: Executor, job_folder: Path, tasks: Sequence[Task]) -> list[str]:
    """Run and commit; returns the partitions in the order in which they were done."""
    done: list[str] = []
    main_thread = threading.current_thread()

    def keep(task: Task, finished: Finished) -> None:
        assert threading.current_thread() is main_thread
        commit(task, finished, job_folder)
        done.append(task.partition)

    with executor:
        executor.run(tasks, job_folder, keep)
    return done


def bytes_of(job_folder: Path) -> dict[str, bytes]:
    """Everything that the tasks left, but for the seconds that records name."""
    found = {}
    for path in sorted(job_folder.rglob("*")):
        name = path.relative_to(job_folder).as_posix()
        if path.is_file() and not name.startswith(("stages/slurm_logs", "scratch/")):
            content = path.read_bytes()
            if name.startswith("stages/map/") and name.count("/") == 2:
                content = json.dumps(json.loads(content) | {"cpu_seconds": 0, "wall_seconds": 0}).encode()
            found[name] = content
    return found


def expected_bytes(job_folder: Path, seeds: Sequence[int]) -> dict[str, bytes]:
    """What tasks `fine` over these seeds leave, made here without any executor."""
    for number, seed in enumerate(seeds):
        one = task(number, fine, seed)
        commit(one, execute(one, job_folder, lambda *_: None), job_folder)
    return bytes_of(job_folder)


def small_job(folder: Path, out: str, **changes) -> DataJob:
    """A job over two shards with duplicates, the same for every `out`."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for shard in range(2):
        rng = random.Random(shard)
        texts = [" ".join(rng.choice(_WORDS) for _ in range(rng.randint(80, 160))) for _ in range(30)]
        texts += [texts[0].upper(), texts[1] + " and one more"]
        (corpus / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "out": str(folder / out),
        "sources": [str(corpus)],
        "language": {"keep": [], "min_score": 0.0},
        "filters": {},
        "tokenizer": {"vocab_size": 300},
        "pack": {"val_fraction": 0.2},
    }
    return DataJob.model_validate_json(json.dumps({**values, **changes}))


def results_of(job: DataJob) -> dict[str, object]:
    """The token files, their manifest, and what every record of the job names as outputs and counts."""
    files = [
        path for path in sorted(job.out.iterdir()) if path.suffix in (".bin", ".idx") or path.name == "manifest.json"
    ]
    found: dict[str, object] = {path.name: path.read_bytes() for path in files}
    for path in sorted((job.out / "stages").glob("*/*.json")):
        if (record := read_record(path)) is not None:
            found[f"{record.stage}/{record.partition}"] = (record.outputs, record.counts)
    return found


_WORDS = [first + middle + last for first in "bcdfg" for middle in ("a", "ent", "or") for last in ("", "s", "ed")]
