"""Whether benchmark data was made from the copies whose hashes are known, so that a result can say where it was not."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from evals.prepared import PREPARED
from megagpt.errors import EvalError

KNOWN, DIFFERS, NOT_KNOWN = "known", "differs", ""


def checksum_of(folder: Path, hub_id: str, configs: Set[str]) -> str:
    """`known`, `differs`, or empty where nothing says so: data from elsewhere than `megagpt eval prepare`.

    Args:
        folder: of the data set, as `evals.data.locate` gives it; the record lies two folders above.
        hub_id: of the data set.
        configs: of it, those that are used.

    Raises:
        EvalError: the record cannot be read.
    """
    path = folder.parent.parent / PREPARED
    if not path.is_file():
        return NOT_KNOWN
    used = {f"{hub_id}/{config}" for config in configs}
    try:
        benchmarks: list[dict[str, Any]] = list(json.loads(path.read_text(encoding="utf-8"))["benchmarks"].values())
        found = {
            str(one["checksum"])
            for one in benchmarks
            if used & {str(Path(file).parent) for file in one["written_sha256"]}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{path}: not what `prepare` writes ({error!r}); prepare the folder again") from None
    return together(found)


def together(found: Set[str]) -> str:
    """Of several data sets: one that differs is enough, and all must be known."""
    return DIFFERS if DIFFERS in found else KNOWN if found == {KNOWN} else NOT_KNOWN
