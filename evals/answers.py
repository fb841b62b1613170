"""Answers of a model to single requests, on disk while a task is being scored: a killed evaluation goes on from them.

One append-only file a task and writer, `answers/<task>.<key>.<writer>.jsonl`: a line is a checksum, a space, and JSON.
JSON lines and not SQLite: appending whole lines needs no lock, transaction or recovery when a process is killed, every
process of a shared evaluation writes a file of its own, and a damaged line costs that line. The key is a hash of all
that decides an answer but the request; so no two checkpoints, precisions or versions of this code ever share one.

Where arithmetic is not row-invariant (half precision, a GPU), an answer's last digits depend on what shares its batch.
Then only an evaluation of the same layout, batch size and device takes it, and its last digits may not be those of an
evaluation that was never killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import xxhash

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "evals",
    "megagpt/model",
    "megagpt/parallel",
    "megagpt/checkpoint/open.py",
    "megagpt/checkpoint/tensors.py",
    "megagpt/data/indexed.py",
    "megagpt/drafts.py",
    "megagpt/generate.py",
    "megagpt/tokenizer.py",
)
"""Folders and files whose code decides answers and scores."""
SHOWS = (
    "evals/baselines.py",
    "evals/chat.py",
    "evals/compare*.py",
    "evals/contamination*.py",
    "evals/during.py",
    "evals/explain.py",
    "evals/items.py",
    "evals/judge*",
    "evals/live*.py",
    "evals/mt_bench",
    "evals/report*.py",
)
"""Of them, what only shows scores, or makes others: `evals.run` takes no answer from it."""


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """What an answer depends on beside the request."""

    checkpoint: str
    """Hash of the weights."""
    dtype: str
    max_seq_len: int
    tokenizer: str
    """Fingerprint."""
    code: str
    """From `code_version`."""
    arithmetic: str
    """What decides the last digits (`evals.run.Evaluation.arithmetic`): of row-invariant arithmetic its bits, which no
    layout changes, so that any number of processes goes on with the answers; else the layout and the device."""

    @property
    def digest(self) -> str:
        """Hex; part of the file's name."""
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """Hash of the sources that decide answers and of the libraries that compute; of others nothing is known."""
    libraries = [f"{package} {metadata.version(package)}\n" for package in ("torch", "lm-eval")]
    return hashlib.sha256("".join([f"{sources_hash()}\n", *libraries]).encode()).hexdigest()


def sources_hash(root: Path = ROOT) -> str:
    """Hash of the sources that decide answers and scores.

    Not the commit: that changes with every line of a report, and does not with a file that is not committed.

    Args:
        root: folder of the packages.
    """
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def source_files(root: Path = ROOT) -> list[Path]:
    """The files behind `sources_hash`, sorted.

    Args:
        root: folder of the packages.
    """
    shown = _python_files(root, SHOWS)
    return sorted(_python_files(root, SOURCES) - shown)


def _python_files(root: Path, patterns: Sequence[str]) -> set[Path]:
    found = [path for pattern in patterns for path in root.glob(pattern)]
    return {file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path])}


class AnswerStore:
    """The answers of one task."""

    def __init__(self, folder: Path, task: str, key: AnswerKey, writer: str = "0") -> None:
        """Read what any earlier writer of the same key left; nothing is written before the first `put`.

        Args:
            folder: of the answers.
            task: its name.
            key: what the answers depend on.
            writer: names this process among those that score the task together.
        """
        self._digest = key.digest
        self._stem = f"{task}.{self._digest[:16]}"
        self._folder = folder
        self._path = folder / f"{self._stem}.{writer}.jsonl"
        self._file: IO[bytes] | None = None
        self._answers: dict[str, Any] = {}
        self.n_damaged = 0
        """Lines that could not be used: the last one of a killed process, or damage; their requests run again."""
        for path in self.files():
            self._read(path)
        self.n_found = len(self._answers)
        """Answers that earlier processes left."""

    def files(self) -> list[Path]:
        """All writers' files of this task and key."""
        return sorted(self._folder.glob(f"{self._stem}.*.jsonl"))

    def get(self, request: str) -> Any | None:
        """The answer to a request, by its hash."""
        return self._answers.get(request)

    def known(self) -> dict[str, Any]:
        """All answers, by the hash of their requests."""
        return dict(self._answers)

    def take(self, answers: Mapping[str, Any]) -> None:
        """Know these and no others: processes that score a task together must all know the same."""
        self._answers = dict(answers)
        self.n_found = len(answers)

    def put(self, request: str, answer: Any) -> None:
        """Append an answer; it outlives this process (not a power failure, which costs the last seconds)."""
        self._answers[request] = answer
        if self._file is None:
            self._file = self._open()
        self._file.write(_line({"request": request, "answer": answer}))

    def remove(self) -> None:
        """Remove the files: the task's result holds the scores now."""
        self.close()
        for path in self.files():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> IO[bytes]:
        """For appending, unbuffered; after a torn last line, on a line of its own."""
        self._folder.mkdir(parents=True, exist_ok=True)
        header = _line({"format": FORMAT, "key": self._digest})
        content = self._path.read_bytes() if self._path.is_file() else b""
        file = self._path.open("ab" if content.startswith(header) else "wb", buffering=0)
        if not content.startswith(header):
            file.write(header)
        elif not content.endswith(b"\n"):
            file.write(b"\n")
        return file

    def _read(self, path: Path) -> None:
        header, *lines = path.read_bytes().split(b"\n")
        head = _parse(header)
        if head is None or head.get("key") != self._digest:
            self.n_damaged += 1 + sum(bool(line) for line in lines)
            return
        for line in lines:
            content = _parse(line)
            if content is not None:
                self._answers[content["request"]] = content["answer"]
            elif line:
                self.n_damaged += 1


def request_hash(kind: str, *parts: bytes | str | int | tuple[Any, ...] | Mapping[str, Any] | None) -> str:
    """Identity of a request: its kind and all that its answer depends on beside the key, hex."""
    digest = xxhash.xxh3_128(kind.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is not what was written."""
    checksum, _, text = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    found: dict[str, Any] = json.loads(text)
    return found
