"""Jinja templates of HTML and Markdown pages."""

import os
from pathlib import Path
from typing import Any

import jinja2

from microcinema.utils.files import atomic_path


def render(path: Path, **values: Any) -> str:
    """A template file with its values: escaped in HTML, and none may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=".html" in path.suffixes,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(path.name).render(**values)


def write_page(path: str | os.PathLike[str], template: Path, **values: Any) -> None:
    """Renders a template into a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(render(template, **values), encoding="utf-8")
