"""What every filter is made of: settings, a function that measures, and rules that compare measures with thresholds.

A rule is named after its threshold: a document fails `fineweb.max_short_lines` if its measure `short_lines` is above
that setting. Measures are rounded to 32 bits before they are compared, as they are stored in decisions.parquet, so
that other thresholds can be tried later with exactly the result that a new run would have.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from data_pipeline.filters.text_view import TextView

_BOUNDS = ("min_", "max_")


@dataclass(frozen=True, slots=True)
class Settings:
    """Base of every filter's settings.

    A field `min_X` or `max_X` (int or float, or None: rule off) is a threshold on the measure X; all other fields are
    parameters of the measuring. A `__post_init__` may raise ConfigError.
    """

    counts: ClassVar[tuple[str, ...]] = ()
    """Measures that no threshold of this filter looks at, to be recorded all the same."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a filter finds in a text."""

    measures: Mapping[str, float]
    """By name; a value that the text does not have (the mean length of no words) is NaN and fails no rule."""
    text: str | None = None
    """The text as the filter leaves it; None: unchanged."""


Apply = Callable[["TextView"], Finding]


@dataclass(frozen=True, slots=True)
class Rule:
    """One threshold in use."""

    name: str
    """FILTER.min_X or FILTER.max_X."""
    column: str
    """FILTER.X, the measure."""
    limit: float
    is_max: bool

    def fails(self, measure: float) -> bool:
        """Whether a document with this measure fails; a NaN never does."""
        return measure > self.limit if self.is_max else measure < self.limit


def threshold_fields(kind: type[Settings]) -> dict[str, str]:
    """Field -> measure of every threshold of these settings, in order of declaration."""
    return {field.name: field.name[4:] for field in fields(kind) if field.name.startswith(_BOUNDS)}


def measures_of(kind: type[Settings]) -> tuple[str, ...]:
    """Names of all measures of a filter, in order of declaration, those without a threshold last."""
    return tuple(dict.fromkeys((*threshold_fields(kind).values(), *kind.counts)))


def rules_of(filter_name: str, settings: Settings) -> tuple[Rule, ...]:
    """The rules of a filter that are switched on, in order of declaration."""
    return tuple(
        Rule(f"{filter_name}.{field}", f"{filter_name}.{measure}", round_to_float32(limit), field.startswith("max_"))
        for field, measure in threshold_fields(type(settings)).items()
        if (limit := getattr(settings, field)) is not None
    )


def round_to_float32(value: float) -> float:
    """The nearest number of 32 bits."""
    return array("f", (value,))[0]


class Ruling:
    """A filter's measures and rules, bound to its name."""

    def __init__(self, filter_name: str, settings: Settings) -> None:
        self._measures = measures_of(type(settings))
        self.columns = tuple(f"{filter_name}.{measure}" for measure in self._measures)
        """FILTER.X of every measure."""
        self._rules = rules_of(filter_name, settings)

    def judge(self, measures: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """(measures by column, rules failed), in order of declaration.

        Raises:
            KeyError: the filter left out a measure that its settings declare.
        """
        values = array("f", [measures[name] for name in self._measures]).tolist()
        columns = dict(zip(self.columns, values, strict=True))
        return columns, [rule.name for rule in self._rules if rule.fails(columns[rule.column])]
