"""A module's documentation as an HTML page, from its source alone: nothing is imported or run.

`pydoc` gives richer pages but imports what it documents, which for arbitrary packages is slow, may fail, and runs their
code.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

MIN_DOC_CHARACTERS = 500
"""Modules with less documentation make no page."""

_UNDERLINE = re.compile(r"^\s*([-=~^\"'*+#`])\1{2,}\s*$")
_DOC_CALLS = re.compile(r"docstr|newdoc", re.IGNORECASE)
_MIN_CALL_CHARACTERS = 100
_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Entry:
    """Something documented: heading, depth of the heading (1 is the module), and its docstring without indentation."""

    heading: str
    level: int
    doc: str


def read_entries(source: str, module: str) -> list[Entry] | None:
    """The module, its classes and functions that have docstrings, in order; None where the source is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    # What subclasses repeat word for word is said once.
    entries = list({entry.doc: entry for entry in reversed(list(_entries(tree, module)))}.values())[::-1]
    return entries if sum(len(entry.doc) for entry in entries) >= MIN_DOC_CHARACTERS else []


def render_page(title: str, entries: list[Entry], neighbours: list[str]) -> str:
    """An HTML page with a menu, the entries as main content, and a footer, as documentation sites have them."""
    menu = "".join(f'<li><a href="{name}.html">{html.escape(name)}</a></li>' for name in neighbours)
    body = "\n".join(_render_entry(entry) for entry in entries)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
        f'<body><nav><ul><li><a href="index.html">Index of modules</a></li>{menu}</ul></nav>\n'
        f"<main><article>\n{body}\n</article></main>\n"
        "<footer><p>Made from the docstrings of the installed packages.</p></footer></body></html>\n"
    )


def _entries(tree: ast.Module, module: str) -> Iterator[Entry]:
    doc = ast.get_docstring(tree)
    yield Entry(module, 1, doc or "")
    for node in tree.body:
        if isinstance(node, _Documented):
            yield from _documented(node, 2)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _documenting_call(node.value)


def _documented(node: _Documented, level: int) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if doc:
        yield Entry(_signature(node), level, doc)
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, _Documented):
                yield from _documented(inner, min(level + 1, 4))


def _documenting_call(call: ast.Call) -> Iterator[Entry]:
    """Docstrings of compiled functions, which torch and numpy add by calls such as add_docstr(torch.abs, '''...''')."""
    name = ast.unparse(call.func)
    if not _DOC_CALLS.search(name) or not call.args:
        return
    texts = [
        node.value
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= _MIN_CALL_CHARACTERS
    ]
    for text in texts:
        yield Entry(ast.unparse(call.args[0]).strip("'\""), 2, inspect.cleandoc(text))


def _signature(node: _Documented) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{node.name}({', '.join(name for name in names if name not in ('self', 'cls'))})"


def _render_entry(entry: Entry) -> str:
    blocks = "\n".join(_render_block(block) for block in _blocks(entry.doc))
    return f"<h{entry.level}>{html.escape(entry.heading)}</h{entry.level}>\n{blocks}"


def _blocks(doc: str) -> list[list[str]]:
    blocks = re.split(r"\n[ \t]*\n", doc.expandtabs().strip("\n"))
    return [lines for block in blocks if (lines := [line.rstrip() for line in block.split("\n") if line.strip()])]


def _render_block(lines: list[str]) -> str:
    if len(lines) > 1 and _UNDERLINE.match(lines[1]):
        rest = _render_block(lines[2:]) if len(lines) > 2 else ""
        return f"<h5>{html.escape(lines[0].strip())}</h5>\n{rest}"
    indents = [len(line) - len(line.lstrip()) for line in lines]
    if any(line.lstrip().startswith((">>>", "...", "$ ")) for line in lines):
        return f"<pre>{html.escape(inspect.cleandoc(chr(10).join(lines)))}</pre>"
    if min(indents) == max(indents):
        return f"<p>{_flow(lines)}</p>"
    return _render_definitions(lines, min(indents))


def _render_definitions(lines: list[str], outer: int) -> str:
    """Terms at the outer indentation, each followed by its explanation further in."""
    parts: list[str] = []
    inner: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > outer:
            inner.append(line)
            continue
        if inner:
            parts.append(f"<p>{_flow(inner)}</p>")
            inner = []
        parts.append(f"<p>{_flow([line])}</p>")
    if inner:
        parts.append(f"<p>{_flow(inner)}</p>")
    return "\n".join(parts)


def _flow(lines: list[str]) -> str:
    return html.escape(" ".join(line.strip() for line in lines), quote=False)
