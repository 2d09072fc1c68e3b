"""The README tells the truth about the tree, and its commands, as those of the demo, are ones that the program takes."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from microcinema import config

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


def commands() -> list[str]:
    lines = re.findall(r"^(?:accelerate launch .*scripts/|microcinema )(\w+)(?:\.py)?(.*)$", README, re.MULTILINE)
    return [f"{command} {rest.partition(' #')[0]}".strip() for command, rest in lines if command in config.COMMANDS]


@pytest.mark.parametrize("line", commands())
def test_commands_compose(line: str):
    command, *overrides = shlex.split(line)
    if "--help" not in overrides:
        config.compose(command, overrides)


def test_commands_of_the_demo_compose():
    for _, (command, *overrides) in runpy.run_path(str(ROOT / "scripts" / "demo.py"))["STEPS"]:
        config.compose(command, overrides)


def test_there_are_commands_to_check():
    assert len(commands()) >= 9
