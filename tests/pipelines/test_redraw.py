"""Stage 1 draws a part of a key frame anew, by diffusers' inpainting; the rest keeps its pixels."""

import json

import numpy as np
import pytest
from diffusers import StableDiffusionSAGPipeline
from PIL import Image

from fixtures import tiny
from microcinema.commands import cli
from microcinema.config.sampling import ResizeMode
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.redraw import inpainting_arguments, inpainting_pipeline, open_masked, redraw
from microcinema.pipelines.saving import save_pipeline
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_array

ARGUMENTS = {"draw_height": None, "draw_width": None, "num_inference_steps": 2}


def noise(folder, width, height):
    """A picture and its path."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return Image.fromarray(pixels), folder / "a.png"


def mask_of(folder, size, box, gray=255):
    """The path of a mask with a box of this gray, and where it is not black, (h, w)."""
    mask = Image.new("L", size)
    mask.paste(gray, box)
    mask.save(folder / "mask.png")
    return folder / "mask.png", np.asarray(mask) > 0


def draw(source, item, height, width, mode: ResizeMode = "crop", **arguments):
    arguments = inpainting_arguments(source, height, width, {**ARGUMENTS, **arguments})
    return redraw(source, item, *open_masked(item, height, width, mode), **arguments)


def open_inpainting(folder):
    source = inpainting_pipeline(KeyframePipeline.from_pretrained(folder))
    source.set_progress_bar_config(disable=True)
    return source


@pytest.mark.parametrize("kind, drawn", [("base", (48, 32)), ("sdxl", (80, 48)), ("sd3", (16, 16)), (None, (80, 48))])
def test_the_white_part_is_drawn_and_the_black_part_stays(kind, drawn, request, tmp_path):
    """Also with the embedded model, whose latents have 16 channels, which diffusers takes for no Stable Diffusion."""
    folder = request.getfixturevalue(kind) if kind else "sprites-base"
    source, (picture, path) = open_inpainting(folder), noise(tmp_path, 24, 40)
    mask, white = mask_of(tmp_path, picture.size, (4, 6, 15, 30))
    item = PromptItem("a red star", seed=3, image=path, mask=mask)
    found = draw(source, item, 40, 24)
    before, after = np.asarray(picture), np.asarray(found.image)
    assert np.array_equal(after[~white], before[~white]) and (after[white] != before[white]).mean() > 0.9
    assert (found.provenance["arguments"]["height"], found.provenance["arguments"]["width"]) == drawn
    assert found.provenance["class"].endswith("InpaintPipeline") and found.provenance["prompt"] == "a red star"
    assert found.provenance["redrawn"]["image"]["sha256_of_pixels"] == hash_array(before)
    assert found.provenance["redrawn"]["mask"]["source"] == str(mask)
    assert found.provenance["sha256_of_pixels"] == hash_array(after)
    assert json.loads(json.dumps(found.provenance)) == found.provenance
    again = np.asarray(draw(source, item, 40, 24).image)
    other = np.asarray(draw(source, PromptItem("a red star", seed=4, image=path, mask=mask), 40, 24).image)
    assert np.array_equal(again, after) and not np.array_equal(other, after)


def test_stable_diffusion_draws_at_its_own_number_of_pixels_in_the_videos_shape(base):
    source = inpainting_pipeline(KeyframePipeline.from_pretrained(base))
    source.source.unet.register_to_config(sample_size=64)
    source.source.vae_scale_factor = 8
    for size, drawn in (((320, 512), (400, 640)), ((256, 256), (512, 512)), ((576, 1024), (384, 688))):
        arguments = inpainting_arguments(source, *size, ARGUMENTS)
        assert (arguments["draw_height"], arguments["draw_width"]) == drawn and arguments["strength"] == 1.0
    asked = {**ARGUMENTS, "draw_height": 64, "draw_width": 32}
    assert inpainting_arguments(source, 320, 512, asked) == {**asked, "strength": 1.0}


def test_a_line_of_one_pixel_is_drawn(base, tmp_path):
    """The pipeline samples the mask at every fourth pixel, and this line lies between."""
    source, (picture, path) = open_inpainting(base), noise(tmp_path, 32, 32)
    mask, white = mask_of(tmp_path, picture.size, (7, 0, 8, 32))
    found = draw(source, PromptItem("a star", image=path, mask=mask), 32, 32)
    everywhere, _ = mask_of(tmp_path, picture.size, (0, 0, 32, 32))
    whole = draw(source, PromptItem("a star", image=path, mask=everywhere), 32, 32)
    black, _ = mask_of(tmp_path, picture.size, (0, 0, 0, 0))
    assert np.array_equal(draw(source, PromptItem("a star", image=path, mask=black), 32, 32).image, picture)
    columns = [np.asarray(image, float)[white] for image in (found.image, whole.image, picture)]
    assert np.abs(columns[0] - columns[1]).mean() < np.abs(columns[0] - columns[2]).mean() / 2


def test_gray_blends_and_crops_fit_the_picture(base, tmp_path):
    source, (picture, path) = open_inpainting(base), noise(tmp_path, 64, 32)
    mask, _ = mask_of(tmp_path, picture.size, (0, 0, 40, 32), gray=128)
    found = draw(source, PromptItem("a star", image=path, mask=mask), 32, 32)
    kept = np.asarray(found.image)[:, 24:], np.asarray(picture)[:, 40:48]  # of columns 16 to 47
    assert np.array_equal(*kept)
    assert found.provenance["cropped"]["left"] == 16 and found.provenance["original_size"]["width"] == 64


def test_what_cannot_be_redrawn_is_named(base, tmp_path):
    source, (_, path) = open_inpainting(base), noise(tmp_path, 32, 32)
    mask, _ = mask_of(tmp_path, (16, 32), (0, 0, 8, 8))
    with pytest.raises(UserError, match="has 16x32 pixels, its image 32x32; give one of the image's size"):
        draw(source, PromptItem("a star", image=path, mask=mask), 32, 32)
    mask, _ = mask_of(tmp_path, (32, 32), (0, 0, 8, 8))
    with pytest.raises(UserError, match="cannot draw 'a star' with .*height=30.*divisible by 8"):
        draw(source, PromptItem("a star", image=path, mask=mask), 32, 32, draw_height=30, draw_width=30)
    other = StableDiffusionSAGPipeline(
        **{key: part for key, part in source.source.components.items() if key != "requires_safety_checker"},
        requires_safety_checker=False,
    )
    with pytest.raises(UserError, match="StableDiffusionSAGPipeline, cannot draw a part.*leave out mask"):
        inpainting_pipeline(KeyframePipeline(other))


def test_the_command_draws_and_animates_a_redrawn_key_frame(tmp_path, capsys, monkeypatch):
    """The file that it leaves makes the same video as an image; a mask of other pixels makes it anew, the same one does not."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny.video_pipeline(tmp_path / "base"), tmp_path / "video", with_base=False)
    picture, _ = noise(tmp_path, tiny.SIZE, tiny.SIZE)
    mask_of(tmp_path, picture.size, (0, 0, 16, 32))

    def run(*overrides, output="out"):
        settings = ["pipeline=video", "prompt=a star", "num_inference_steps=2", f"output_dir={output}"]
        return cli.main(["sample", *settings, *overrides]), capsys.readouterr().err

    both = ["image=a.png", "mask=mask.png"]
    assert run(*both, "num_videos_per_prompt=2", "keyframes_only=true", output="only")[0] == 0
    one, two = sorted((tmp_path / "only").glob("*_keyframe.png"))
    assert one.read_bytes() != two.read_bytes() and not list((tmp_path / "only").glob("*.mp4"))
    assert run(*both)[0] == 0
    keyframe, video = tmp_path / "out/a-star-seed0_keyframe.png", tmp_path / "out/a-star-seed0.mp4"
    assert keyframe.read_bytes() == one.read_bytes()
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["config"]["mask"] == "mask.png" and record["keyframe"]["redrawn"]["mask"]["source"] == "mask.png"
    assert run("image=only/a-star-seed0-0_keyframe.png", output="chosen")[0] == 0
    assert (tmp_path / "chosen/a-star-seed0.mp4").read_bytes() == video.read_bytes()
    times = keyframe.stat().st_mtime_ns, video.stat().st_mtime_ns
    assert run(*both)[0] == 0 and (keyframe.stat().st_mtime_ns, video.stat().st_mtime_ns) == times
    mask_of(tmp_path, picture.size, (0, 0, 32, 16))
    assert run(*both)[0] == 0 and np.array_equal(np.asarray(Image.open(keyframe))[16:], np.asarray(picture)[16:])
    for bad, words in (
        (["mask=mask.png"], "'a-star-seed0' has none; give image as well"),
        (["image=a.png", "mask=gone.png"], "image 'gone.png' cannot be read"),
    ):
        code, told = run(*bad)
        assert code == 2 and words in told.splitlines()[-1]
