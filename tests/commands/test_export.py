"""The command `export` on a real run of the command `train`: whose weights it writes, how they open again, what the card says."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, image, sample
from fixtures.tiny_training import reset_accelerator, weights
from microcinema.commands import cli, export
from microcinema.config.compose import compose, load, save
from microcinema.pipelines.base_model import BASE_COMPONENTS
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites.dataset import write_dataset
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of four steps with checkpoints at 2 and 4, averages that lag behind, and the frame rate of its clips."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "clips", num_videos=3, seed=0, progress=False)
    tiny.base_folder(folder / "base", "sd21")
    overrides = [
        "base=sd21",
        f"base.pretrained_model_name_or_path={folder / 'base'}",
        f"data.root={folder / 'clips'}",
        f"output_dir={folder / 'run'}",
        f"resolution={tiny.SIZE}",
        "num_frames=4",
        "fps=null",
        "max_train_steps=4",
        "train_batch_size=2",
        "learning_rate=1e-2",
        "lr_warmup_steps=0",
        "ema_decay=0.5",
        "checkpointing_steps=2",
        "report_to=null",
        "dataloader_num_workers=0",
        "diffusion.noise_prior.strength=0.05",
        "trainable_unet_layers=[up_blocks.1, conv_out]",
        "model.motion_score=true",
    ]
    reset_accelerator()
    assert cli.main(["train", *overrides]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, to damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "sprites video"
    run_export(trained / "checkpoint-2", folder)
    return folder


def run_export(checkpoint, folder, *overrides) -> Path:
    assert cli.main(["export", f"checkpoint={checkpoint}", f"output_dir={folder}", *overrides]) == 0
    return Path(folder)


def parameters(pipeline) -> dict[str, torch.Tensor]:
    return {f"unet.{name}": value for name, value in pipeline.unet.named_parameters()}


def kept(checkpoint, averaged: bool) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint's files, with or without the averages in their place."""
    found = weights(checkpoint)
    own = {key.replace("/diffusion_pytorch_model.safetensors:", "."): value for key, value in found.items()}
    averages = {key: own.pop(key) for key in list(own) if key.startswith("ema.safetensors:")}
    return {**own, **({key.partition(":")[2]: value for key, value in averages.items()} if averaged else {})}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without(config: Path, key: str) -> str:
    """The text of a config that lacks a key, as a run of an earlier version has written it."""
    return yaml.safe_dump({name: value for name, value in yaml.safe_load(config.read_text()).items() if name != key})


def frames(pipeline) -> np.ndarray:
    return sample(pipeline, PROMPTS[0], image())


# Whose weights


def test_a_checkpoint_is_exported_with_its_averages_or_without(trained, exported, tmp_path):
    checkpoint = trained / "checkpoint-2"
    assert not same(kept(checkpoint, averaged=True), kept(checkpoint, averaged=False))
    assert same(parameters(load_pipeline(exported)), kept(checkpoint, averaged=True))
    plain = run_export(checkpoint, tmp_path / "plain", "use_ema=false")
    assert same(parameters(load_pipeline(plain)), kept(checkpoint, averaged=False))


def test_a_finished_run_is_its_last_checkpoint(trained, tmp_path):
    whole, last = (run_export(path, tmp_path / path.name) for path in (trained, trained / "checkpoint-4"))
    assert same(parameters(load_pipeline(whole)), parameters(load_pipeline(last)))
    assert np.array_equal(frames(load_pipeline(whole)), frames(load_pipeline(last)))


def test_motion_can_be_asked_for_as_of_the_finished_run(trained, exported):
    finished, checkpoint = (load_pipeline(folder) for folder in (trained, exported))
    assert len(finished.config["motion_quantiles"]) == 101
    assert finished.motion_score(0.5) == checkpoint.motion_score(0.5) > 0


