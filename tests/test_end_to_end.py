"""The real commands one after another, on models in the layouts of Stable Diffusion 1.5, 2.1 and XL: train, export, sample."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from fixtures import tiny
from fixtures.tiny_training import reset_accelerator
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.data.video_reader import probe
from microcinema.pipelines.saving import load_pipeline
from microcinema.utils.hashing import hash_weights

PROMPT = "a red star moving to the left on sand"
STEPS = "num_inference_steps=2"


def call(command: str, *overrides: str) -> None:
    reset_accelerator()
    assert cli.main([command, *overrides]) == 0


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    call("prepare", "sprites", f"output_dir={folder}", "num_videos=3")
    return folder


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def exported(request: Any, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A video model on such a base, as `export` writes it after a few steps of `train`: 1.5 from the hub's cache, 2.1 from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.base_folder(folder / "base", request.param)
    overrides = [f"base={request.param}"]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        context.setattr(constants, "HF_HUB_OFFLINE", True)
        if request.param == "sd15":
            name = compose("train", overrides).base.pretrained_model_name_or_path
            tiny.into_hub_cache(base, folder / "hub", name)
        else:
            overrides.append(f"base.pretrained_model_name_or_path={base}")
        small = [f"resolution={tiny.SIZE}", "num_frames=4", "train_batch_size=2", "max_train_steps=2"]
        small += ["lr_warmup_steps=0", "learning_rate=1e-3", "dataloader_num_workers=0", "report_to=null"]
        call("train", *overrides, *small, f"data.root={clips}", f"output_dir={folder / 'run'}")
        call("export", f"checkpoint={folder / 'run/checkpoint-2'}", f"output_dir={folder / 'video'}")
        yield folder / "video"


def record_of(folder: Path) -> dict[str, Any]:
    (path,) = (path for path in folder.glob("*.json") if not path.name.endswith("_keyframe.json"))
    return json.loads(path.read_text())


def test_a_trained_model_samples_from_its_prompt(exported: Path, tmp_path: Path):
    call("sample", f"pipeline={exported}", f"prompt={PROMPT}", STEPS, f"output_dir={tmp_path}")
    record = record_of(tmp_path)
    video = probe(tmp_path / record["files"]["video"])
    assert (video.num_frames, video.height, video.width) == (4, tiny.SIZE, tiny.SIZE)
    assert record["weights_sha256"]["unet"] == hash_weights(load_pipeline(exported).unet)
    keyframe = record["keyframe"]
    assert keyframe["original_size"] == {"height": tiny.SIZE, "width": tiny.SIZE}
    predicts = "epsilon" if "sd15" in str(exported) else "v_prediction"
    assert record["pipeline"]["training_schedule"]["prediction_type"] == predicts


def test_key_frames_of_another_family_come_to_life(exported: Path, tmp_path: Path):
    """Stage 1 with two text encoders, another VAE and twice the size."""
    xl = tiny.sdxl_folder(tmp_path / "xl")
    arguments = [f"pipeline={exported}", f"prompt={PROMPT}", STEPS, f"keyframe.pretrained_model_name_or_path={xl}"]
    call("sample", *arguments, f"output_dir={tmp_path / 'out'}")
    record = record_of(tmp_path / "out")
    keyframe = record["keyframe"]
    assert keyframe["class"] == "StableDiffusionXLPipeline"
    assert keyframe["original_size"] == {"height": 2 * tiny.SIZE, "width": 2 * tiny.SIZE}
    assert keyframe["size"] == {"height": tiny.SIZE, "width": tiny.SIZE}
    with Image.open(tmp_path / "out" / record["files"]["keyframe"]) as image:
        assert image.size == (tiny.SIZE, tiny.SIZE)
        pixels = np.asarray(image)
    pipeline = load_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(PROMPT, pixels, num_inference_steps=2, output_type="np")
    assert again.frames.shape == (1, 4, tiny.SIZE, tiny.SIZE, 3)
    assert np.array_equal(np.asarray(again.keyframes[0]), pixels)
