"""Every file under configs/ composes and makes its objects; wrong keys and values are told in one line."""

import csv
import shutil
import subprocess
import sys
import tarfile
import typing
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, ReadonlyConfigError
from webdataset.shardlists import expand_urls

from fixtures import tiny
from microcinema.config import schema
from microcinema.config.compose import (
    COMMANDS,
    KEYS_OF,
    compose,
    config_folder,
    documented_keys,
    group_defaults,
    group_options,
    instantiate,
    parameters,
    save,
)
from microcinema.data.clips import ClipDataset
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.pipelines.base_model import load_base
from microcinema.sprites.dataset import CSV_FILE, write_dataset
from microcinema.training.settings import Settings
from microcinema.utils.errors import UserError

GROUPS = {group: command for command in COMMANDS for group in group_defaults(command)}
OPTIONS = [(command, group, option) for group, command in GROUPS.items() for option in group_options(group)]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, as `prepare` writes them."""
    return write_dataset(tmp_path_factory.mktemp("data") / "sprites", num_videos=3, progress=False)


def told(command: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        compose(command, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def targets(node: typing.Any) -> typing.Iterator[DictConfig]:
    """Nodes with a `_target_`, outermost only."""
    if isinstance(node, DictConfig) and "_target_" in node:
        yield node
    elif isinstance(node, DictConfig | ListConfig):
        for value in node.values() if isinstance(node, DictConfig) else node:
            yield from targets(value)


def test_every_folder_of_configs_is_known():
    folders = {path.name for path in config_folder().iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "accelerate", "ablation"}
    assert set(COMMANDS) == set(schema.COMMANDS)
    files = {path.stem for path in config_folder().glob("*.yaml")}
    assert files == {KEYS_OF.get(command, command) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_and_schema_have_the_same_keys(command: str):
    in_file = {key.partition(".")[0] for key, _, _ in documented_keys(command)} - {"experiment"}
    assert in_file == {field.name for field in fields(schema.COMMANDS[command])}
    assert set(compose(command)) == in_file


def stand_in(clips: DictConfig, sprites: Path) -> None:
    """Puts the clips of `sprites` where a data set's config says that its own are."""
    if "root" in clips:
        shutil.copytree(sprites, clips.root)
        if "columns" in clips:
            with open(sprites / CSV_FILE, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            columns = {name: column for name, column in clips.columns.items() if column}
            with open(clips.metadata, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*columns.values(), "page_dir"])
                for path, row in zip(sorted(sprites.rglob("*.mp4")), rows, strict=True):
                    known = {"id": path.stem, "file": path.relative_to(sprites), "caption": row["name"]}
                    writer.writerow([*(known[name] for name in columns), row["page_dir"]])
    elif "shards" in clips:
        for url in expand_urls(clips.shards):
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(url, "w") as tar:
                tar.add(sprites / CSV_FILE, "0.txt")


