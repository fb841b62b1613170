"""What other thresholds would have kept, from the measures that a finished filter stage recorded; no text is read.

The answer is that of a new run: all filters measure every document, whatever it failed before, and measures were
rounded before they were compared. Only parameters of the measuring (`fineweb.short_line_characters`) need the new run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.filters.checking import check_threshold, nearest
from data_pipeline.filters.registry import find_filter
from data_pipeline.filters.rules import Rule, round_to_float32, threshold_fields
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import STAGES_FOLDER
from megagpt.errors import ConfigError, DataError

Bools = NDArray[np.bool_]
_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class RuleChange:
    """Documents that fail one rule."""

    rule: str
    failing_before: int
    failing_after: int


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The filter stage of a job under other thresholds."""

    documents: int
    """All that the stage saw."""
    passing_before: int
    passing_after: int
    rules: tuple[RuleChange, ...]
    """Every rule that a document fails before or after, and every rule asked for, by name; language among them."""


def describe(found: WhatIf) -> str:
    """The result as a table."""
    width = max((len(change.rule) for change in found.rules), default=0)
    lines = [
        f"{found.documents:,} documents; {found.passing_before:,} pass, {found.passing_after:,} would pass",
        "",
        f"{'documents that fail':<{width}}  {'now':>12}  {'then':>12}",
    ]
    lines += [f"{c.rule:<{width}}  {c.failing_before:>12,}  {c.failing_after:>12,}" for c in found.rules]
    return "\n".join(lines)


def what_if(job_folder: Path, overrides: Mapping[str, float | None]) -> WhatIf:
    """Decide all documents of a job again with some thresholds changed.

    Args:
        job_folder: the job's `out`, its filter stage finished.
        overrides: rule, as in `fineweb.max_short_lines` -> threshold; None switches the rule off.

    A document that the filters left without any text stays out under any threshold; so does one whose text a filter
    emptied and that also failed a rule, although here it counts as passing if all rules that it fails are eased.

    Raises:
        ConfigError: an unknown rule, one of a filter that the job does not use, or a value that is no threshold.
        DataError: the folder holds no finished filter stage.
    """
    files = sorted((job_folder / STAGES_FOLDER / "filter").glob("*/decisions.parquet"))
    if not files:
        raise DataError(
            f"{job_folder}: no {STAGES_FOLDER}/filter/*/decisions.parquet; name the `out` folder of a job whose filter "
            "stage is done"
        )
    rules = [rule_of(name, limit) for name, limit in overrides.items()]
    totals: Counter[str] = Counter()
    before: Counter[str] = Counter()
    after: Counter[str] = Counter(dict.fromkeys(overrides, 0))
    for file in files:
        for batch in _batches(file, [rule.column for rule in rules]):
            _add_batch(batch, dict(zip(overrides, rules, strict=True)), (totals, before, after))
    names = sorted({*before, *after})
    return WhatIf(
        documents=totals["documents"],
        passing_before=totals["before"],
        passing_after=totals["after"],
        rules=tuple(RuleChange(name, before[name], after[name]) for name in names),
    )


def redecide(measures: Mapping[str, NDArray[np.float32]], rules: Sequence[Rule]) -> dict[str, Bools]:
    """Rule -> (documents,) whether each fails it.

    Args:
        measures: FILTER.X -> (documents,); NaN where the text has no such measure or the filters did not see it.
        rules: thresholds.
    """
    failed = {}
    for rule in rules:
        values = measures[rule.column]
        failed[rule.name] = values > rule.limit if rule.is_max else values < rule.limit
    return failed


def rule_of(name: str, limit: float | None) -> Rule:
    """The rule FILTER.min_X or FILTER.max_X with this threshold; None: one that no document fails.

    Raises:
        ConfigError: there is no such rule, or the value is no threshold for it.
    """
    filter_name, _, field = name.partition(".")
    try:
        kind, _ = find_filter(filter_name)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    known = threshold_fields(kind)
    if field not in known:
        raise ConfigError(
            f"{name}: {filter_name} has no threshold {field!r}{nearest(field, known)}. Only thresholds can be changed "
            "without a new run"
        )
    is_max = field.startswith("max_")
    if limit is None:
        limit = np.inf if is_max else -np.inf
    else:
        check_threshold(name, kind, field, limit)
    return Rule(name, f"{filter_name}.{known[field]}", round_to_float32(limit), is_max)


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with open_rows(file) as parquet:
        known = parquet.schema_arrow.names
        missing = [column for column in columns if column not in known]
        if missing:
            measured = [name for name in known if "." in name]
            raise ConfigError(
                f"{file}: the job did not measure {', '.join(missing)}; it has {', '.join(measured) or 'no filters'}"
            )
        yield from parquet.iter_batches(_BATCH_ROWS, columns=["reason", "failed", *dict.fromkeys(columns)])


def _add_batch(
    batch: pa.RecordBatch, rules: Mapping[str, Rule], counters: tuple[Counter[str], Counter[str], Counter[str]]
) -> None:
    totals, before, after = counters
    passing = pc.equal(batch["reason"], "").to_numpy(zero_copy_only=False)
    names = pc.list_flatten(batch["failed"]).dictionary_encode()
    owners = pc.list_parent_indices(batch["failed"]).to_numpy(zero_copy_only=False)
    codes = names.indices.to_numpy(zero_copy_only=False)
    known: list[str] = names.dictionary.to_pylist()
    fails_after = np.zeros(len(batch), bool)
    for code, (name, count) in enumerate(zip(known, np.bincount(codes, minlength=len(known)).tolist(), strict=True)):
        before[name] += count
        if name not in rules:
            after[name] += count
            fails_after[owners[codes == code]] = True
    measures = {rule.column: _values(batch[rule.column]) for rule in rules.values()}
    for name, fails in redecide(measures, tuple(rules.values())).items():
        after[name] += int(fails.sum())
        fails_after |= fails
    failed_any = np.zeros(len(batch), bool)
    failed_any[owners] = True
    rejected_otherwise = ~passing & ~failed_any
    totals["documents"] += len(batch)
    totals["before"] += int(passing.sum())
    totals["after"] += int((~fails_after & ~rejected_otherwise).sum())


def _values(column: pa.Array) -> NDArray[Any]:
    """(rows,) float32, NaN for null."""
    values: NDArray[Any] = pc.fill_null(column, float("nan")).to_numpy(zero_copy_only=False)
    return values