def test_the_settings_are_those_of_the_run(trained, exported):
    run, exported_config = (load_pipeline(folder).config for folder in (trained, exported))
    assert {key: value for key, value in run.items() if key != "_name_or_path"} == {
        key: value for key, value in exported_config.items() if key != "_name_or_path"
    }
    assert (exported_config["fps"], exported_config["height"], exported_config["num_frames"]) == (8.0, tiny.SIZE, 4)
    assert exported_config["noise_prior_strength"] == 0.05
    assert exported_config["training_schedule"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_in_the_type_asked_for(trained, tmp_path, dtype):
    folder = run_export(trained / "checkpoint-2", tmp_path / "half", f"torch_dtype={dtype}")
    assert {str(tensor.dtype) for tensor in weights(folder).values() if tensor.is_floating_point()} == {
        f"torch.{dtype}"
    }
    wanted = kept(trained / "checkpoint-2", averaged=True)
    found = parameters(load_pipeline(folder))
    assert same({key: value.to(getattr(torch, dtype)).float() for key, value in wanted.items()}, found)


def test_an_earlier_export_is_replaced(trained, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "again")
    run_export(trained / "checkpoint-4", folder, "with_base=false")
    assert not (folder / "vae").exists()
    assert same(parameters(load_pipeline(folder)), kept(trained / "checkpoint-4", averaged=True))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


# How it opens again


OPEN_BY_DIFFUSERS = """
import sys
import numpy as np
from fixtures.tiny_sampling import PROMPTS, image, sample
import microcinema.pipelines
from diffusers import DiffusionPipeline

for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == "ImageToVideoPipeline"
    np.save(f"{folder}.npy", sample(pipeline, PROMPTS[0], image()))
"""


@pytest.mark.slow
def test_however_it_is_opened_it_gives_the_frames_of_the_pipeline_that_was_saved(trained, tmp_path):
    checkpoint = trained / "checkpoint-2"
    in_memory = export.open_checkpoint(checkpoint, load(trained / "config.yaml", "train"), use_ema=True)
    wanted = frames(in_memory)
    whole = run_export(checkpoint, tmp_path / "whole")
    light = run_export(checkpoint, tmp_path / "light", "with_base=false")
    assert {path.name for path in whole.iterdir()} - {path.name for path in light.iterdir()} == set(BASE_COMPONENTS)
    for folder in (whole, light):
        assert np.array_equal(frames(load_pipeline(folder)), wanted)
        assert np.array_equal(frames(ImageToVideoPipeline.from_pretrained(folder)), wanted)
    command = [sys.executable, "-c", OPEN_BY_DIFFUSERS, str(whole), str(light)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr and "will be ignored" not in done.stderr
    for folder in (whole, light):
        # Another process may choose other kernels, whose last bits differ.
        np.testing.assert_allclose(np.load(f"{folder}.npy"), wanted, atol=1e-5)


def test_a_light_folder_without_its_base_says_so(trained, tmp_path):
    folder = run_export(trained / "checkpoint-2", tmp_path / "light", "with_base=false")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "base": None}))
    for open_it in (load_pipeline, ImageToVideoPipeline.from_pretrained):
        with pytest.raises(UserError, match="no vae and text encoder, and no base"):
            open_it(folder)


# What the card says


def test_the_card_says_where_the_weights_come_from(trained, exported):
    card = (exported / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["microcinema", "text-to-video", "image-to-video"],
    }
    assert "license: fill in" in card and "Licence: *fill in" in card
    files = sorted(path for path in exported.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"| `{file.relative_to(exported)}` | `{digest}` |" in card
    for line in (
        "# sprites video",
        "generates 4 frames of 32x32 pixels at 8 frames per second",
        "is `base`",
        "| starts from | `base` |",
        "| trained layers | temporal and injection layers, up_blocks.1, conv_out; the other 2D layers are those that it starts from |",
        "| steps | 2 |",
        "| clips per step | 2 |",
        "| data | `ClipDataset`, see the config below |",
        "| appearance branch | ",
        "moving averages, decay 0.5; stored as float32",
        "| noise prior | appearance, strength 0.05, gamma 0.02 |",
        "| noise schedule: prediction_type | v_prediction |",
        "arXiv:2311.18829",
    ):
        assert line in card, line
    assert str(trained.parent) not in card and str(exported.parent) not in card
    whole = yaml.safe_load(re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)[1])
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert whole["output_dir"] == "run" and whole["data"]["metadata"] == "clips.csv"
    for config in (whole, saved):
        del config["output_dir"], config["data"]["root"], config["data"]["metadata"]
        del config["base"]["pretrained_model_name_or_path"]
    assert whole == saved


def test_what_the_card_tells_to_run_runs(exported, monkeypatch):
    card = (exported / "README.md").read_text()
    monkeypatch.chdir(exported.parent)
    image().save("keyframe.png")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        namespace = {}
        exec(block, namespace)
        assert len(namespace["frames"]) == 4
    line = re.search(r"^microcinema (sample pipeline=.*)$", card, re.MULTILINE)
    command, *overrides = shlex.split(line[1])
    assert Path(compose(command, overrides).pipeline) == Path(exported.name)


@pytest.mark.parametrize(
    "base, header, text",
    [
        ("sprites-base", {"license": "apache-2.0"}, "its licence is Apache-2.0"),
        ("owner/name", {"base_model": "owner/name"}, "revision `v2`, variant `fp16`"),
    ],
)
def test_the_card_knows_the_licence_of_an_embedded_base_and_links_one_of_the_hub(trained, tmp_path, base, header, text):
    pipeline = load_pipeline(trained)
    pipeline.register_to_config(
        base_revision="v2" if "/" in base else None, base_variant="fp16" if "/" in base else None
    )
    settings = with_base(load(trained / "config.yaml", "train"), base)
    card = export.write_card(Path("video"), tmp_path, pipeline, settings, None, averaged=False)
    found = yaml.safe_load(card.split("---")[1])
    assert {key: found[key] for key in found.keys() & {"license", "base_model"}} == header
    assert text in card and "as trained, not averaged" in card


