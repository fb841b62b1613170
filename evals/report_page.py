"""Pages and markdown out of templates: one place that says how numbers and foreign text are written."""

from __future__ import annotations

from typing import Any

import jinja2

from evals import report_numbers as numbers


def render(template: str, view: dict[str, Any]) -> str:
    """Fill evals/templates/`template`.j2; text in pages is escaped, a name that the view lacks is an error."""
    return _environment().get_template(f"{template}.j2").render(**view)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evals", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        {
            "full": lambda number: f"{number:,}",
            "cell": numbers.cell,
            "fence": numbers.fence,
            "score": numbers.score,
            "interval": numbers.interval,
            "nats": numbers.nats,
            "points": numbers.points,
            "points_interval": numbers.points_interval,
            "signed": numbers.signed,
            "signed_interval": numbers.signed_interval,
            "p": numbers.p_value,
            "count": numbers.count,
            "percent": numbers.percent,
            "duration": numbers.duration,
            "known": numbers.known,
        }
    )
    return environment
