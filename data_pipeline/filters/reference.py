"""The manual of all filters: `megagpt config docs --job data` ends with it."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import MISSING, Field, fields

from data_pipeline.filters.checking import expected, hints_of
from data_pipeline.filters.registry import FILTERS
from data_pipeline.filters.rules import Settings


def filter_reference() -> str:
    """Every filter with its settings as Markdown: name, type, default, meaning."""
    lines = [
        "## filters.NAME",
        "",
        "A document goes if one of its measures is below `min_...` or above `max_...`; null switches a rule off. "
        "`NAME:LABEL` uses a filter a second time. `megagpt data thresholds` tries other thresholds on a finished job.",
        "",
    ]
    for name, (kind, _) in sorted(FILTERS.items()):
        lines += [f"### filters.{name}", "", _one_line(inspect.getdoc(kind) or ""), "", *_entries(name, kind), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entries(name: str, kind: type[Settings]) -> list[str]:
    hints, meanings = hints_of(kind), _meanings(kind)
    entries = []
    for field in fields(kind):
        entry = f"- `filters.{name}.{field.name}`: {expected(hints[field.name])}; {_default(field)}."
        meaning = meanings.get(field.name)
        entries.append(f"{entry}\n  {meaning}" if meaning else entry)
    return entries


def _default(field: Field[object]) -> str:
    if field.default is MISSING:
        return "required"
    value = field.default
    if value is None:
        return "default null"
    if value in ("", ()):
        return "default empty"
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    return "default " + (", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _meanings(kind: type[Settings]) -> dict[str, str]:
    """Field -> the string that stands below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    found: dict[str, str] = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, below in itertools.pairwise(statements):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = _one_line(str(ast.literal_eval(below.value)))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
