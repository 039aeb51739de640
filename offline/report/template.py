"""HTML pages with nothing outside of them: templates, and the style that all of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent


def render(template: Path, *, command: str, title: str, **values: Any) -> str:
    """The page; the same bytes for the same values. command: of d2moe, that made it."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(template.name).render(command=command, title=title, style=style, **values)
