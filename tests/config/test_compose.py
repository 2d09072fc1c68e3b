"""Every file under configs/ composes and makes its objects; wrong keys and values are named in one line."""

import csv
import dataclasses
import shutil
import subprocess
import sys
import tarfile
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from webdataset.shardlists import expand_urls

from fixtures import tiny
from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, load, plain, save, schema_of, to_yaml
from microcinema.config.help import config_folder, documented_keys, file_of, group_defaults, group_options
from microcinema.config.instantiate import TARGETS, Component, components
from microcinema.data.clips import ClipDataset
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.pipelines.base_model import load_base
from microcinema.sprites.dataset import CSV_FILE, write_dataset
from microcinema.utils.errors import UserError

CONFIGS = [name for name, command in COMMANDS.items() if command.config is None]
GROUPS = {group: command for command in CONFIGS for group in group_defaults(command)}
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


def parts(node: typing.Any) -> typing.Iterator[Component]:
    """The components of a config, outermost only."""
    if isinstance(node, Component):
        yield node
    elif dataclasses.is_dataclass(node):
        for field in fields(node):
            yield from parts(getattr(node, field.name))


def test_every_file_of_configs_belongs_to_a_command_or_group():
    folders = {path.name for path in config_folder().iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "accelerate"}
    assert {path.stem for path in config_folder().glob("*.yaml")} == {file_of(command) for command in CONFIGS}
    assert all(command.config in (None, *CONFIGS) for command in COMMANDS.values())


@pytest.mark.parametrize("command", CONFIGS)
def test_defaults_and_schema_have_the_same_keys(command: str):
    """So that a new key is three edits: in the YAML, in the schema, and where it is used."""
    in_file = {key.partition(".")[0] for key, _, _ in documented_keys(command)} - {"experiment", "sweep"}
    assert in_file == {field.name for field in fields(schema_of(command))}


