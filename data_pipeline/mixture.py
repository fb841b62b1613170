"""mixture.yaml: the part of a training configuration that says in which shares the packed sources are read.

The weight of a token file in `data.train` is its share of training samples, all of them of one length: so its share of
training tokens. A source of n tokens gets the share, before normalisation,

    tokens        n
    temperature   n ** (1 / T)          Source: Conneau et al. 2020 (XLM-R), section 3.1, with alpha = 1 / T
    weights       as given
    epochs        n * epochs
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipeline.config import MixtureSection, PackSection
from megagpt.atomic import write_file
from megagpt.config.load import FOLDER
from megagpt.errors import ConfigError

MIXTURE_FILE = "mixture.yaml"

_UNITS = 10**12
"""Shares are written with twelve digits and add up to 1 exactly."""


def write_mixture(
    folder: Path, packed: Mapping[str, Any], pack: PackSection, settings: MixtureSection
) -> dict[str, dict[str, float]]:
    """Write mixture.yaml for token files in the same folder.

    Args:
        folder: where to.
        packed: the detail of `write_packed`: `splits` and `files`.
        pack: how the token files were made.
        settings: how sources are weighted.

    Returns:
        source -> tokens, weight and epochs, for the report; empty where sources are not packed by themselves.

    Raises:
        ConfigError: weights or epochs name a source that has no training tokens, or leave one out that has.
    """
    if not pack.per_source:
        comments = [f"All sources in one file: {packed['splits']['train']['tokens']:,} training tokens."]
        _write(folder, comments, [_line("  train: ", f"{pack.name}_train")], pack.name)
        return {}
    prefixes = {next(iter(v["sources"])): name for name, v in packed["files"].items() if v["split"] == "train"}
    tokens = {source: int(packed["files"][prefix]["tokens"]) for source, prefix in prefixes.items()}
    weights, length = shares(tokens, settings), _run_tokens(tokens, settings)
    mixed = {
        source: {"tokens": n, "weight": float(weights[source]), "epochs": float(weights[source] * length / n)}
        for source, n in tokens.items()
    }
    absent = [source for source in packed["splits"]["train"]["sources"] if source not in tokens]
    comments = _table(mixed, length, settings)
    comments += [f"{_plain(source)}: no training documents, so it is not in the mixture" for source in absent]
    lines = ["  train:"]
    for source, prefix in prefixes.items():
        lines += [_line("    - prefix: ", prefix), f"      weight: {float(weights[source]):.12f}"]
    _write(folder, comments, lines, pack.name)
    return mixed


def shares(tokens: Mapping[str, int], settings: MixtureSection) -> dict[str, Fraction]:
    """Source -> share of the training tokens, in multiples of 1e-12 that add up to 1.

    Args:
        tokens: source -> training tokens, all above 0.
        settings: how sources are weighted.

    Raises:
        ConfigError: weights or epochs name a source that is not among them, or weights leave one out.
    """
    match settings.by:
        case "tokens":
            raw = {source: Fraction(n) for source, n in tokens.items()}
        case "temperature":
            largest = max(tokens.values())  # keeps powers of small exponents and of huge corpora between 0 and 1
            raw = {s: Fraction((n / largest) ** (1 / settings.temperature)) for s, n in tokens.items()}
        case "weights":
            _check_names("weights", settings.weights, tokens)
            missing = [source for source in tokens if source not in settings.weights]
            if missing:
                raise ConfigError(
                    f"mixture.weights does not name {', '.join(map(repr, missing))}; every source needs a weight"
                )
            raw = {source: _as_written(settings.weights[source]) for source in tokens}
        case "epochs":
            epochs = _epochs(tokens, settings)
            raw = {source: n * epochs[source] for source, n in tokens.items()}
    return _rounded(raw)


def _epochs(tokens: Mapping[str, int], settings: MixtureSection) -> dict[str, Fraction]:
    _check_names("epochs", settings.epochs, tokens)
    return {source: _as_written(settings.epochs.get(source, 1.0)) for source in tokens}


def _as_written(number: float) -> Fraction:
    """The decimal number that the user wrote, not the binary one beside it."""
    return Fraction(repr(number))


def _check_names(key: str, named: Mapping[str, float], tokens: Mapping[str, int]) -> None:
    for name in named:
        if name not in tokens:
            nearest = difflib.get_close_matches(name, list(tokens), n=3)
            hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"they are {', '.join(tokens)}"
            raise ConfigError(f"mixture.{key}: no source named {name!r} has training tokens; {hint}")


def _rounded(raw: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Multiples of 1 / _UNITS, none of them 0; the largest takes what is left, so that they add up to 1."""
    total = sum(raw.values())
    units = {source: max(1, int(value * _UNITS / total)) for source, value in raw.items()}
    units[max(units, key=lambda source: units[source])] += _UNITS - sum(units.values())
    return {source: Fraction(n, _UNITS) for source, n in units.items()}


def _run_tokens(tokens: Mapping[str, int], settings: MixtureSection) -> int:
    """The length of a run that the table speaks of: every token once, or as often as `epochs` says."""
    if settings.by != "epochs":
        return sum(tokens.values())
    return round(sum(tokens[source] * times for source, times in _epochs(tokens, settings).items()))


def _table(mixed: Mapping[str, Mapping[str, float]], length: int, settings: MixtureSection) -> list[str]:
    how = f"temperature {settings.temperature:g}" if settings.by == "temperature" else settings.by
    width = max(len(_plain(source)) for source in ("source", *mixed))
    return [
        f"Sources by {how}. weight: share of the training tokens, all add up to 1. epochs: how often a run of",
        f"{length:,} tokens sees a source; a run twice as long sees it twice as often.",
        "",
        f"{'source':<{width}}  {'tokens':>18}  {'weight':>10}  {'epochs':>8}",
        *(
            f"{_plain(source):<{width}}  {values['tokens']:>18,}  {values['weight']:>10.6f}  {values['epochs']:>8.3f}"
            for source, values in mixed.items()
        ),
    ]


def _write(folder: Path, comments: Sequence[str], train: Sequence[str], name: str) -> None:
    head = [f"For `megagpt train MODEL.yaml {MIXTURE_FILE}`; {FOLDER} is this file's own folder.", ""]
    lines = [f"# {line}".rstrip() for line in [*head, *comments]]
    page = "\n".join([*lines, "data:", *train, _line("  val: ", f"{name}_val")]) + "\n"
    write_file(folder / MIXTURE_FILE, page.encode())


def _line(before: str, prefix: str) -> str:
    return f'{before}"{FOLDER}/{prefix}"'


def _plain(source: str) -> str:
    """A source's name on one line of a comment."""
    return " ".join(source.split())
