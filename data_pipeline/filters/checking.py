"""Checking the values of a filter's settings as a configuration file gives them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.filters.rules import Settings, threshold_fields
from megagpt.errors import ConfigError

_EXPECTED = {
    bool: "bool",
    int: "int, at least 0",
    float: "float, at least 0",
    str: "text",
    Path: "path",
    tuple[str, ...]: "list of words",
    tuple[Path, ...]: "list of paths",
}


def read_settings(name: str, kind: type[Settings], values: Mapping[str, Any]) -> tuple[Settings | None, list[str]]:
    """(settings, problems): the settings of filter `name`, or None and everything that is wrong with the values."""
    hints = hints_of(kind)
    problems = []
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            problems.append(f"filters.{name}: unknown threshold {key!r}{nearest(key, hints)}")
            continue
        try:
            checked[key] = _check(value, hints[key])
        except ValueError:
            problems.append(f"filters.{name}.{key} must be {expected(hints[key])}, got {value!r}")
    problems += [
        f"filters.{name}.{field.name} is missing; it must be {expected(hints[field.name])}"
        for field in fields(kind)
        if not problems and field.name not in checked and not _has_default(field)
    ]
    if problems:
        return None, problems
    try:
        settings = kind(**checked)
    except ConfigError as error:
        return None, [f"filters.{name}: {error}"]
    crossed = _crossed_bounds(name, settings)
    return (None if crossed else settings), crossed


def check_threshold(rule: str, kind: type[Settings], field: str, value: Any) -> None:
    """Refuse a value that the settings would refuse.

    Raises:
        ConfigError: names the rule and what would be right.
    """
    hint = hints_of(kind)[field]
    try:
        _check(value, hint)
    except ValueError:
        raise ConfigError(f"{rule} must be {expected(hint)}, got {value!r}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(names)}"


def paths_in(settings: Settings) -> list[Path]:
    """Every file that the settings name, in order of declaration."""
    values = [getattr(settings, field.name) for field in fields(settings)]
    flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in flat if isinstance(part, Path)]


def plain_values(settings: Settings) -> dict[str, Any]:
    """Every setting by name, defaults included, paths as text."""
    return {field.name: _plain(getattr(settings, field.name)) for field in fields(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def _crossed_bounds(name: str, settings: Settings) -> list[str]:
    limits = {field: getattr(settings, field) for field in threshold_fields(type(settings))}
    return [
        f"filters.{name}.{field} is {low}, above {upper} = {limits[upper]}; no document could pass"
        for field, low in limits.items()
        if field.startswith("min_")
        and low is not None
        and limits.get(upper := f"max_{field[4:]}") is not None
        and low > limits[upper]
    ]


def hints_of(kind: type[Settings]) -> dict[str, Any]:
    """Setting -> its declared type."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _check(value: Any, hint: Any) -> Any:
    """The value as declared, by the rules of JSON, where a list may stand for a tuple."""
    try:
        checked = _adapter(hint).validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise ValueError(str(error)) from None
    if isinstance(checked, int | float) and checked < 0:
        raise ValueError(f"{checked} is below 0")
    return checked


def expected(hint: Any) -> str:
    """The type of a setting in plain words."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    texts = ["null" if option is NoneType else _expected_one(option) for option in options]
    return ", or ".join(texts)


def _expected_one(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
        return "list of some of " + ", ".join(map(str, get_args(get_args(hint)[0])))
    return _EXPECTED.get(hint, str(hint))


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
