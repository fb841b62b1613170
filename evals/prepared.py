"""prepared.json: what a folder of benchmark data was made from, and the hash of every file that was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from megagpt.atomic import write_file
from megagpt.errors import EvalError

PREPARED = "prepared.json"
FORMAT = 1

Status = Literal["ok", "missing", "refused"]


@dataclass(frozen=True)
class PreparedBenchmark:
    """What became of one benchmark."""

    name: str
    hub_id: str
    status: Status
    reason: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    """Split -> rows over all configs."""
    source_sha256: dict[str, str] = field(default_factory=dict)
    checksum: Literal["known", "differs", ""] = ""
    """Whether the source files are the copies whose hashes are known."""
    written_sha256: dict[str, str] = field(default_factory=dict)
    """File below the prepared folder -> hash."""
    absent_splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What the file says."""

    benchmarks: dict[str, PreparedBenchmark] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    """Data sets whose official numbers and hashes are not known: hub id -> file below the folder -> its hash when it
    was written, so that later damage is seen."""

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record as it was written; nothing where the folder has none.

        Raises:
            EvalError: it cannot be read.
        """
        path = folder / PREPARED
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            benchmarks = {name: PreparedBenchmark(**entry) for name, entry in content["benchmarks"].items()}
            others = {hub_id: dict(files) for hub_id, files in content.get("others", {}).items()}
            return cls(benchmarks, others)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(
                f"{path}: not what `prepare` writes ({error}); delete it and prepare the folder again"
            ) from None

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        content = {
            "format": FORMAT,
            "benchmarks": {name: asdict(found) for name, found in self.benchmarks.items()},
            "others": self.others,
        }
        write_file(folder / PREPARED, json.dumps(content, indent=1).encode())

    def files(self, hub_id: str) -> dict[str, str]:
        """Of one data set: file below the folder -> hash."""
        known = [found.written_sha256 for found in self.benchmarks.values() if found.hub_id == hub_id]
        return {path: digest for files in (*known, self.others.get(hub_id, {})) for path, digest in files.items()}

    def splits(self, hub_id: str) -> dict[str, list[str]]:
        """Of one data set: config -> splits that were written."""
        found: dict[str, list[str]] = {}
        for path in map(Path, self.files(hub_id)):
            found.setdefault(path.parent.name, []).append(path.stem)
        return found

    def checked(self, folder: Path) -> dict[str, PreparedBenchmark]:
        """The benchmarks, each written file compared with its hash; one with damage is refused."""
        return {name: _checked(folder, found) for name, found in self.benchmarks.items()}


def damaged(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Those that are missing or not what was written."""
    return [
        file for file, digest in files.items() if not (folder / file).is_file() or sha256_of([folder / file]) != digest
    ]


def tell_damage(folder: Path, files: list[str]) -> str:
    """In words."""
    return f"{folder}: {', '.join(files)} is missing or not what was written; prepare the folder again"


def sha256_of(paths: list[Path]) -> str:
    """Of their contents, one after the other; hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _checked(folder: Path, found: PreparedBenchmark) -> PreparedBenchmark:
    bad = damaged(folder, found.written_sha256)
    return replace(found, status="refused", reason=tell_damage(folder, bad)) if bad else found
