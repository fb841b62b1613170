"""A report's view as JSON: every number as it is, not as it is written for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

_TOLD = ("verdict", "is_shown", "flops", "label", "is_mostly_cut")
"""Properties of rows that a reader of the file wants as well."""


def to_json(view: Mapping[str, Any]) -> bytes:
    """The file's content. What is not finite is null; a property of a row that says a verdict is there too."""
    return json.dumps(_plain(view), indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        told = [name for name in _TOLD if name not in names and hasattr(value, name)]
        return {name: _plain(getattr(value, name)) for name in [*names, *told]}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Set):
        return sorted(_plain(item) for item in value)
    return str(value) if isinstance(value, Path) else value
