"""What a task's result depends on beside its input: the code that its work function can reach, and the libraries.

Both follow from the `import` statements, at the top of a module or inside a function, so that none is forgotten.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

_ROOT = Path(__file__).parent.parent
_OURS = ("data_pipeline", "megagpt")
# They decide no result: what a job's settings and errors are called, and how tasks are recorded.
_LEFT_OUT = {"data_pipeline.config", "data_pipeline.tasks", "megagpt.atomic", "megagpt.errors"}


def code_fingerprint(work: Callable[..., Any], packages: Sequence[str] = ()) -> str:
    """A hash over the source of all modules of ours that `work` can reach, and over the versions of all libraries.

    An edited comment changes it too: to do a stage again needlessly is cheap, to mix two versions' outputs is not.

    Args:
        work: a task's function.
        packages: further distributions, whose files are read without an import.
    """
    return _fingerprint(work.__module__, tuple(packages))


def reachable_modules(module: str) -> dict[str, Path]:
    """Name -> source file of the modules of ours that a module imports, and that these import, itself included."""
    return {name: path for name, (path, _) in _closure(module).items()}


def libraries_of(module: str) -> list[str]:
    """Names and versions of the distributions that the reachable modules import, and the version of Python."""
    imported = {name.partition(".")[0] for _, names in _closure(module).values() for name in names}
    foreign = imported - set(_OURS) - sys.stdlib_module_names
    found = {distribution for name in foreign for distribution in _distributions().get(name, ())}
    return [f"python {sys.version_info.major}.{sys.version_info.minor}", *_versions(sorted(found))]


@functools.cache
def _fingerprint(module: str, packages: tuple[str, ...]) -> str:
    digest = xxhash.xxh3_128()
    for name, path in sorted(reachable_modules(module).items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    digest.update("\0".join([*libraries_of(module), *_versions(packages)]).encode())
    return digest.hexdigest()


@functools.cache
def _closure(module: str) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> source file, and everything that it imports."""
    found: dict[str, tuple[Path, tuple[str, ...]]] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is not None and name not in found and name not in _LEFT_OUT:
            found[name] = path, _imports(path)
            waiting += found[name][1]
    return found


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(sorted(set(_imported_names(ast.parse(path.read_bytes())))))


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module of a package, perhaps


def _source(module: str) -> Path | None:
    """The file of a module of ours; None for anything else."""
    if module.partition(".")[0] not in _OURS:
        return None
    place = _ROOT / module.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _versions(distributions: Sequence[str]) -> list[str]:
    return [f"{name} {metadata.version(name)}" for name in distributions]