def stand_in(clips: typing.Mapping[str, typing.Any], sprites: Path) -> None:
    """Puts the clips of `sprites` where a data set's config says that its own are."""
    if "root" in clips:
        shutil.copytree(sprites, clips["root"])
        if "columns" in clips:
            with open(sprites / CSV_FILE, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            columns = {name: column for name, column in clips["columns"].items() if column}
            with open(clips["metadata"], "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*columns.values(), "page_dir"])
                for path, row in zip(sorted(sprites.rglob("*.mp4")), rows, strict=True):
                    values = {"id": path.stem, "file": path.relative_to(sprites), "caption": row["name"]}
                    writer.writerow([*(values[name] for name in columns), row["page_dir"]])
    elif "shards" in clips:
        for url in expand_urls(clips["shards"]):
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(url, "w") as tar:
                tar.add(sprites / CSV_FILE, "0.txt")


@pytest.mark.parametrize("command, group, option", OPTIONS)
def test_every_option_composes_and_builds_its_objects(
    command: str, group: str, option: str, sprites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for component in parts(compose(command, [f"{group}={option}"])):
        # The files as they are shipped: real clips stand where each says that they are.
        for data in (component, *component.arguments.get("parts", {}).values()):
            stand_in(data.arguments, sprites)
        loaded = {"unet": tiny.unet()} if "unet" in component.parameters() else {}
        # Known from the encoders that a run opens.
        loaded |= {"image_width": 24} if component.arguments.get("adapter") else {}
        assert component.build(**loaded) is not None


@pytest.mark.parametrize("option", group_options("base"))
def test_every_base_that_is_embedded_opens(option: str):
    base = compose("train", [f"base={option}"]).base
    if "/" in base.pretrained_model_name_or_path:
        pytest.skip("a repository of the hub")
    assert load_base(**vars(base)).unet.config["in_channels"] > 0


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
    assert composed.resolution == (32, 64) and composed.data.arguments["resolution"] == [32, 64]
    assert composed.snr_gamma == 5.0
    assert composed.mixed_precision == "no"
    assert composed.report_to is None
    assert composed.use_ema is False
    assert list(composed.validation_prompts) == ["a red star, on sand", "a moon"]
    assert composed.model.keyframe_position == 3
    assert composed.diffusion.scheduler.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "prompt",
    [
        "a red star, moving: left = right",
        "it's {odd} [text] #1",
        "1e-4",
        "null hypothesis",
        "",
        "${oc.env:HOME}",
        "for ${5}",
        "${seed} ${nothing} \\${x}",
    ],
)
def test_strings_are_literal(prompt: str, tmp_path: Path):
    composed = compose("sample", [f"prompt={prompt}"])
    assert composed.prompt == prompt
    save(composed, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", "sample") == composed


def test_strings_in_lists_and_open_groups_are_literal():
    composed = compose("train", ['validation_prompts=["for ${5}", "${oc.env:HOME}"]', "data.root=/${oc.env:HOME}/x"])
    assert composed.validation_prompts == ["for ${5}", "${oc.env:HOME}"]
    assert composed.data.arguments["root"] == "/${oc.env:HOME}/x"
    assert composed.data.arguments["metadata"] == "/${oc.env:HOME}/x/clips.csv"  # refers to root in the file


def test_the_command_line_wins_over_an_experiment():
    assert compose("train", ["experiment=sprites_demo"]).max_train_steps != 7
    assert compose("train", ["experiment=null"]) == compose("train")
    composed = compose("train", ["max_train_steps=7", "experiment=sprites_demo", "model=plain"])
    assert composed.max_train_steps == 7
    assert composed.model.appearance is None


def test_a_config_is_frozen_and_checked_again_when_changed():
    composed = compose("train", ["num_frames=5"])
    assert composed.data.arguments["num_frames"] == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        composed.seed = 1
    assert dataclasses.replace(composed, seed=3).seed == 3
    with pytest.raises(ValueError, match="max_train_steps"):
        dataclasses.replace(composed, max_train_steps=0)


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
        ("fusion=add", ["fusion", "did you mean 'model.appearance.fusion'"]),
        ("model.appearance.fusoin=add", ["fusoin", "did you mean 'model.appearance.fusion'"]),
        ("model.max_frame=3", ["did you mean 'model.max_frames'"]),
        ("seed.x=3", ["seed.x"]),
        ("data._target_=torch.nn.Linear", ["_target_"]),
        ("+new=3", ["+new"]),
        ("model=foo", ["model", "foo", "microcinema, microcinema_once, plain"]),
        ("experiment=foo", ["foo", "sprites_microcinema"]),
        ("model.temporal=3", ["model.temporal", "model.temporal.convolutions"]),
        ("model.adapter.mode=concat", ["model.adapter is null", "{mode: , num_tokens: }"]),
        ("model.appearance=3", ["model.appearance", "3", "dictionary"]),
        ("seed=abc", ["seed", "'abc'", "integer"]),
        ("max_train_steps=1.5", ["max_train_steps", "1.5", "integer"]),
        ("max_train_steps=0", ["max_train_steps", "0", "greater than"]),
        ("num_frames=0", ["num_frames", "0", "greater than"]),
        ("use_ema=maybe", ["use_ema", "'maybe'", "bool"]),
        ("learning_rate=null", ["learning_rate", "None", "number"]),
        ("trainable_parameters=everything", ["trainable_parameters", "'everything'", "'temporal' or 'all'"]),
        ("text_dropout=1.5", ["text_dropout", "1.5", "1"]),
        ("model.max_frames=abc", ["model.max_frames", "'abc'", "integer"]),
        ("diffusion.noise_prior.strength=x", ["diffusion.noise_prior.strength", "'x'", "number"]),
        ("validation_prompts=a star", ["validation_prompts", "'a star'", "list"]),
        ("validation_prompts=[a, 'b]", ["validation_prompts", "YAML"]),
        ("num_frames=${nothing}", ["num_frames", "${nothing}", "integer"]),
        ("output_dir=", ["output_dir", "''", "file or folder"]),
        ("model.flow=dis", ["did you mean 'model.flow_model'"]),
        ("data=null", ["data", "'null'", "sprites, webvid"]),
        ("seed", ["seed", "key=value"]),
    ],
)
def test_a_wrong_override_is_named(override: str, said: list[str]):
    message = told("train", override)
    assert all(part in message for part in said), message


def test_the_nearest_key_is_one_of_the_same_command():
    assert "did you mean 'prompt'" in told("sample", "promt=a star")


def test_the_evaluation_that_is_meant_names_its_wrong_value():
    for option in ("sprites", "ucf101"):
        message = told("evaluate", f"evaluation={option}", "evaluation.guidance_scale=-1")
        assert message.startswith("evaluation.guidance_scale is -1")


def test_what_is_saved_is_loaded(tmp_path: Path):
    composed = compose("train", ["data=joint", "experiment=factorized_dreamer_sd15", "timestep_logit_normal=[0, 1]"])
    save(composed, tmp_path / "run" / "config.yaml")
    assert load(tmp_path / "run" / "config.yaml", "train") == composed
    assert yaml.safe_load(to_yaml(composed))["data"]["_target_"] == composed.data.target


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data": {"_target_": "torch.hub.load", "repo_or_dir": "x"}}, "_target_ 'torch.hub.load' is not allowed"),
        ({"train": "all"}, "unknown key 'train'"),
        ({"model": {}}, "the key 'model.max_frames' is missing"),
        ({"seed": "${oc.env:HOME}"}, "seed is '${oc.env:HOME}', but"),
    ],
)
def test_a_saved_config_is_checked(tmp_path: Path, change: dict, said: str):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(compose("train")) | change))
    with pytest.raises(UserError) as error:
        load(tmp_path / "config.yaml", "train")
    assert said in str(error.value) and "config.yaml" in str(error.value)


