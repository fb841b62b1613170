"""YAML files and `key=value` arguments -> one strict, frozen configuration; and back to YAML.

Files add up: a key that stands in two files is an error. Only the command line overrides. A file may say
`include: [other.yaml]`, paths relative to itself: the same as naming these files too. Every complaint names the file,
the key, the value and, for a misspelt key, the nearest right one.
"""

from __future__ import annotations

import datetime
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megagpt.errors import ConfigError, unread

COMMAND_LINE = "command line"
INCLUDE = "include"
MOST_VALUES, DEEPEST = 200_000, 64
"""Of one file. Aliases can make a few lines stand for 10^12 values, and a mapping may hold itself."""
FOLDER = "${folder}"
"""What a path in a file begins with, where it is relative to the folder of that file and not to the working folder."""
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
    for file, content in _with_included(files):
        _merge_file(values, origin, file, content)
    for override in overrides:
        _apply_override(values, origin, override)
    return _validate(schema, values, origin)


def load_arguments(schema: type[SectionT], words: Sequence[str]) -> SectionT:
    """`load_config` over the words of a command line: YAML files and overrides in any order."""
    return load_config(schema, *split_arguments(words))


def change_config(config: SectionT, words: Sequence[str]) -> SectionT:
    """A configuration with what the words of a command line, YAML files and overrides, say in its place.

    Raises:
        ConfigError: as `load_config`.
    """
    files, overrides = split_arguments(words)
    said: dict[str, Any] = {}
    origin: dict[KeyPath, str] = {}
    for file, content in _with_included(files):
        _merge_file(said, origin, file, content)
    for override in overrides:
        _apply_override(said, origin, override)
    values = json.loads(config.model_dump_json())
    for path, value in _leaves(said):
        _set(values, path, value, _origin_of(path, origin))
    return _validate(type(config), values, origin)


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


def read_yaml(file: Path) -> dict[str, Any]:
    """The mappings of one YAML 1.2 file.

    Raises:
        ConfigError: it is missing, no YAML, or holds no mappings.
    """
    try:
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        _check_extent(content)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except OSError as error:
        raise unread(error, ConfigError, f"{file}: cannot be read as text: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read as text: {error}") from None
    except YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: no configuration: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold `section: {{key: value}}` mappings, found {type(content).__name__}")
    return content


def _check_extent(content: Any) -> None:
    """Count what aliases stand for, before anything walks through it.

    Raises:
        ValueError: more values, or deeper, than any configuration.
    """
    ahead, seen = [(content, 0)], 0
    while ahead:
        value, depth = ahead.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"more than {MOST_VALUES} values, or more than {DEEPEST} levels, its aliases followed")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ahead += [(part, depth + 1) for part in parts]


