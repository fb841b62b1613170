"""YAML files and `key=value` arguments -> one strict, frozen configuration; and back to YAML.

Files add up: a key that stands in two files is an error. Only the command line overrides. Every complaint
names the file, the key, the value and, for a misspelt key, the nearest right one.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megagpt.errors import ConfigError

COMMAND_LINE = "command line"
KeyPath = tuple[str, ...]


class Section(BaseModel):
    """Base of every configuration section: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


def load_config(schema: type[SectionT], files: Sequence[Path], overrides: Sequence[str] = ()) -> SectionT:
    """Read the files, apply the overrides, check everything against `schema`.

    Args:
        schema: the root section.
        files: YAML 1.2 files; together they say each key at most once.
        overrides: `section.key=value`, the value in YAML (`6e-4`, `[a, b]`, `true`).

    Raises:
        ConfigError: all problems at once, one a line.
    """
    values: dict[str, Any] = {}
    origin: dict[KeyPath, str] = {}
    for file in files:
        _merge_file(values, origin, file)
    for override in overrides:
        _apply_override(values, origin, override)
    return _validate(schema, values, origin)


def load_arguments(schema: type[SectionT], words: Sequence[str]) -> SectionT:
    """`load_config` over the words of a command line: YAML files and overrides in any order."""
    return load_config(schema, *split_arguments(words))


def split_arguments(words: Sequence[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(files, overrides): a word with `=` is an override, unless it ends like a YAML file."""
    overrides = tuple(word for word in words if "=" in word and not word.endswith((".yaml", ".yml")))
    return tuple(Path(word) for word in words if word not in overrides), overrides


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(json.loads(config.model_dump_json()), stream)
    return stream.getvalue()


def parse_value(text: str) -> Any:
    """One YAML 1.2 value from the command line."""
    return YAML(typ="safe", pure=True).load(text)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text: {error}") from None
    except YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold `section: {{key: value}}` mappings, found {type(content).__name__}")
    return content


def _leaves(values: Mapping[str, Any], at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is not itself a mapping, with its path; an empty mapping counts as a leaf."""
    for key, value in values.items():
        path = (*at, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _merge_file(values: dict[str, Any], origin: dict[KeyPath, str], file: Path) -> None:
    for path, value in _leaves(_read_yaml(file)):
        if path in origin:
            raise ConfigError(
                f"{file}: {'.'.join(path)} = {value!r} is already set in {origin[path]}; "
                "files add up, so say it in one of them (the command line may override it)"
            )
        _set(values, path, value, str(file))
        origin[path] = str(file)


def _apply_override(values: dict[str, Any], origin: dict[KeyPath, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is neither a .yaml file nor an override like `optim.lr=3e-4`")
    try:
        value = parse_value(text)
    except YAMLError as error:
        raise ConfigError(
            f"{COMMAND_LINE}: {key}: {text!r} is not a YAML value: {' '.join(str(error).split())}"
        ) from None
    path = tuple(key.split("."))
    _set(values, path, value, COMMAND_LINE)
    for known in [known for known in origin if known[: len(path)] == path]:
        del origin[known]
    origin[path] = COMMAND_LINE


def _set(values: dict[str, Any], path: KeyPath, value: Any, where: str) -> None:
    at = values
    for depth, key in enumerate(path[:-1]):
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{where}: {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a section")
    at[path[-1]] = value


def _validate(schema: type[SectionT], values: dict[str, Any], origin: dict[KeyPath, str]) -> SectionT:
    try:
        # JSON mode keeps strictness where it matters ("12" is no int) and lets a list be a tuple.
        return schema.model_validate_json(json.dumps(values, allow_nan=False, default=str))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"configuration: {error}") from None
        lines = [_complaint(schema, dict(problem), values, origin) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _complaint(
    schema: type[BaseModel],
    problem: dict[str, Any],
    values: dict[str, Any],
    origin: dict[KeyPath, str],
) -> str:
    """One pydantic problem in the words of the house: `file: key: what is wrong; what would be right`."""
    path = _path_in_values(problem["loc"], values)
    where = _origin_of(path, origin)
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_did_you_mean(schema, problem['loc'])}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}: {message}, got {problem['input']!r}"


def _path_in_values(loc: Sequence[int | str], values: Any) -> tuple[int | str, ...]:
    """Drop from pydantic's location the parts that only name a union's branch."""
    path: list[int | str] = []
    at = values
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(at, dict) and (part in at or last):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _origin_of(path: Sequence[int | str], origin: dict[KeyPath, str]) -> str:
    keys = tuple(str(part) for part in path)
    for length in range(len(keys), 0, -1):
        found = {where for known, where in origin.items() if known[:length] == keys[:length]}
        if found:
            return ", ".join(sorted(found))
    return ", ".join(sorted(set(origin.values()))) or "configuration"


def _did_you_mean(schema: type[BaseModel], loc: Sequence[int | str]) -> str:
    """The nearest known key beside the unknown one, or the list of all that exist there."""
    known = sorted(_fields_at(schema, loc[:-1]))
    nearest = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; known keys here: {', '.join(known)}" if known else ""


def _fields_at(schema: type[BaseModel], loc: Sequence[int | str]) -> set[str]:
    candidates: list[Any] = [schema]
    for part in loc:
        following: list[Any] = []
        for candidate in candidates:
            if isinstance(part, str) and part in candidate.model_fields:
                following += _section_types(candidate.model_fields[part].annotation)
        candidates = following or candidates
    return {name for candidate in candidates for name in candidate.model_fields}


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """Every section class inside an annotation such as `tuple[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _section_types(inner)]
