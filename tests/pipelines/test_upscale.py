"""Stage 3: upscalers of diffusers over the frames of a video, from one noise; its folder, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import tiny
from fixtures.tiny_training import reset_accelerator
from microcinema.commands import cli
from microcinema.config.sampling import UpscaleSettings
from microcinema.data.video_reader import probe
from microcinema.diffusion.rng import generator
from microcinema.pipelines.saving import save_pipeline
from microcinema.pipelines.upscale import VideoUpscaler
from microcinema.utils.errors import UserError

STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, make in (("x4", tiny.upscaler), ("latent", tiny.latent_upscaler)):
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name]).save_pretrained(made[name])
    return made


def open_upscaler(folder, **changes):
    upscaler = VideoUpscaler.from_pretrained(UpscaleSettings(str(folder), **STEPS, **changes))
    upscaler.pipeline.set_progress_bar_config(disable=True)
    return upscaler


def video(frames=3, size=16):
    return np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind, scale", [("x4", 4), ("latent", 2)])
def test_all_frames_are_made_of_one_noise(folders, kind, scale):
    """Equal frames become equal ones, also in other chunks; noise of its own would tell them apart."""
    upscaler, still = open_upscaler(folders[kind], chunk_size=3), np.repeat(video(1), 3, axis=0)
    large = upscaler(still, "a red star", lambda: generator(0, 0))
    assert large.shape == (3, 16 * scale, 16 * scale, 3) and upscaler.scale == scale
    assert np.array_equal(large[0], large[1]) and np.array_equal(large[0], large[2])
    seeds = iter(range(3))
    apart = upscaler(still, "a red star", lambda: generator(0, next(seeds)))
    assert np.abs(apart[0].astype(int) - apart[1]).mean() > 1
    one_by_one = open_upscaler(folders[kind])(still, "a red star", lambda: generator(0, 0))
    assert np.abs(large.astype(int) - one_by_one).max() <= 1


def test_it_is_the_pipeline_of_diffusers_on_each_frame(folders):
    frames, upscaler = video(2), open_upscaler(folders["x4"], noise_level=10)
    large = upscaler(frames, "a red star", lambda: generator(0, 0), "sand")
    for frame, expected in zip(frames, large, strict=True):
        arguments = {"prompt": "a red star", "negative_prompt": "sand", "noise_level": 10, **STEPS}
        image = upscaler.pipeline(image=Image.fromarray(frame), generator=generator(0, 0), **arguments).images[0]
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    save_pipeline(tiny.video_pipeline(folder / "base"), folder / "pipeline")
    return folder / "pipeline"


def run_sample(pipeline, upscaler, output, *changes):
    reset_accelerator()
    keys = [f"pipeline={pipeline}", "prompt=a red star", "num_inference_steps=1", f"output_dir={output}"]
    keys += [f"upscale.pretrained_model_name_or_path={upscaler}", "upscale.num_inference_steps=1"]
    assert cli.main(["sample", *keys, *changes]) == 0
    return next((output / "upscaled").glob("*.mp4"))


def test_sample_upscales_resumes_and_puts_the_key_frame_in_its_place(folders, pipeline, tmp_path):
    """Twice: the second run makes nothing; another setting makes the large videos again, and not the small ones."""
    picture = np.random.default_rng(1).integers(0, 256, (4 * tiny.SIZE, 4 * tiny.SIZE, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "large.png")
    run, image = (pipeline, folders["x4"], tmp_path / "out"), f"image={tmp_path / 'large.png'}"
    file = run_sample(*run, image)
    shape = probe(file)
    assert (shape.num_frames, shape.height, shape.width) == (4, 4 * tiny.SIZE, 4 * tiny.SIZE)
    small = tmp_path / "out" / file.name
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["upscale"]["class"] == "StableDiffusionUpscalePipeline"
    assert {"unet", "vae", "text_encoder"} <= record["weights_sha256"].keys() and record["sha256_of_video"]
    assert record["full_size_keyframe"]["original_size"] == {"height": 4 * tiny.SIZE, "width": 4 * tiny.SIZE}
    shown = np.asarray(Image.open(file.with_name(f"{file.stem}_keyframe.png")))
    assert np.array_equal(shown, picture)
    times = [path.stat().st_mtime_ns for path in (file, small)]
    run_sample(*run, image)
    assert [path.stat().st_mtime_ns for path in (file, small)] == times
    run_sample(*run, image, "upscale.noise_level=3")
    assert (file.stat().st_mtime_ns > times[0], small.stat().st_mtime_ns) == (True, times[1])
    Image.fromarray(picture[..., 0] // 128 * 255).save(tmp_path / "mask.png")
    run_sample(*run, image, f"mask={tmp_path / 'mask.png'}")  # the picture is not what the video shows
    assert json.loads(file.with_suffix(".json").read_text())["full_size_keyframe"] is None
    Image.fromarray(picture[:-1]).save(tmp_path / "small.png")  # one row less than the upscaled video
    run_sample(*run, f"image={tmp_path / 'small.png'}")
    assert json.loads(file.with_suffix(".json").read_text())["full_size_keyframe"] is None
    assert not np.array_equal(np.asarray(Image.open(file.with_name(f"{file.stem}_keyframe.png"))), picture)


@pytest.mark.slow
def test_videos_without_uncompressed_frames_are_made_again_for_it(folders, pipeline, tmp_path):
    reset_accelerator()
    keys = [f"pipeline={pipeline}", "prompt=a red star", "num_inference_steps=1", f"output_dir={tmp_path / 'out'}"]
    assert cli.main(["sample", *keys]) == 0
    assert not [*(tmp_path / "out").glob("*.npz")] and not (tmp_path / "out/upscaled").exists()
    assert run_sample(pipeline, folders["x4"], tmp_path / "out").is_file()


def test_what_is_no_upscaler_or_does_not_take_a_setting_is_refused(folders, tmp_path):
    base = tiny.base_folder(tmp_path / "base")
    with pytest.raises(UserError, match="is a StableDiffusionPipeline; give one of StableDiffusionUpscalePipeline"):
        open_upscaler(base)
    with pytest.raises(UserError, match="noise_level=3, which a StableDiffusionLatentUpscalePipeline does not take"):
        open_upscaler(folders["latent"], noise_level=3)
    with pytest.raises(UserError, match="stage 3, StableDiffusionUpscalePipeline, cannot upscale 16x16"):
        open_upscaler(folders["x4"], noise_level=999)(video(), "a red star", lambda: generator(0, 0))
    with pytest.raises(UserError, match="upscale.chunk_size is 0"):
        open_upscaler(folders["x4"], chunk_size=0)
    broken = open_upscaler(folders["x4"])
    with torch.no_grad():
        next(broken.pipeline.vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="pixels that are not finite"):
        broken(video(), "a red star", lambda: generator(0, 0))
