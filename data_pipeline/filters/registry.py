"""All filters by name, and the chain that a job's `filters` section asks for.

A new filter is one file, with a frozen dataclass of settings and a `bind` that makes the measuring function out of
them, and one line in FILTERS. What `bind` needs beside the standard library it imports when it is called, so that
reading a configuration stays quick.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.document import Document
from data_pipeline.filters.bad_words import BadWords, bind_bad_words
from data_pipeline.filters.boilerplate import Boilerplate, bind_boilerplate
from data_pipeline.filters.c4 import C4, bind_c4
from data_pipeline.filters.checking import nearest, paths_in, plain_values, read_settings
from data_pipeline.filters.classifier import Classifier, bind_classifier
from data_pipeline.filters.dclm import DCLM, bind_dclm
from data_pipeline.filters.fineweb import FineWeb, bind_fineweb
from data_pipeline.filters.gopher_quality import GopherQuality, bind_gopher_quality
from data_pipeline.filters.gopher_repetition import GopherRepetition, bind_gopher_repetition
from data_pipeline.filters.length import Length, bind_length
from data_pipeline.filters.line_dedup import LineDedup, bind_line_dedup
from data_pipeline.filters.pii import Pii, bind_pii
from data_pipeline.filters.rules import Apply, Ruling, Settings
from data_pipeline.filters.text_view import TextView
from data_pipeline.filters.unicode_repair import UnicodeRepair, bind_unicode_repair
from megagpt.errors import ConfigError

Section = Mapping[str, Mapping[str, Any]]

FILTERS: dict[str, tuple[type[Settings], Callable[[Any], Apply]]] = {
    "bad_words": (BadWords, bind_bad_words),
    "boilerplate": (Boilerplate, bind_boilerplate),
    "c4": (C4, bind_c4),
    "classifier": (Classifier, bind_classifier),
    "dclm": (DCLM, bind_dclm),
    "fineweb": (FineWeb, bind_fineweb),
    "gopher_quality": (GopherQuality, bind_gopher_quality),
    "gopher_repetition": (GopherRepetition, bind_gopher_repetition),
    "length": (Length, bind_length),
    "line_dedup": (LineDedup, bind_line_dedup),
    "pii": (Pii, bind_pii),
    "unicode_repair": (UnicodeRepair, bind_unicode_repair),
}
"""Name -> (settings, bind); `bind` loads word lists and models, once a worker."""

_KEY = re.compile(r"([^:]*)(?::[A-Za-z0-9_-]+)?")


def find_filter(key: str) -> tuple[type[Settings], Callable[[Any], Apply]]:
    """The filter that a key of the section stands for.

    Args:
        key: NAME, or NAME:LABEL where a job has several of a kind (classifier:quality, classifier:toxicity). Rules
            and measures begin with the whole key. A label is made of letters, digits, `_` and `-`.

    Raises:
        ConfigError: there is no such filter, or the label has other characters in it.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise ConfigError(f"{key!r} is no filter: what follows the colon is a label of letters, digits, _ and -")
    name = match.group(1)
    if name not in FILTERS:
        raise ConfigError(f"unknown filter {name!r}{nearest(name, FILTERS)}")
    return FILTERS[name]


@dataclass(frozen=True, slots=True)
class _Step:
    bind: Callable[[Any], Apply]
    settings: Settings
    ruling: Ruling


class FilterChain:
    """The filters of a job, in its order."""

    def __init__(self, settings: Mapping[str, Settings]) -> None:
        self._steps = [_Step(find_filter(name)[1], found, Ruling(name, found)) for name, found in settings.items()]
        self._applies: list[Apply] | None = None
        self.thresholds: dict[str, dict[str, Any]] = {name: plain_values(found) for name, found in settings.items()}
        """Every setting in use by filter, defaults included, for the report."""
        self.measure_names: tuple[str, ...] = tuple(column for step in self._steps for column in step.ruling.columns)
        """FILTER.X of every measure that `apply` will put into a document, in this order."""

    def load(self) -> None:
        """Load word lists and models, unless they are loaded."""
        if self._applies is None:
            self._applies = [step.bind(step.settings) for step in self._steps]

    def apply(self, document: Document) -> None:
        """Measure a document with every filter, also after the first that it fails.

        Adds to `document.measures` and `document.failed`; filters that clean leave their text in `document.text`, and
        the filters after them see that.
        """
        self.load()
        view = TextView(document.text)
        for step, apply in zip(self._steps, self._applies or (), strict=True):
            finding = apply(view)
            measures, failed = step.ruling.judge(finding.measures)
            document.measures.update(measures)
            document.failed += failed
            if finding.text is not None and finding.text != view.text:
                view = TextView(finding.text)
        document.text = view.text


def build_filters(section: Section, *, load: bool = True) -> FilterChain:
    """The chain for a job's `filters` section.

    Args:
        section: filter -> the settings that differ from its defaults.
        load: open word lists and models now; otherwise no file is touched before the first document.

    Raises:
        ConfigError: an unknown filter or setting, or a value of the wrong type; all problems at once.
    """
    chain = FilterChain(_read_section(section))
    if load:
        chain.load()
    return chain


def files_of(section: Section) -> list[Path]:
    """The files that the filters of a job read: word lists, models.

    Raises:
        ConfigError: as `build_filters`.
    """
    return [path for settings in _read_section(section).values() for path in paths_in(settings)]


def _read_section(section: Section) -> dict[str, Settings]:
    problems: list[str] = []
    chain: dict[str, Settings] = {}
    for name, values in section.items():
        try:
            kind, _ = find_filter(name)
        except ConfigError as error:
            problems.append(f"filters: {error}")
            continue
        settings, found = read_settings(name, kind, values)
        problems += found
        if settings is not None:
            chain[name] = settings
    if problems:
        raise ConfigError("\n".join(problems))
    return chain
