"""The documentation that every Python installation carries, as a small crawl: real English text without a network.

    pages-N.warc.gz    a page a module: the docstrings of the standard library and of installed packages, and the
                       topics of the language reference that `help()` shows; in several files, one a task
    texts.jsonl.zst    the packages' descriptions, README and other .md and .rst files, in The Pile's format
    stamp.json         what they were built from; while it holds, they are used again

The bytes are a function of the installation: fixed dates, sorted order, nothing imported.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import orjson
import xxhash
import zstandard

from data_pipeline.sources.docstring_pages import Entry, read_entries, render_page
from data_pipeline.sources.warc_writer import WarcWriter
from megagpt.atomic import flush_to_disk, publish, temporary_name, write_file
from megagpt.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the same installation would give other bytes."""

PAGE_FILES = 4
"""Files that the pages are dealt out to, so that as many workers can share them."""

MAX_PACKAGE_CHARACTERS = 2_500_000
"""Documentation taken from one package; of a larger one, modules are taken in the order of a hash of their names."""

PILE_SET_NAME = "PythonPackages"
_ADDRESS = "https://pydoc.invalid"  # a name that RFC 2606 reserves, so that no page claims a real address
_STANDARD_LIBRARY = "stdlib"
_OWN_PACKAGES = frozenset({"megagpt", "data_pipeline", "evals", "launch", "tests"})
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "_vendor"}
)
_SKIPPED_TEXTS = ("license", "licence", "copying", "notice", "authors", "changelog", "third")
_MAX_SOURCE_BYTES = 2_000_000
_MENU_ENTRIES = 20


@dataclass(frozen=True, slots=True)
class PythonDocs:
    """What was built, and how much of it."""

    pages: tuple[Path, ...]
    texts: Path
    n_pages: int
    n_texts: int
    n_unreadable: int
    """Source files that are not Python or not UTF-8."""
    capped: tuple[str, ...]
    """Packages of which only MAX_PACKAGE_CHARACTERS were taken."""


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    folders: tuple[Path, ...]
    distributions: tuple[str, ...]


@dataclass(slots=True)
class _Tally:
    n_pages: int = 0
    n_texts: int = 0
    n_unreadable: int = 0
    capped: tuple[str, ...] = ()


def build_python_docs(folder: Path, packages: tuple[str, ...]) -> PythonDocs:
    """Build the files in `folder`, or use those that an equal installation built there.

    Args:
        folder: where to write; made if absent.
        packages: top-level packages by the name they are imported under, beside the standard library; empty means every
            installed one.

    Raises:
        DataError: a package is not installed.
    """
    chosen = _choose_packages(packages)
    pages = tuple(folder / f"pages-{number}.warc.gz" for number in range(PAGE_FILES))
    texts, stamp = folder / "texts.jsonl.zst", folder / "stamp.json"
    built_from = _built_from(chosen)
    tally = _read_stamp(stamp, built_from, (*pages, texts))
    if tally is None:
        folder.mkdir(parents=True, exist_ok=True)
        tally = _Tally()
        _write_pages(pages, chosen, tally)
        _write_texts(texts, chosen, tally)
        content = {"built_from": built_from, "files": _digests((*pages, texts)), "counts": asdict(tally)}
        write_file(stamp, json.dumps(content, indent=1, sort_keys=True).encode())
        logger.info(
            "python_docs: %d pages, %d texts; %d source files unreadable; capped: %s",
            tally.n_pages,
            tally.n_texts,
            tally.n_unreadable,
            ", ".join(tally.capped) or "none",
        )
    return PythonDocs(pages, texts, tally.n_pages, tally.n_texts, tally.n_unreadable, tuple(tally.capped))


def _choose_packages(names: tuple[str, ...]) -> list[_Package]:
    installed = metadata.packages_distributions()
    unknown = [name for name in names if name not in installed]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], installed, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "; install it, or take it out of `packages`"
        raise DataError(f"python_docs: no installed package is imported as {unknown[0]!r}{hint}")
    standard = _Package(_STANDARD_LIBRARY, (Path(sysconfig.get_path("stdlib")),), ())
    chosen = sorted(set(names or installed) - _OWN_PACKAGES)
    found = (_find_package(name, tuple(sorted(set(installed[name])))) for name in chosen)
    return [standard, *(package for package in found if package.folders)]


def _find_package(name: str, distributions: tuple[str, ...]) -> _Package:
    """Where a package lies; a single module or a compiled one has no folder."""
    try:
        spec = util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    locations = spec.submodule_search_locations if spec else None
    return _Package(name, tuple(sorted(Path(place) for place in locations or ())), distributions)


def _built_from(chosen: list[_Package]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "packages": {
            package.name: [f"{name} {metadata.version(name)}" for name in package.distributions] for package in chosen
        },
    }