def _leaves(values: Mapping[str, Any], at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is not itself a mapping, with its path; an empty mapping counts as a leaf."""
    for key, value in values.items():
        path = (*at, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _with_included(files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file with its content, and those that it includes; a file that is reached twice is read once."""
    waiting, seen = list(reversed(files)), set()
    while waiting:
        file = waiting.pop()
        if file.resolve() in seen:
            continue
        seen.add(file.resolve())
        content = read_yaml(file)
        included = content.pop(INCLUDE, [])
        if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
            raise ConfigError(f"{file}: {INCLUDE} = {included!r} must be a list of YAML files, relative to this one")
        waiting += [file.parent / name for name in reversed(included)]
        yield file, _in_folder(content, file.parent)


def _in_folder(value: Any, folder: Path) -> Any:
    """`value` with FOLDER at the beginning of its texts replaced: paths that move with the file that says them."""
    if isinstance(value, dict):
        return {key: _in_folder(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [_in_folder(part, folder) for part in value]
    if isinstance(value, str) and value.startswith(f"{FOLDER}/"):
        return str(folder / value.removeprefix(f"{FOLDER}/"))
    return value


def _merge_file(values: dict[str, Any], origin: dict[KeyPath, str], file: Path, content: Mapping[str, Any]) -> None:
    for path, value in _leaves(content):
        if value == {}:  # adds nothing to what another file says there, and takes no key
            if _get(values, path) is None:
                _set(values, path, {}, str(file))
            continue
        taken = next((known for known in origin if _one_holds_the_other(known, path)), None)
        if taken is not None:
            raise ConfigError(
                f"{file}: {'.'.join(path)} = {value!r} is already set in {origin[taken]}"
                f"{'' if taken == path else ' as ' + '.'.join(taken)}; "
                "files add up, so say it in one of them (the command line may override it)"
            )
        _set(values, path, value, str(file))
        origin[path] = str(file)


def _one_holds_the_other(known: KeyPath, path: KeyPath) -> bool:
    shorter = min(len(known), len(path))
    return known[:shorter] == path[:shorter]


def _get(values: Mapping[str, Any] | Section, path: KeyPath) -> Any:
    """What stands at `path` in nested mappings or sections, None where nothing does."""
    at: Any = values
    for key in path:
        at = at.get(key) if isinstance(at, dict) else getattr(at, key, None)
    return at


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
    for path, value in _leaves(values):
        try:
            _to_json(value)
        except (TypeError, ValueError):
            key, where = ".".join(path), _origin_of(path, origin)
            raise ConfigError(f"{where}: {key}: must be finite numbers and plain text, got {value!r}") from None
    try:
        # JSON mode keeps strictness where it matters ("12" is no int) and lets a list be a tuple.
        config = schema.model_validate_json(_to_json(values))
    except ValidationError as error:
        problems = [(_path_in_values(problem, values), problem) for problem in map(dict, error.errors())]
        # A list where text or a list may stand is also reported as "no text": the deeper problem is the real one.
        shallow = {path[:length] for path, _ in problems for length in range(len(path))}
        lines = [_complaint(schema, path, problem, origin) for path, problem in problems if path not in shallow]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    for path, value in _leaves(values):
        # Strict mode still takes `true` and `1.0` for the 1 of a Literal[0, 1].
        if isinstance(value, (bool, float)) and type(_get(config, path)) is int:
            raise ConfigError(f"{_origin_of(path, origin)}: {'.'.join(path)}: must be a whole number, got {value!r}")
    return config


def _to_json(value: Any) -> str:
    """Raises TypeError or ValueError for what YAML knows and a configuration does not: .nan, sets, bytes."""
    return json.dumps(value, allow_nan=False, default=_date_as_text)


def _date_as_text(value: Any) -> str:
    """A path such as 2024-01-01 is a date to YAML."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not plain")


def _complaint(
    schema: type[Section],
    path: tuple[int | str, ...],
    problem: dict[str, Any],
    origin: dict[KeyPath, str],
) -> str:
    """One pydantic problem in the words of the house: `file: key: what is wrong; what would be right`."""
    where = _origin_of(path, origin)
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_did_you_mean(schema, problem['loc'])}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing and has no default"
    if problem["type"].startswith("union_tag"):  # the field that chooses a branch: missing, or of another family
        tag, expected = problem["ctx"]["discriminator"].strip("'"), problem["ctx"].get("expected_tags")
        choices = expected or ", ".join(repr(name) for name in _branches_at(schema, problem["loc"], tag))
        found = "is missing" if expected is None else f"is {problem['ctx']['tag']!r}"
        where = _origin_of((*path, tag), origin)
        return f"{where}: {key}.{tag} {found}; must be one of {choices}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    for json_word, yaml_word in _YAML_WORDS.items():
        message = message.replace(json_word, yaml_word)
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}: {message}, got {problem['input']!r}"


_YAML_WORDS = {
    "a valid string": "text",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
    "tuple should": "list should",
    " after validation, not 0": "",
}


def _path_in_values(problem: Mapping[str, Any], values: Any) -> tuple[int | str, ...]:
    """Drop from pydantic's location the parts that only name a union's branch."""
    path: list[int | str] = []
    at = values
    for position, part in enumerate(problem["loc"]):
        # A missing key is not among the values; every other last part that is not there names a branch.
        absent = position == len(problem["loc"]) - 1 and problem["type"] == "missing"
        if isinstance(at, dict) and (part in at or absent):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and (part < len(at) or absent):
            at = at[part] if part < len(at) else None
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


def _did_you_mean(schema: type[Section], loc: Sequence[int | str]) -> str:
    """The nearest known key beside the unknown one, or the list of all that exist there."""
    known = sorted(_fields_at(schema, loc[:-1]))
    nearest = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; known keys here: {', '.join(known)}" if known else ""


def _branches_at(schema: type[Section], loc: Sequence[int | str], tag: str) -> list[str]:
    """Values of the discriminator `tag` over the branches of the union at `loc`."""
    branches = _sections_at(schema, loc)
    return [str(choice) for branch in branches for choice in get_args(branch.model_fields[tag].annotation)]


def _fields_at(schema: type[Section], loc: Sequence[int | str]) -> set[str]:
    return {name for section in _sections_at(schema, loc) for name in section.model_fields}


def _sections_at(schema: type[Section], loc: Sequence[int | str]) -> list[type[Section]]:
    """The section classes that may stand at pydantic's location `loc`."""
    candidates: list[type[Section]] = [schema]
    for part in loc:
        following: list[type[Section]] = []
        for candidate in candidates:
            if isinstance(part, str) and part in candidate.model_fields:
                following += section_types(candidate.model_fields[part].annotation)
        # A part that is no field is a list's index or names a branch by its discriminator's value.
        candidates = following or [c for c in candidates if _has_choice(c, part)] or candidates
    return candidates


def _has_choice(section: type[Section], value: int | str) -> bool:
    return any(get_args(field.annotation) == (value,) for field in section.model_fields.values())


def section_types(annotation: Any) -> list[type[Section]]:
    """Every section class inside an annotation such as `tuple[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in section_types(inner)]
