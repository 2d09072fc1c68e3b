"""The page of troubles quotes what the package says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_quoted_lines_are_in_the_package():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row) if "_" not in quote]
    assert len(quoted) > 18
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "microcinema").rglob("*.py"))
    said = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [text for text in said if isinstance(text, str)]
    assert [quote for quote in quoted if not any(quote in text for text in texts)] == []
