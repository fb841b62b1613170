"""Tasks with content-hashed records: what makes a stopped job go on, and a changed one start again where it must.

A task is a pure function of its configuration, its code and its inputs. It writes into a scratch folder; the finished
files are renamed into place and only then is the record written. A task is reused if and only if its record
exists, every hash in it equals the one asked for now, and its outputs still have the bytes that the record names.

    <job>/stages/STAGE/PARTITION.json    the record
    <job>/stages/STAGE/PARTITION/        the outputs, unless the task says another target
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megagpt.atomic import flush_folder, flush_to_disk, write_file
from megagpt.errors import DataError

Progress = Callable[[int, int], None]
"""progress(bytes, documents): how much was done since the last call."""

STAGES_FOLDER = "stages"
SCRATCH_FOLDER = "scratch"
OUTPUTS_FOLDER = "outputs"
"""In an attempt's folder."""
_HASH_BLOCK_BYTES = 1 << 22


@dataclass(slots=True)
class Counts:
    """What a task did with its documents; `documents_in = documents_out + sum(rejected)` or the job stops."""

    documents_in: int
    documents_out: int
    rejected: dict[str, int] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    """Everything else that the report wants to know; JSON values only."""


@dataclass(frozen=True)
class Task:
    """One unit of work: a function, what its result depends on, and where the result goes."""

    stage: str
    partition: str
    subject: str
    """What it works on, for errors: the path of a shard."""
    work: Callable[..., Counts]
    """work(folder, *arguments, progress=...) writes its outputs into `folder`; a module-level function."""
    arguments: tuple[Any, ...]
    config: Mapping[str, Any]
    """The configuration values that the result depends on; JSON values."""
    code: str
    """Fingerprint of the stage's code, see code_fingerprint.py."""
    inputs: Mapping[str, str]
    """Name of an input -> hash of its content."""
    target: Path
    """Folder of the outputs, relative to the job's."""
    size_bytes: int = 0
    """Bytes to work through, for the progress bar; 0 where unknown."""
    poison: Path | None = None
    """Relative to the job's folder: where `work` notes the records that ended its process, to leave them out when it is
    tried again (see extract/watchdog.py). A task that has one never runs in the process that started the job."""

    @property
    def name(self) -> str:
        """Stage and partition, as the user reads it."""
        return f"{self.stage} {self.partition}"

    def record_path(self, job_folder: Path) -> Path:
        """Where its record lies."""
        return job_folder / STAGES_FOLDER / self.stage / f"{self.partition}.json"


@dataclass(frozen=True)
class TaskRecord:
    """Proof that a task was done: what it depended on, and what came out."""

    stage: str
    partition: str
    config_hash: str
    config: dict[str, Any]
    code: str
    input_hashes: dict[str, str]
    target: str
    outputs: dict[str, dict[str, Any]]
    """File -> {"xxh3_128": hex, "bytes": size}."""
    counts: Counts
    cpu_seconds: float
    wall_seconds: float

    def path(self, job_folder: Path, file: str) -> Path:
        """The full path of one of its outputs."""
        return job_folder / self.target / file

    def hashes(self) -> dict[str, str]:
        """Its outputs as the inputs of a later task."""
        return {f"{self.stage}/{self.partition}/{file}": o["xxh3_128"] for file, o in self.outputs.items()}


@dataclass(frozen=True)
class Finished:
    """What a worker hands back: the outputs lie in `folder`, hashed and on disk, not yet in place."""

    folder: Path
    outputs: dict[str, dict[str, Any]]
    counts: Counts
    cpu_seconds: float
    wall_seconds: float


