"""Render the templates of pages and of what notebooks show; all values in them are escaped."""

import functools
import math
from pathlib import Path
from typing import Any

import jinja2

from hf_sparse.report import charts

UNKNOWN = "unknown"


def number(value: float | None, form: str = ",.4g") -> str:
    """Write a number, or that it is unknown where it is none or not finite."""
    return UNKNOWN if value is None or not math.isfinite(value) else format(value, form)


def ratio(value: float, base: float) -> str:
    """Write a value in percent of another one, or nothing where that cannot be."""
    known = value is not None and base is not None and math.isfinite(value) and math.isfinite(base) and base > 0
    return f"{100 * value / base:.0f}%" if known else ""


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "ratio": ratio}
    environment.globals["charts"] = charts
    return environment


def render(template: str, values: dict[str, Any]) -> str:
    """Render a template with values."""
    return _environment().get_template(template).render(values)
