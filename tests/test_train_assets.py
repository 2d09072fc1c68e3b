"""The recipe of the embedded models, with next to no data and steps: every stage writes what the next one reads, and is skipped once done."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from microcinema.evaluation.detectors import SpriteJudge

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_assets.py"


@pytest.mark.slow
def test_the_recipe_makes_a_stable_diffusion_and_a_judge(tmp_path):
    counts = ["train_clips=16", "clip_steps=2", "vae_steps=2", "unet_steps=2", "classifier_steps=2"]
    places = [f"work={tmp_path / 'work'}", f"assets={tmp_path / 'assets'}"]
    command = [sys.executable, str(SCRIPT), *places, *counts, "stages=[clip,vae,unet,classifier]"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
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
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "assets").rglob("*.safetensors")}