def hash_file(path: Path) -> str:
    """Hex xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hex xxh3_128 of a JSON value, independent of the order of keys."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> TaskRecord | None:
    """The record, or None where there is none or it cannot be read (then the task is done again)."""
    try:
        values = json.loads(path.read_bytes())
        counts = Counts(**values.pop("counts"))
        return TaskRecord(counts=counts, **values)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def why_not_reused(task: Task, record: TaskRecord | None, job_folder: Path) -> str | None:
    """None if the record stands for exactly this task and its outputs are intact; else the reason in words."""
    if record is None:
        return "not done yet"
    if record.config_hash != hash_json(task.config):
        return "configuration changed: " + ", ".join(_differences(record.config, task.config))
    if record.code != task.code:
        return "the code of this stage or a library it uses changed"
    if record.input_hashes != dict(task.inputs):
        changed = sorted(
            name
            for name in record.input_hashes.keys() | task.inputs.keys()
            if record.input_hashes.get(name) != task.inputs.get(name)
        )
        return f"input changed: {changed[0]}" + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
    return _damage(record, job_folder)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "(absent)"), now.get(key, "(absent)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{at}{key}.")
        elif old != new:
            found.append(f"{at}{key} {old!r} -> {new!r}")
    return found


def _damage(record: TaskRecord, job_folder: Path) -> str | None:
    for file, expected in record.outputs.items():
        path = record.path(job_folder, file)
        if not path.is_file():
            return f"output {path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"output {path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if hash_file(path) != expected["xxh3_128"]:
            return f"output {path} does not have the content that its record names (xxh3_128)"
    return None


def scratch_folder(task: Task, job_folder: Path) -> Path:
    """Where all attempts at a task work until the outputs of one are renamed into place: one folder an attempt."""
    return job_folder / SCRATCH_FOLDER / task.stage / task.partition


def new_attempt(task: Task, job_folder: Path) -> Path:
    """A new folder for one attempt: no other attempt, of this run or of an earlier one, has ever seen its name."""
    folder = scratch_folder(task, job_folder) / uuid.uuid4().hex
    (folder / OUTPUTS_FOLDER).mkdir(parents=True)
    return folder


def execute(
    task: Task, job_folder: Path, progress: Progress | None = None, attempt_folder: Path | None = None
) -> Finished:
    """Run the task into its attempt's folder, check conservation, sync and hash the outputs. Runs in a worker.

    Args:
        task: what to run.
        job_folder: the job's folder.
        progress: is told how much was done.
        attempt_folder: what `new_attempt` made; None makes one.

    Raises:
        DataError: documents went missing or came from nowhere.
    """
    folder = (attempt_folder or new_attempt(task, job_folder)) / OUTPUTS_FOLDER
    cpu, wall = time.process_time(), time.perf_counter()
    counts = task.work(folder, *task.arguments, progress=progress)
    check_conservation(f"{task.name} ({task.subject})", counts)
    outputs = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as written:
            flush_to_disk(written)
        file = path.relative_to(folder).as_posix()
        outputs[file] = {"xxh3_128": hash_file(path), "bytes": path.stat().st_size}
    return Finished(folder, outputs, counts, time.process_time() - cpu, time.perf_counter() - wall)


def check_conservation(what: str, counts: Counts) -> None:
    """Every document that went in came out or was rejected for a reason.

    Raises:
        DataError: the numbers do not add up.
    """
    rejected = sum(counts.rejected.values())
    if counts.documents_in != counts.documents_out + rejected:
        raise DataError(
            f"{what}: {counts.documents_in} documents in, but {counts.documents_out} out + {rejected} rejected "
            f"= {counts.documents_out + rejected}; no output was kept. This is a defect of the stage, please report it"
        )


def commit(task: Task, finished: Finished, job_folder: Path, invalidates: Iterable[Path] = ()) -> TaskRecord:
    """Rename the outputs into place, then write the record: only now is the task done.

    Of an earlier result, files that the new one does not have are removed.

    Args:
        task: what was run.
        finished: what its worker handed back.
        job_folder: the job's folder.
        invalidates: files that describe the outputs about to be replaced, and must not outlive them.
    """
    record_path = task.record_path(job_folder)
    record_path.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_record(record_path)
    for path in invalidates:
        path.unlink(missing_ok=True)
    # Before the record goes: killed in between, the task is done again, for it says what else lies there.
    if earlier is not None:
        for file in earlier.outputs.keys() - finished.outputs.keys():
            old = earlier.path(job_folder, file)
            if old.is_file() and old.stat().st_size == earlier.outputs[file]["bytes"]:  # still what was written here
                old.unlink()
    record_path.unlink(missing_ok=True)
    flush_folder(record_path.parent)
    target = job_folder / task.target
    for file in finished.outputs:
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        (finished.folder / file).replace(place)
        flush_folder(place.parent)
    # On a shared file system a straggler that was given up may still write there: what it leaves, the job removes.
    shutil.rmtree(scratch_folder(task, job_folder), ignore_errors=True)
    record = TaskRecord(
        stage=task.stage,
        partition=task.partition,
        config_hash=hash_json(task.config),
        config=dict(task.config),
        code=task.code,
        input_hashes=dict(task.inputs),
        target=task.target.as_posix(),
        outputs=finished.outputs,
        counts=finished.counts,
        cpu_seconds=round(finished.cpu_seconds, 3),
        wall_seconds=round(finished.wall_seconds, 3),
    )
    # Keys keep their order: what is made of a record is the same whether its task was run or reused.
    write_file(record_path, json.dumps(dataclasses.asdict(record), indent=1).encode() + b"\n")
    return record


def total(records: Sequence[TaskRecord]) -> Counts:
    """The sum of the tasks of one stage (details are not added)."""
    rejected: dict[str, int] = {}
    for record in records:
        for reason, number in record.counts.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + number
    return Counts(
        sum(record.counts.documents_in for record in records),
        sum(record.counts.documents_out for record in records),
        rejected,
    )