@pytest.mark.parametrize("command, group, option", OPTIONS)
def test_every_option_composes_and_makes_its_objects(
    command: str, group: str, option: str, sprites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    composed = compose(command, [f"{group}={option}"])
    for node in targets(composed):
        # The files as they are shipped: real clips stand where each says that they are.
        for clips in (node, node.get("dataset", {}), *node.get("parts", {}).values()):
            stand_in(clips, sprites)
        loaded = {"unet": tiny.unet()} if "unet" in parameters(node._target_) else {}
        # Read off the encoders that a run opens.
        loaded |= {"image_width": 24} if node.get("adapter") else {}
        assert instantiate(node, **loaded) is not None
    assert command == "train" or group not in composed or composed[group]


@pytest.mark.parametrize("option", group_options("base"))
def test_every_base_that_is_embedded_opens(option: str):
    base = compose("train", [f"base={option}"]).base
    if "/" in base.pretrained_model_name_or_path:
        pytest.skip("a repository of the hub")
    assert load_base(**base).unet.config["in_channels"] > 0


def test_a_run_without_config_has_the_same_defaults():
    composed = compose("train")
    for field in fields(Settings):
        if field.default is not MISSING:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert composed[field.name] == default, field.name


@pytest.mark.parametrize("path", sorted((config_folder() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    assert read.num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_overrides_arrive_with_their_types():
    composed = compose(
        "train",
        [
            "learning_rate=3e-4",
            "fps=12",
            "resolution=[32,64]",
            "snr_gamma=5",
            "mixed_precision=no",
            "report_to=null",
            "use_ema=false",
            'validation_prompts=["a red star, on sand", "a moon"]',
            "model.keyframe_position=3",
            "diffusion.scheduler.prediction_type=v_prediction",
        ],
    )
    assert composed.learning_rate == 3e-4
    assert composed.fps == 12.0 and isinstance(composed.fps, float)
    assert list(composed.resolution) == [32, 64] == list(composed.data.resolution)
    assert composed.snr_gamma == 5.0
    assert composed.mixed_precision == "no"
    assert composed.report_to is None
    assert composed.use_ema is False
    assert list(composed.validation_prompts) == ["a red star, on sand", "a moon"]
    assert composed.model.keyframe_position == 3
    assert composed.diffusion.scheduler.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "prompt", ["a red star, moving: left = right", "it's {odd} [text] #1", "1e-4", "null hypothesis", ""]
)
def test_texts_are_taken_as_they_stand(prompt: str):
    assert compose("sample", [f"prompt={prompt}"]).prompt == prompt


def test_the_command_line_wins_over_an_experiment():
    assert compose("train", ["experiment=sprites_demo"]).max_train_steps != 7
    composed = compose("train", ["max_train_steps=7", "experiment=sprites_demo", "model=plain"])
    assert composed.max_train_steps == 7
    assert composed.model.fusion is None


def test_a_config_is_read_only_and_resolved():
    composed = compose("train", ["num_frames=5"])
    assert composed.data.num_frames == 5
    assert OmegaConf.to_container(composed, resolve=False) == OmegaConf.to_container(composed, resolve=True)
    with pytest.raises(ReadonlyConfigError):
        composed.seed = 1


def test_composition_leaves_no_folder_and_no_global_state(tmp_path: Path):
    code = (
        "from microcinema.config.compose import compose; compose('train'); compose('sample');"
        "from hydra.core.global_hydra import GlobalHydra; assert not GlobalHydra.instance().is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override, said",
    [
        ("learning_rat=1", ["learning_rat", "did you mean 'learning_rate'"]),
        ("fusion=add", ["fusion", "did you mean 'model.fusion'"]),
        ("model.fusoin=add", ["model.fusoin", "did you mean 'model.fusion'"]),
        ("model.unet.max_frame=3", ["did you mean 'model.unet.max_frames'"]),
        ("seed.x=3", ["seed.x"]),
        ("model.unet._target_=torch.nn.Linear", ["_target_"]),
        ("+new=3", ["+new"]),
        ("model=foo", ["model", "foo", "microcinema, plain"]),
        ("experiment=foo", ["foo", "sprites_microcinema"]),
        ("model.unet=3", ["model.unet", "model.unet.max_frames"]),
        ("seed=abc", ["seed", "'abc'", "integer"]),
        ("max_train_steps=1.5", ["max_train_steps", "1.5", "integer"]),
        ("max_train_steps=0", ["max_train_steps", "0", "greater than"]),
        ("num_frames=0", ["num_frames", "0", "greater than"]),
        ("use_ema=maybe", ["use_ema", "'maybe'", "bool"]),
        ("learning_rate=null", ["learning_rate", "None", "number"]),
        ("trainable_parameters=everything", ["trainable_parameters", "'everything'", "'temporal' or 'all'"]),
        ("text_dropout=1.5", ["text_dropout", "1.5", "1"]),
        ("model.unet.max_frames=abc", ["model.unet.max_frames", "'abc'", "integer"]),
        ("diffusion.noise_prior.strength=x", ["diffusion.noise_prior.strength", "'x'", "number"]),
        ("validation_prompts=a star", ["validation_prompts", "'a star'", "list"]),
        ("validation_prompts=[a, 'b]", ["validation_prompts", "YAML"]),
        ("data.num_frames=${nothing}", ["nothing"]),
        ("seed", ["seed", "key=value"]),
    ],
)
def test_a_wrong_override_is_named(override: str, said: list[str]):
    message = told("train", override)
    assert all(part in message for part in said), message


def test_the_nearest_key_is_one_of_the_same_command():
    assert "did you mean 'prompt'" in told("sample", "promt=a star")


def test_save_writes_what_compose_made(tmp_path: Path):
    composed = compose("sample", ["prompt=a star", "fps=8"])
    save(composed, tmp_path / "run" / "config.yaml")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == composed


# instantiate


def prior(**changes: typing.Any) -> dict[str, typing.Any]:
    return {"_target_": "microcinema.diffusion.noise_prior.NoisePrior", **changes}


def test_constructors_see_plain_values():
    node = OmegaConf.create(
        {
            "size": 3,
            "net": {"_target_": "torch.nn.Conv2d", "in_channels": "${size}", "out_channels": 2, "kernel_size": [1, 3]},
        }
    )
    made = instantiate(node.net)
    assert made.kernel_size == (1, 3) and type(made.kernel_size) is tuple
    assert made.in_channels == 3


def test_nested_nodes_are_made_first(sprites: Path):
    composed = compose("train", [f"data.root={sprites}"])
    loader = instantiate({"_target_": "torch.utils.data.DataLoader", "dataset": composed.data, "batch_size": 2})
    assert isinstance(loader.dataset, ClipDataset)
    assert next(iter(loader))["video"].shape == (2, 16, 3, 64, 64)


def test_a_class_method_is_a_target_and_takes_what_no_config_can_hold():
    composed = compose("train", ["model.fusion=spade", "model.inject=decoder"])
    net = instantiate(composed.model.unet, unet=tiny.unet(), keyframe_channels=4)
    assert net.config.fusion == "spade" and net.config.keyframe_channels == 4


@pytest.mark.parametrize(
    "node, said",
    [
        ({"_target_": "os.system", "command": "true"}, ["os.system", "not allowed"]),
        ({"_target_": "torch.os.system", "command": "true"}, ["torch.os.system"]),
        ({"_target_": "microcinema.diffusion.noise_prior.NoPrior"}, ["NoPrior", "spelling"]),
        ({"_target_": "microcinema.nothing.Here"}, ["microcinema.nothing.Here", "spelling"]),
        (prior(strenth=1.0), ["strenth", "strength"]),
        (prior(strength="much"), ["strength", "'much'", "number"]),
        (prior(strength=-1.0), ["strength", "-1.0"]),
        ({"_target_": "torch.nn.Linear", "in_features": 2}, ["torch.nn.Linear", "out_features"]),
    ],
)
def test_a_wrong_node_is_named(node: dict, said: list[str]):
    with pytest.raises(UserError) as error:
        instantiate(node)
    assert all(part in str(error.value) for part in said), error.value


def test_kwargs_do_not_swallow_a_typo():
    node = {"_target_": "diffusers.DDIMScheduler.from_config", "config": {}, "beta_strat": 0.1}
    with pytest.raises(UserError, match="beta_strat"):
        instantiate(node)


def test_configs_reach_their_classes(sprites: Path):
    composed = compose(
        "train", [f"data.root={sprites}", "num_frames=4", "diffusion=mixed", "diffusion.noise_prior.strength=2"]
    )
    data = instantiate(composed.data)
    assert isinstance(data, ClipDataset)
    assert data[0]["video"].shape == (4, 3, 64, 64)
    assert instantiate(composed.diffusion.noise_prior) == NoisePrior("mixed", 2.0)
