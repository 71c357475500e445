"""A web page from its template, with the style that all pages share inside it."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

Filters = Mapping[str, Callable[..., Any]]


def render_page(template: Path, filters: Filters, **values: Any) -> str:
    """Return a page as HTML; its template puts `style` before its own styles.

    A lone surrogate, which JSON can hold and a file of UTF-8 cannot, is written as JSON writes it.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    html = _compile(template, tuple(filters.items())).render(values | {"style": style})
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


@lru_cache(maxsize=2)
def _compile(path: Path, filters: tuple[tuple[str, Callable[..., Any]], ...]) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= dict(filters)
    return environment.from_string(path.read_text(encoding="utf-8"))