# components


def prior(**changes: typing.Any) -> dict[str, typing.Any]:
    return {"_target_": "microcinema.diffusion.noise_prior.NoisePrior", **changes}


def test_arguments_are_converted_without_loss():
    made = components(prior(kind="mixed", strength=1)).build()
    assert made == NoisePrior("mixed", 1.0) and type(made.strength) is float


def test_components_within_components_are_built_first(sprites: Path):
    where = [f"data.parts.{name}.{key}={value}" for name in ("videos", "images") for key, value in
             {"root": sprites, "metadata": sprites / CSV_FILE}.items()]  # fmt: skip
    columns = ["data.parts.images.columns.file=null", "data.parts.images.columns.id=videoid"]
    columns += ["data.parts.images.columns.caption=name"]
    made = compose("train", ["data=joint", *where, *columns]).data.build()
    assert all(isinstance(part, ClipDataset) for part in made.parts.values())


def test_a_part_of_the_network_is_switched_on_and_off_as_a_whole():
    assert compose("train", ["model.appearance=null"]).model.appearance is None
    part = "model.appearance={network: reference_net, inject: decoder, fusion: add}"
    appearance = compose("train", ["model=plain", part]).model.appearance
    assert (appearance.network, appearance.inject, appearance.fusion) == ("reference_net", "decoder", "add")
    assert compose("train", ["model=factorized_dreamer", "model.pixels.scales=[1,2]"]).model.pixels.scales == (1, 2)


@pytest.mark.parametrize(
    "node, said",
    [
        ({"_target_": "os.system", "command": "true"}, ["os.system", "not allowed"]),
        ({"_target_": "torch.os.system", "command": "true"}, ["torch.os.system", "not allowed"]),
        ({"_target_": "torch.hub.load", "repo_or_dir": "x"}, ["torch.hub.load", "not allowed"]),
        ({"_target_": "microcinema.data.clips.os.system"}, ["not allowed"]),
        (prior(strenth=1.0), ["strenth", "strength"]),
        (prior(strength="much"), ["strength", "'much'", "number"]),
        (prior(strength=-1.0), ["strength", "-1.0"]),
        ({"_target_": TARGETS[0], "root": "x"}, ["ClipDataset", "metadata"]),
    ],
)
def test_a_wrong_node_is_named(node: dict, said: list[str]):
    with pytest.raises(UserError) as error:
        components(node).build()
    assert all(part in str(error.value) for part in said), error.value


def test_every_target_that_is_allowed_is_there():
    assert all(callable(Component(target, {})._callable()) for target in TARGETS)


def test_configs_reach_their_classes(sprites: Path):
    composed = compose(
        "train", [f"data.root={sprites}", "num_frames=4", "diffusion=mixed", "diffusion.noise_prior.strength=2"]
    )
    data = composed.data.build()
    assert isinstance(data, ClipDataset)
    assert data[0]["video"].shape == (4, 3, 64, 64)
    assert composed.diffusion.noise_prior.build() == NoisePrior("mixed", 2.0)