def _read_stamp(stamp: Path, built_from: dict[str, Any], files: tuple[Path, ...]) -> _Tally | None:
    """What the stamp says was built, or None where it is absent, about something else, or not true of the files."""
    try:
        content = json.loads(stamp.read_bytes())
        if content["built_from"] == built_from and content["files"] == _digests(files):
            return _Tally(**content["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _digests(files: tuple[Path, ...]) -> dict[str, str]:
    return {file.name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files}


def _write_pages(targets: tuple[Path, ...], chosen: list[_Package], tally: _Tally) -> None:
    temporaries = [temporary_name(target) for target in targets]
    with ExitStack() as stack:
        files = [stack.enter_context(temporary.open("wb")) for temporary in temporaries]
        warcs = [
            WarcWriter(file, target.name, "megagpt data_pipeline") for file, target in zip(files, targets, strict=True)
        ]
        for url, page in _pages(chosen, tally):
            # By a hash of the address: where a page goes depends on no other page.
            warcs[xxhash.xxh3_64_intdigest(url.encode()) % len(warcs)].add_page(url, page)
            tally.n_pages += 1
        for file in files:
            flush_to_disk(file)
    for temporary, target in zip(temporaries, targets, strict=True):
        publish(temporary, target)


def _pages(chosen: list[_Package], tally: _Tally) -> Iterator[tuple[str, str]]:
    """(address, HTML) of every page."""
    for package in chosen:
        modules = _modules(package)
        menu = [name for name, _ in modules[:_MENU_ENTRIES]]
        for name, entries in _documented_modules(modules, package, tally):
            yield f"{_ADDRESS}/{package.name}/{name}.html", render_page(name, entries, menu)
    for name, text in _reference_topics():
        yield f"{_ADDRESS}/reference/{name}.html", render_page(name, [Entry(name, 1, text)], [])


def _modules(package: _Package) -> list[tuple[str, Path]]:
    """The package's modules with their dotted names, in an order that samples it evenly."""
    prefix = "" if package.name == _STANDARD_LIBRARY else f"{package.name}."
    found = []
    for folder in package.folders:
        for file in _files(folder, (".py",)):
            parts = file.relative_to(folder).with_suffix("").parts
            dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(((prefix + dotted).strip("."), file))
    return sorted(found, key=lambda module: (hashlib.sha256(module[0].encode()).digest(), module[1]))


def _documented_modules(
    modules: Iterable[tuple[str, Path]], package: _Package, tally: _Tally
) -> Iterator[tuple[str, list[Entry]]]:
    characters = 0
    for name, file in modules:
        if characters >= MAX_PACKAGE_CHARACTERS:
            tally.capped = (*tally.capped, package.name)
            return
        source = _read_text(file)
        entries = None if source is None else _entries_of(source, name)
        if entries is None:
            tally.n_unreadable += 1
        elif entries:
            characters += sum(len(entry.doc) for entry in entries)
            yield name, entries


def _entries_of(source: str, name: str) -> list[Entry] | None:
    # Parsing takes nearly all the time, and most modules have too few docstrings to be worth it.
    quotes = source.count('"""') + source.count("'''")
    return read_entries(source, name) if quotes >= 4 else []


def _reference_topics() -> Iterator[tuple[str, str]]:
    """The texts that `help("NAME")` shows, from the literal dictionary in pydoc_data/topics.py."""
    source = _read_text(Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py")
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


def _write_texts(target: Path, chosen: list[_Package], tally: _Tally) -> None:
    temporary = temporary_name(target)
    with temporary.open("wb") as file:
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
            for url, text in _texts(chosen):
                row = {"text": text, "meta": {"pile_set_name": PILE_SET_NAME, "url": url}}
                stream.write(orjson.dumps(row) + b"\n")
                tally.n_texts += 1
        flush_to_disk(file)
    publish(temporary, target)


def _texts(chosen: list[_Package]) -> Iterator[tuple[str, str]]:
    described: set[str] = set()
    for package in chosen:
        for distribution in package.distributions:
            if distribution not in described:
                described.add(distribution)
                description = _description(distribution)
                if description.strip():
                    yield f"{_ADDRESS}/{distribution}/description", description
        for folder in package.folders:
            for file in _files(folder, (".md", ".rst")):
                text = None if file.name.lower().startswith(_SKIPPED_TEXTS) else _read_text(file)
                if text and text.strip():
                    yield f"{_ADDRESS}/{package.name}/{file.relative_to(folder).as_posix()}", text


def _description(distribution: str) -> str:
    """The text below the header of METADATA, which is what PyPI shows of a package."""
    content = metadata.distribution(distribution).read_text("METADATA") or ""
    _, _, description = content.partition("\n\n")
    # Bytes that are not UTF-8 come as lone surrogates, which JSON cannot hold.
    return description.encode("utf-8", "replace").decode()


def _files(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(files):
            path = Path(place) / name
            if name.endswith(endings) and path.stat().st_size <= _MAX_SOURCE_BYTES:
                yield path


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
