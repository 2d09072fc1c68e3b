"""README and guides: their commands compose, find their data and run, their benchmarks exist, the files and keys that they name are there, their examples import."""

import ast
import importlib
import re
import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from microcinema.commands import cli, sweep
from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, plain
from microcinema.sprites.dataset import write_dataset

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
    joined = [re.sub(r"\$\w+_SHA256", "0" * 64, line) for line in joined]
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
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda span: span[0].replace("\n", " "), text)
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


SWEEPS = [
    line for _, line in commands() if line.startswith("sweep ") and "sweep=" not in line
]  # those are tested by themselves


@pytest.mark.parametrize("line", SWEEPS)
def test_runs_of_sweeps_compose(line: str, tmp_path: Path):
    _, *overrides = shlex.split(line)
    assert len(sweep.plan(compose("sweep", [*overrides, f"output_dir={tmp_path}"]))) >= 6


READ = [line for line in sorted({line for _, line in commands()}) if line.startswith(("train", "prepare", "doctor"))]
READ = [line for line in READ if not line.startswith("prepare sprites") and "example.org" not in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data where the pages have them, of three clips each: `/data` is its `data`, and it is the current folder."""
    folder = tmp_path_factory.mktemp("world")
    clips = write_dataset(folder / "runs/data/sprites", num_videos=3, progress=False)
    shutil.copytree(clips, folder / "runs/data/sprites_heldout")
    files, names = sorted((clips / "videos").rglob("*.mp4")), ["a star", "a moon", "a heart"]
    (folder / "data/webvid/videos/part").mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder / "data/webvid/videos/part")
    rows = [f"{file.stem},{name},part" for file, name in zip(files, names, strict=True)]
    for name in ("results_10M_train.csv", "results_10M_val.csv", "list.csv"):
        (folder / "data/webvid" / name).write_text("\n".join(["videoid,name,page_dir", *rows]))
    for place in ("clips", "pictures"):  # single frames of videos are pictures too
        shutil.copytree(folder / "data/webvid/videos/part", folder / "data" / place)
        rows = [f"{file.name},{name}" for file, name in zip(files, names, strict=True)]
        (folder / "data" / place / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    columns = {
        "path": [file.name for file in files],
        **dict.fromkeys(("text", "long_caption", "motion_caption"), names),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data/clips/list.parquet")
    (folder / "data/shards").mkdir()
    for number in range(2):
        with tarfile.open(folder / f"data/shards/{number:05d}.tar", "w") as shard:
            shard.add(files[number], "0.mp4")
            shard.add(clips / "clips.csv", "0.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["prepare", "check", "data=webvid", "num_workers=1", "reject=[]"]) == 0  # runs/check
    return folder


def here(line: str, world: Path) -> list[str]:
    """The words of a line, with the absolute paths of the pages below `world`, and as many shards as are there."""
    words = shlex.split(
        line.replace("/data/", f"{world}/data/").replace(f"runs{world}", "runs").replace("09999", "00001")
    )
    return [word for word in cli.merge_subcommand(words) if word != "--dry-run"]


@pytest.mark.parametrize("line", READ)
def test_a_command_finds_its_data(line: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(world)
    command, *overrides = here(line, world)
    config = compose(COMMANDS[command].config or command, overrides)
    clips = config.data.build()
    assert len(clips) >= 2 and clips[0]["video"].shape[1] == 3 and clips[0]["caption"]
    if held_out := getattr(config, "validation_data", None):
        assert len(replace(config.data, arguments={**config.data.arguments, **held_out}).build()) == 3


SMALL = {  # what makes a line of the pages run here, in seconds
    "prepare check": ["num_workers=1", "max_samples=2", "output_dir=runs/small"],
    "prepare preview": ["max_samples=2", "output=runs/preview.png"],
    "prepare sprites": ["num_videos=2", "output_dir=runs/rendered"],
    "doctor": ["base=sprites", "model.image_encoder=null", "model.adapter=null", "mixed_precision=no"],
    "sample": ["num_inference_steps=1", "keyframe.num_inference_steps=1", "output_dir=runs/small"],
}


def runnable() -> list[str]:
    """Lines that need neither the network, nor weights that are not embedded, nor a cluster."""
    found = sorted({line for _, line in commands()})
    found = [line for line in found if line.startswith(tuple(SMALL)) and "--help" not in line]
    return [
        line for line in found if not re.search(r"ray_address|pipeline=(runs|me)/|stabilityai|resolution=512", line)
    ]


def run_line(line: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(world)
    (world / "prompts.csv").write_text("prompt\na large red star moving up on sand\n")
    for name in ("heart.png", "star.png", "mask.png"):
        Image.new("RGB", (64, 64), "red").save(world / name)
    command, *overrides = here(line, world)
    steps = ["num_inference_steps=12"] if "start_time=" in line else []  # of which an early start leaves out some
    return cli.main([command, *overrides, *SMALL[command], *steps])


@pytest.mark.parametrize("line", [line for line in runnable() if "preview data=folder" in line][:1])
def test_a_command_runs(line: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    assert run_line(line, world, monkeypatch) == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", runnable())
def test_every_command_that_can_run_here_runs(line: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    assert run_line(line, world, monkeypatch) == 0


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
    commands = ("train", "sample", "ui", "sweep", "export", "prepare check", "prepare preview", "prepare latents")
    composed = [plain(compose(command)) for command in commands]
    groups = (["lora=motion", "init_weights_from=runs/my-model"], ["objective=consistency"])
    composed += [plain(compose("train", chosen)) for chosen in groups]
    composed += [plain(compose("evaluate", [f"evaluation={protocol}"])) for protocol in ("ucf101", "sprites")]
    valid = {name for config in composed for name in dotted(config)}
    for page in PAGES[1:]:
        if page.name == "ablation.md":  # names the keys of the day on which the grid ran
            continue
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        keys = {key for code in re.findall(r"`([^`\n]+)`", text) for key in re.findall(r"(?:^| )([a-z_][\w.]*)=", code)}
        assert keys - valid - {"key", "group", "experiment", "sweep"} == set(), page.name


def dotted(node, prefix: str = "") -> list[str]:
    names = []
    for key, value in node.items():
        names.append(prefix + key)
        names += dotted(value, f"{prefix}{key}.") if hasattr(value, "items") else []
    return names


def test_every_command_has_a_line_in_the_tour():
    tour = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    assert all(f"microcinema {command}" in tour for command in cli.COMMANDS)