# Bad input


def refused(capsys, *overrides) -> str:
    capsys.readouterr()
    assert cli.main(["export", *overrides]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1, shown
    return shown


def drop(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[next(key for key in tensors if name in key)]
    save_file({**tensors, "surplus": torch.zeros(1)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda run: drop(run / "checkpoint-2/unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
            "conv_in.bias.*surplus",
        ),
        (
            lambda run: drop(run / "checkpoint-2/ema.safetensors", "taps.weight"),
            "taps.weight.*surplus",
        ),
        (lambda run: (run / "checkpoint-2/ema.safetensors").write_bytes(b"torn"), "ema.safetensors' cannot be read"),
        (lambda run: (run / "checkpoint-2/ema.safetensors").unlink(), "no moving averages; set use_ema=false"),
        (lambda run: (run / "checkpoint-2/training_state.json").write_text("{"), "checkpoint-2' cannot be read"),
        (lambda run: shutil.rmtree(run / "checkpoint-2/unet"), "cannot load a network.*checkpoint-2/unet"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml' is not there"),
        (lambda run: (run / "config.yaml").write_text("a: [b"), "config.yaml' cannot be read"),
        (
            lambda run: (run / "config.yaml").write_text(without(run / "config.yaml", "sampling")),
            "config.yaml' is no config of train: the key 'sampling' is missing",
        ),
        (
            lambda run: (run / "config.yaml").write_text("prompt: a star"),
            "config.yaml' is no config of train: the key 'data' is missing",
        ),
    ],
)
def test_a_broken_checkpoint_is_named_in_one_line(run, tmp_path, capsys, damage, said):
    damage(run)
    assert re.search(said, refused(capsys, f"checkpoint={run / 'checkpoint-2'}", f"output_dir={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_told_what_would_be(run, tmp_path, capsys):
    assert "give checkpoint=" in refused(capsys)
    assert "gone' is not there" in refused(capsys, f"checkpoint={tmp_path / 'gone'}")
    assert "config.yaml' is not there" in refused(capsys, f"checkpoint={tmp_path}")
    (run / "model_index.json").unlink()
    shown = refused(capsys, f"checkpoint={run}", f"output_dir={tmp_path / 'out'}")
    assert f"neither a checkpoint nor a finished run; export a checkpoint, such as '{run / 'checkpoint-4'}'" in shown


def test_a_finished_run_has_one_kind_of_weights(run, tmp_path, capsys):
    arguments = [f"checkpoint={run}", f"output_dir={tmp_path / 'out'}"]
    shown = refused(capsys, *arguments, "use_ema=false")
    assert "holds the averaged weights" in shown and str(run / "checkpoint-4") in shown
    save(replace(load(run / "config.yaml", "train"), use_ema=False), run / "config.yaml")
    assert "trained without moving averages; set use_ema=false" in refused(capsys, *arguments)
    assert run_export(run, tmp_path / "out", "use_ema=false").is_dir()


def test_a_folder_with_anything_else_in_it_is_left_alone(trained, exported, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "me.png").write_bytes(b"precious")
    cloned = shutil.copytree(exported, tmp_path / "cloned")
    (cloned / ".git").mkdir()
    for folder, thing in ((pictures, "me.png"), (cloned, ".git"), (trained, "checkpoint-2")):
        shown = refused(capsys, f"checkpoint={trained / 'checkpoint-2'}", f"output_dir={folder}")
        assert f"'{folder}' is there and holds {thing}" in shown
    shown = refused(capsys, f"checkpoint={trained / 'checkpoint-2'}", f"output_dir={pictures / 'me.png'}")
    assert "me.png' (File exists); choose another one" in shown
    assert (pictures / "me.png").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "target, arguments",
    [("torch.hub.load", {"repo_or_dir": "x", "model": "y"}), ("os.system", {"command": "touch written"})],
)
def test_a_config_of_a_run_that_names_other_code_is_refused(run, tmp_path, monkeypatch, capsys, target, arguments):
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["diffusion"]["noise_prior"] = {"_target_": target, **arguments}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    shown = refused(capsys, f"checkpoint={run / 'checkpoint-2'}", f"output_dir={tmp_path / 'out'}")
    assert f"_target_ '{target}' is not allowed" in shown and "config.yaml" in shown
    assert not (tmp_path / "out").exists() and not (tmp_path / "written").exists()


def with_base(config, name: str):
    return replace(config, base=replace(config.base, pretrained_model_name_or_path=str(name)))


def test_a_base_that_is_gone_is_named(run, tmp_path, capsys):
    save(with_base(load(run / "config.yaml", "train"), "/gone"), run / "config.yaml")
    assert "model '/gone' is neither" in refused(
        capsys, f"checkpoint={run / 'checkpoint-2'}", f"output_dir={tmp_path}/out"
    )
