"""All filters by name, and the chain that a job's `filters` section asks for.

A new filter is one file, with a frozen dataclass of thresholds and a function that names the failing rules, and one
line in FILTERS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from data_pipeline.document import Document
from data_pipeline.filters.c4 import C4, c4, clean_c4
from data_pipeline.filters.fineweb import FineWeb, fineweb
from data_pipeline.filters.gopher_quality import GopherQuality, gopher_quality
from data_pipeline.filters.gopher_repetition import GopherRepetition, gopher_repetition
from data_pipeline.filters.text_view import TextView
from megagpt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says of a text: the rules it fails, and the text as the filter leaves it."""

    failed: tuple[str, ...]
    text: str


_EXPECTED = {bool: "bool", int: "int, at least 0", float: "float, at least 0", tuple: "list of words"}
Apply = Callable[[TextView], Verdict]
LimitsT = TypeVar("LimitsT")


def _bind_rules(rules: Callable[[TextView, LimitsT], Iterable[str]]) -> Callable[[LimitsT], Apply]:
    """A filter that leaves the text as it is."""
    return lambda limits: lambda view: Verdict(tuple(rules(view, limits)), view.text)


def _bind_c4(limits: C4) -> Apply:
    def apply(view: TextView) -> Verdict:
        cleaned = clean_c4(view, limits)
        return Verdict(tuple(c4(view, cleaned, limits)), cleaned)

    return apply


FILTERS: dict[str, tuple[type[Any], Callable[[Any], Apply]]] = {
    "c4": (C4, _bind_c4),
    "fineweb": (FineWeb, _bind_rules(fineweb)),
    "gopher_quality": (GopherQuality, _bind_rules(gopher_quality)),
    "gopher_repetition": (GopherRepetition, _bind_rules(gopher_repetition)),
}


@dataclass(frozen=True, slots=True)
class FilterChain:
    """The filters of a job, in its order."""

    filters: tuple[tuple[str, Apply], ...]
    thresholds: dict[str, dict[str, Any]]
    """Every threshold in use by filter, defaults included, for the report."""

    def apply(self, document: Document) -> None:
        """Put every rule that fails into `document.failed`; filters that clean leave their text in it."""
        view = TextView(document.text)
        for name, apply in self.filters:
            verdict = apply(view)
            document.failed += [f"{name}.{rule}" for rule in verdict.failed]
            if verdict.text != view.text:
                view = TextView(verdict.text)
        document.text = view.text


def build_filters(section: Mapping[str, Mapping[str, Any]]) -> FilterChain:
    """The chain for a job's `filters` section.

    Raises:
        ConfigError: an unknown filter or threshold, or a value of the wrong type; all problems at once.
    """
    problems: list[str] = []
    filters: list[tuple[str, Apply]] = []
    thresholds: dict[str, dict[str, Any]] = {}
    for name, values in section.items():
        if name not in FILTERS:
            problems.append(f"filters: unknown filter {name!r}{_nearest(name, FILTERS)}")
            continue
        limits_type, bind = FILTERS[name]
        found = _check_thresholds(name, limits_type, values)
        problems += found
        if not found:
            limits = limits_type(**{key: _as_declared(value) for key, value in values.items()})
            filters.append((name, bind(limits)))
            thresholds[name] = asdict(limits)
    if problems:
        raise ConfigError("\n".join(problems))
    return FilterChain(tuple(filters), thresholds)


def _check_thresholds(name: str, limits_type: type[Any], values: Mapping[str, Any]) -> list[str]:
    defaults = {field.name: field.default for field in fields(limits_type)}
    problems = []
    for key, value in values.items():
        if key not in defaults:
            problems.append(f"filters.{name}: unknown threshold {key!r}{_nearest(key, defaults)}")
        elif not _fits(value, defaults[key]):
            expected = _EXPECTED[type(defaults[key])]
            problems.append(f"filters.{name}.{key} must be {expected}, got {value!r}")
    return problems


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(value, int | float) and value < 0:
        return False
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, int)


def _as_declared(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(names)}"
