"""Jinja templates of HTML and Markdown pages."""

from pathlib import Path

import jinja2


def open_template(path: Path) -> jinja2.Template:
    """A template file. Values in HTML are escaped; rendering fails if a value is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=".html" in path.suffixes,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(path.name)
