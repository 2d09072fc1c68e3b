"""The floors of the package: no import runs upward or in a circle, and nothing is imported that is not declared."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import microcinema

ROOT = Path(microcinema.__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "microcinema").rglob("*.py"))
}
# What the modules of a folder may import beside one another, from the lowest floor up. Only commands knows `sprites`; only `__main__`
# and what is outside the package (scripts, benchmarks, tests) imports `commands`.
FLOORS: dict[str, set[str]] = {"utils": set(), "config": {"utils"}}
FLOORS |= {name: {"utils", "config"} for name in ("data", "diffusion", "models")}
for name in ("pipelines", "evaluation", "training"):
    FLOORS[name] = {*FLOORS}
FLOORS["sprites"] = FLOORS["profiling"] = {*FLOORS}
FLOORS["ui"] = {"utils", "config", "data"}
FLOORS["commands"] = {*FLOORS}
FLOORS["__main__"] = {"commands"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, in functions too, except for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8"))))


def module_of(name: str) -> str:
    return name if name in SOURCES else name.rpartition(".")[0]


GRAPH = {
    module: {module_of(name) for name in imported(path) if name.startswith("microcinema.")} - {module}
    for module, path in SOURCES.items()
}


def part(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", [module for module in SOURCES if part(module)])
def test_no_import_runs_upward(module: str):
    allowed = FLOORS[part(module)] | {part(module)}
    assert {other for other in GRAPH[module] if part(other) and part(other) not in allowed} == set()


def test_no_import_runs_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in GRAPH[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_every_import_is_a_declared_dependency():
    distribution = {"cv2": "opencv_python_headless", "PIL": "pillow", "skimage": "scikit_image", "yaml": "pyyaml"}
    distribution["hydra"] = "hydra_core"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    declared = {name.lower().replace("-", "_") for name in re.findall(r'^  "([\w-]+)', core, re.MULTILINE)}
    used = {
        name.split(".")[0] for path in [*SOURCES.values(), *(ROOT / "scripts").glob("*.py")] for name in imported(path)
    }
    outside = used - set(sys.stdlib_module_names) - {"microcinema"}
    optional = {
        "bitsandbytes",
        "deepspeed",
        "gradio",
        "matplotlib",
        "ray",
        "starlette",
        "torchvision",
        "xformers",
    }  # for some alone, and missed in one line
    assert {distribution.get(name, name.lower()) for name in outside} - optional - declared == set()


@pytest.mark.parametrize("name", microcinema.__all__)
def test_public_names_are_there(name: str):
    assert getattr(microcinema, name) is not None
    assert name in dir(microcinema)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="VideoNet"):
        importlib.import_module("microcinema").VideoNet  # noqa: B018
