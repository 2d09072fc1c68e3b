"""The recipe of the embedded models, with next to no data and steps: every stage writes what the next one reads, and is skipped once done."""

import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.motion_following import started_earlier
from microcinema.pipelines.loading import resolve_model_path
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites import scene
from microcinema.sprites.judge import SpriteJudge
from scripts.recipes import train_assets

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_recipe_makes_a_stable_diffusion_and_a_judge(tmp_path):
    counts = ["train_clips=16", "clip_steps=2", "vae_steps=2", "unet_steps=2", "classifier_steps=2"]
    places = [f"work={tmp_path / 'work'}", f"assets={tmp_path / 'assets'}"]
    command = [
        sys.executable,
        "-m",
        "scripts.recipes.train_assets",
        *places,
        *counts,
        "stages=[clip,vae,unet,classifier]",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=ROOT)
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "assets" / "sprites-base", torch_dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    assert base.vae.config.scaling_factor != 0.18215  # diffusers' default; the VAE's own must have been stored
    image = base("a large red star on sand", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert len(base.tokenizer("a large red star rotating slowly counterclockwise on sand").input_ids) == 9 + 2
    names, features = SpriteJudge.load(tmp_path / "assets" / "sprites-classifier")(
        (image * 255).astype("uint8")[None, None].repeat(16, 1)
    )
    assert set(names[0]) >= {"shape", "colour", "background"} and features.shape == (1, 128)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "assets").rglob("*.safetensors")}
    subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=ROOT)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "assets").rglob("*.safetensors")}


def test_a_caption_with_the_motion_is_drawn_at_the_key_frame_and_one_without_at_its_named_size():
    sprites = [scene.sample_attributes(0, index) for index in range(40)]
    clip, frame = np.arange(40), np.arange(40) % 15 + 1
    any_frame = np.arange(40) % 2 == 0
    found = train_assets.Pool(np.empty(0), np.empty(0), sprites).frames_to_draw(clip, frame, any_frame, keyframe=8)
    changes = np.array([sprite.motion in (*scene.SCALINGS, *scene.ROTATIONS) for sprite in sprites])
    assert changes[any_frame].any() and changes[~any_frame].any()
    assert found[~any_frame].tolist() == [8] * 20
    assert not found[any_frame & changes].any()
    assert np.array_equal(found[any_frame & ~changes], frame[any_frame & ~changes])


def test_an_object_drawn_as_at_the_start_costs_even_a_perfect_centre_frame_model_right_clips():
    """Drawn upright in the middle of a turn, it would have to begin turned back, as no real clip does."""
    sprites = [scene.sample_attributes(0, index, rotation_weight=100) for index in range(24)]
    turning = [sprite for sprite in sprites if sprite.motion in scene.ROTATIONS and sprite.speed == "quickly"]
    judge, right = SpriteJudge.load("sprites-classifier"), []
    for seconds in (0.0, 1.0):
        clips = np.stack([scene.render(started_earlier(sprite, seconds)).frames for sprite in turning])
        names, _ = judge(clips)
        right.append(np.mean([name["shape"] == sprite.shape for name, sprite in zip(names, turning, strict=True)]))
    assert len(turning) > 5 and right[0] == 1 and right[1] < 0.9


def test_the_authors_network_starts_from_the_features_of_the_one_that_runs_once(tmp_path):
    shutil.copytree(resolve_model_path("sprites-microcinema"), tmp_path / train_assets.ONCE)
    assets = Path(resolve_model_path("sprites-base")).parent
    recipe = train_assets.Recipe(str(tmp_path), str(assets), train_clips=2, microcinema_start_steps=2)
    train_assets.train_start(recipe, None, tmp_path / train_assets.START)
    start, once = (load_pipeline(tmp_path / name) for name in (train_assets.START, train_assets.ONCE))
    assert start.unet.options.appearance.network == "appear_net" and start.keyframe_position == "center"
    assert start.unet.injections["0"].to_sum.weight.abs().max() > 0
    kept, trained = "down_blocks.0.resnets.0.conv1.weight", "up_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(start.unet.get_parameter(kept), once.unet.get_parameter(kept))
    assert not torch.equal(start.unet.get_parameter(trained), once.unet.get_parameter(trained))
    assert "features" in (tmp_path / "microcinema_start.log").read_text()


def test_the_card_tells_what_was_measured_of_both_video_models():
    def result(object_share: float) -> dict:
        measure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
        model = defaultdict(lambda: measure, object={**measure, "value": object_share})
        part = {"n": 10, "model": model, "real": defaultdict(lambda: measure), "frechet": {"model": 7.0, "real": 3.0}}
        told = {"seed": 0, "num_inference_steps": 25, "guidance_scale": 2.0}
        clips = [
            {"asked": {"motion": motion}, "right": {"motion": right}}
            for motion, right in (("clockwise", True), ("clockwise", False), ("counterclockwise", True), ("left", True))
        ]
        return {"parts": {"seen": part}, "protocol": {"identifier": "sprites-1"}, "model": told, "clips": clips}

    names = train_assets.VIDEO_MODELS
    trained = {
        "max_train_steps": 77,
        "learning_rate": 0.002,
        "timestep_logit_normal": [0.5, 3.0],
        "trainable_unet_layers": ["a", "b"],
    }
    card = train_assets.render_card(
        train_assets.Recipe(),
        {"sprites-base/unet": 1234567},
        {
            "results": dict(zip(names, map(result, (0.915, 0.825)), strict=True)),
            "following": {"model": {"motion": {"value": 0.875, "low": 0.8, "high": 0.9, "n": 99}}, "keyframes": 9},
            "flow": {
                "clips": 40,
                "t=20": {"predict_net": 0.01, "zero": 0.04},
                "t=300": {"predict_net": 0.03, "zero": 0.04},
            },
            "videos": dict.fromkeys(names, SimpleNamespace(**trained)),
        },
    )
    assert "| `sprites-base/unet` | 1,234,567 |" in card and "{" not in card
    assert "followed in 2 (`sprites-microcinema`) and 2 (`sprites-factorized-dreamer`) of the 3 clips\nbelow" in card
    assert card.index("91.5%") < card.index("82.5%") < card.index("87.5% (80.0 to 90.0) of 99 videos of 9 key frames")
    assert "0.0100 of 0.0400 (0.25) at t=20, 0.0300 of 0.0400 (0.75) at t=300." in card
    assert "(`experiment=sprites_factorized_dreamer`) | 77 | 8 clips |" in card
    assert "except for the last ones\n(`a`, `b`), which were trained further" in card
    assert "a learning rate of 0.002" in card and "`timestep_logit_normal` [0.5, 3.0]" in card
