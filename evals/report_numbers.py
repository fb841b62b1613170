"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(number: float | None) -> str:
    """1234567 -> `1.23 M`; whole numbers below ten thousand in full."""
    if number is None:
        return "not known"
    if abs(number) < 10_000 and float(number).is_integer():
        return f"{number:,.0f}"
    for size, prefix in _PREFIXES:
        if abs(number) >= size * 0.9995:  # 999,950 is 1.00 M, not 1,000 k
            return f"{number / size:.3g} {prefix}" if abs(number) >= 100 * size else f"{number / size:.2f} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """3725.0 -> `1 h 02 min`."""
    if seconds is None:
        return "not known"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def score(value: float | None) -> str:
    """A score or a loss: four decimals."""
    return "not a number" if value is None or value != value else f"{value:.4f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """A 95 % interval."""
    return "none" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def nats(value: float, *, signed: bool = False) -> str:
    """The log-probability of an answer, or the difference of two: to the hundredth."""
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def points(value: float, digits: int) -> str:
    """What a judge gave: as many decimals as its scale bears."""
    return f"{value:.{digits}f}"


def points_interval(bounds: tuple[float, float] | None, digits: int) -> str:
    """Its 95 % interval."""
    return "none" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def signed(value: float) -> str:
    """A difference: its sign is always there."""
    return f"{value:+.4f}"


def signed_interval(bounds: tuple[float, float]) -> str:
    """The 95 % interval of a difference."""
    return f"{signed(bounds[0])} to {signed(bounds[1])}"


def p_value(p: float) -> str:
    """Three decimals; what is smaller is only said to be so."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(fraction: float) -> str:
    """0.4213 -> `42.1 %`."""
    return f"{100 * fraction:.1f} %"


def known(fact: bool | None) -> str:  # noqa: FBT001 - a filter of templates
    """Yes, no, or a dash where nobody knows."""
    return "-" if fact is None else "yes" if fact else "no"


def cell(value: Any) -> str:
    """Foreign text inside a Markdown table or line: none of it may act as Markdown or HTML."""
    flat = " ".join(str(value).split())
    for character, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        flat = flat.replace(character, escaped)
    return flat


def fence(text: str) -> str:
    """A Markdown fence that is longer than any run of backticks in the text."""
    longest = max((len(run) for run in _runs(text, "`")), default=0)
    return "`" * max(3, longest + 1)


def _runs(text: str, character: str) -> list[str]:
    return [run for run in "".join(c if c == character else " " for c in text).split() if run]
