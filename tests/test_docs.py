"""README and guides: their commands compose, their benchmarks exist, the files and keys that they name are there, their examples import."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from microcinema.commands import cli
from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, plain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHED = re.compile(
    r"^(?:accelerate launch|srun|torchrun|python)\b.*? (?:scripts/(\w+)\.py|-m microcinema (\w+))(.*)$"
)
BENCHMARK = re.compile(r"python -m benchmarks\.(\w+)([^`\n#]*)")
CARDS = [ROOT / "microcinema/assets/README.md", ROOT / "scripts/recipes/model_card.md.jinja"]


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages; "" stands for no language."""
    text = page.read_text(encoding="utf-8")
    return [code for language, code in BLOCK.findall(text) if language in languages]


def lines(page: Path) -> list[str]:
    """The lines of the command blocks, with continued lines joined, without comments and environment variables."""
    joined = "\n".join(blocks(page, "", "bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"^(?:\w+=\S+ )+", "", line.partition(" #")[0].strip()) for line in joined]


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of every line that starts this program."""
    result = []
    for page in PAGES:
        for line in lines(page):
            if line.startswith("microcinema "):
                result.append((page.name, line.removeprefix("microcinema ")))
            elif (match := LAUNCHED.match(line)) and (match[1] or match[2]) in {name.split()[0] for name in COMMANDS}:
                result.append((page.name, f"{match[1] or match[2]} {match[3]}"))
    return result


def benchmarks() -> list[tuple[str, str, str]]:
    """(page, module, arguments) of every benchmark that a page names, in its text or in its blocks."""
    result = []
    for page in [*PAGES, *CARDS]:
        text = re.sub(r"`[^`]+`", lambda span: span[0].replace("\n", " "), page.read_text(encoding="utf-8"))
        result += [(page.name, *match) for match in BENCHMARK.findall(text)]
    return result


@pytest.mark.parametrize("page, line", commands())
def test_commands_compose(page: str, line: str):
    command, *overrides = cli.merge_subcommand(shlex.split(line))
    if "--dry-run" in overrides:
        assert cli.COMMANDS[command].dry_run
        overrides.remove("--dry-run")
    if command != "--help":
        assert command in COMMANDS
        if "--help" not in overrides:
            compose(COMMANDS[command].config or command, overrides)


@pytest.mark.parametrize("page, module, arguments", benchmarks())
def test_benchmarks_are_there_and_take_these_arguments(page: str, module: str, arguments: str):
    files = [ROOT / "benchmarks" / f"{name}.py" for name in (module, "reporting")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    words = shlex.split(arguments)
    options = [word for word in words if word.startswith("--")]
    if "add_subparsers" in source and words:
        options.append(words[0])
    assert [option for option in options if f'"{option}"' not in source] == []


def test_there_are_commands_to_check():
    pages = [page for page, _ in commands()]
    assert pages.count("README.md") >= 9 and pages.count("stable_diffusion.md") >= 15
    assert {cli.merge_subcommand(line.split())[0] for _, line in commands()} >= set(COMMANDS)
    assert len({module for _, module, _ in benchmarks()}) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    named = re.findall(r"\b(?:configs|scripts|docs|microcinema|tests)/[\w/]+\.(?:py|yaml|md|jinja)\b", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def examples() -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize("page, block", examples())
def test_examples_parse_and_import_what_is_there(page: str, block: str):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_keys_in_the_text_of_the_guides_are_keys():
    """Such as `memory.offload=model` between two words."""
    commands = ("train", "sample", "export", "prepare check", "prepare preview", "prepare latents")
    composed = [plain(compose(command)) for command in commands]
    composed += [plain(compose("evaluate", [f"evaluation={protocol}"])) for protocol in ("ucf101", "sprites")]
    valid = {name for config in composed for name in dotted(config)}
    for page in PAGES[1:]:
        if page.name == "ablation.md":  # names the keys of the day on which the grid ran
            continue
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        keys = {key for code in re.findall(r"`([^`\n]+)`", text) for key in re.findall(r"(?:^| )([a-z_][\w.]*)=", code)}
        assert keys - valid - {"key", "group", "experiment"} == set(), page.name


def dotted(node, prefix: str = "") -> list[str]:
    names = []
    for key, value in node.items():
        names.append(prefix + key)
        names += dotted(value, f"{prefix}{key}.") if hasattr(value, "items") else []
    return names


def test_every_command_has_a_line_in_the_tour():
    tour = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    assert all(f"microcinema {command}" in tour for command in cli.COMMANDS)
