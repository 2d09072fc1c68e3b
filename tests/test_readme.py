"""The README tells the truth about the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README[README.index("## Files") : README.index("## Development")]


def shipped() -> set[str]:
    found = {path.relative_to(ROOT) for folder in ("microcinema", "scripts") for path in (ROOT / folder).rglob("*.py")}
    found |= {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    return {path.name for path in found if path.name != "__init__.py" and "assets" not in path.parts}


def test_the_file_tree_is_the_tree():
    named = set(re.findall(r"[\w.]+\.(?:py|yaml)\b", TREE)) - {"tiny.py"}
    assert named == shipped()
