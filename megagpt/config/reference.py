"""Schema -> the manual of its keys, for people (`megagpt config docs`) and for editors (`megagpt config schema`)."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megagpt.config.load import Section, section_types

_PLAIN_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    NoneType: "null",
    Any: "any value",
}


def reference(schema: type[Section]) -> str:
    """Every key below the root section `schema`, as Markdown that also reads well on a terminal.

    One entry a key: full name, type and bounds in plain words, default or "required", what it means.
    """
    lines = [f"# Configuration: {schema.__name__}", "", _doc(schema), ""]
    lines += _keys(schema, prefix="")
    return "\n".join(lines).rstrip() + "\n"


def json_schema(schema: type[Section]) -> str:
    """JSON Schema of the configuration files, for completion and checks in editors.

    Files add up, so none of them need hold every required key: the schema asks only for those that choose between
    the kinds of a section. The loader asks for the rest.
    """
    content = schema.model_json_schema(mode="validation")
    for definition in (content, *content.get("$defs", {}).values()):
        required = [name for name in definition.get("required", []) if "const" in definition["properties"][name]]
        definition.pop("required", None)
        if required:
            definition["required"] = required
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **content}, indent=2) + "\n"


def _keys(section: type[Section], prefix: str) -> list[str]:
    """Plain keys of a section first, then each nested section under its own heading."""
    plain, nested = [], []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        kinds = section_types(field.annotation)
        if kinds and _is_section(field.annotation):
            nested += _section(key, kinds, field)
        else:
            plain.append(_entry(key, field))
            for kind in kinds:
                nested += _heading(f"{key}[]", kind, depth=key.count(".") + 2, choice="")
                nested += _keys(kind, prefix=f"{key}[].")
    return [*plain, "", *nested] if plain else nested


def _is_section(annotation: Any) -> bool:
    """A section, or a union of nothing but sections: its keys follow the dot directly."""
    members = [annotation] if isinstance(annotation, type) else get_args(annotation)
    return all(isinstance(member, type) and issubclass(member, Section) for member in members)


def _section(key: str, kinds: list[type[Section]], field: FieldInfo) -> list[str]:
    lines = []
    for kind in kinds:
        choice = ""
        if len(kinds) > 1:
            tag = str(field.discriminator)
            choice = f" with {tag}: {get_args(kind.model_fields[tag].annotation)[0]}"
        lines += _heading(key, kind, depth=key.count(".") + 2, choice=choice)
        lines += _keys(kind, prefix=f"{key}.")
    return lines


def _heading(key: str, kind: type[Section], depth: int, choice: str) -> list[str]:
    return [f"{'#' * depth} {key}{choice}", "", _doc(kind), ""]


def _entry(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {_value(field.get_default(call_default_factory=True))}"
    kind = _plain(field.annotation, tuple(field.metadata))
    return f"- `{key}`: {kind}; {default}.\n  {_one_line(field.description or '')}"


def _plain(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in plain words, with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(inner[0], inner[1:])
    if annotation in _PLAIN_NAMES:
        words = _PLAIN_NAMES[annotation]
    elif origin is Literal:
        words = "one of " + ", ".join(str(choice) for choice in inner) if len(inner) > 1 else str(inner[0])
    elif origin is tuple and inner[-1] is ...:
        words = f"list of {_plural(inner[0])}"
    elif origin is tuple:
        words = f"list [{', '.join(_plain(member) for member in inner)}]"
    elif origin is dict:
        words = f"mapping of names to {_plural(inner[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        words = "{" + ", ".join(annotation.model_fields) + "}"
    else:
        words = " or ".join(_plain(member) for member in inner)
    return " ".join([words, *_bounds(metadata)])


def _plural(annotation: Any) -> str:
    words = _plain(annotation)
    return f"{words}s" if words in ("text", "path", "number", "any value") else words


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    found: list[str] = []
    item: Any
    for item in metadata:
        if isinstance(item, FieldInfo):
            found += _bounds(tuple(item.metadata))
        elif isinstance(item, annotated_types.Gt):
            found.append(f"above {item.gt}")
        elif isinstance(item, annotated_types.Ge):
            found.append(f"from {item.ge:g}" if isinstance(item.ge, float) else f"at least {item.ge}")
        elif isinstance(item, annotated_types.Lt):
            found.append(f"to below {item.lt:g}")
        elif isinstance(item, annotated_types.Le):
            found.append(f"to {item.le:g}")
        elif isinstance(item, annotated_types.MinLen):
            found.append(f"(at least {item.min_length})")
    return found


def _value(default: Any) -> str:
    if isinstance(default, str) and not default:
        return "empty"
    if isinstance(default, Path):
        return str(default)
    return json.dumps(default, default=str) if not isinstance(default, str) else default


def _doc(section: type[Section]) -> str:
    return _one_line(inspect.getdoc(section) or "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
