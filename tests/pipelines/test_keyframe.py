"""Stage 1 on tiny random text-to-image models of several kinds, and on image files."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from fixtures import tiny
from microcinema.config.sampling import MemorySettings
from microcinema.data.clip_reader import resize_and_crop
from microcinema.data.images import open_image
from microcinema.diffusion.rng import generator
from microcinema.pipelines.keyframe import KeyframePipeline, check_flagged, make_keyframe
from microcinema.pipelines.memory import apply
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_array

PROMPTS = ["a red star moving to the left on sand", "a large blue moon"]


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def open_quietly(folder, **settings):
    keyframes = KeyframePipeline.from_pretrained(folder, **settings)
    keyframes.set_progress_bar_config(disable=True)
    return keyframes


def rewrite_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Text-to-image pipelines


@pytest.mark.parametrize("kind, size", [("base", 32), ("sdxl", 64), ("sd3", 16)])
def test_any_text_to_image_pipeline_draws_key_frames_at_the_videos_size(kind, size, request):
    keyframes = open_quietly(request.getfixturevalue(kind))
    generators = [generator(1, 0), generator(1, 1)]
    first, second = keyframes(PROMPTS, 48, 24, generators, num_inference_steps=2)
    assert first.image.size == (24, 48)
    found = first.provenance
    assert (found["class"], found["prompt"]) == (type(keyframes.source).__name__, PROMPTS[0])
    assert found["source"] == str(request.getfixturevalue(kind))
    assert found["original_size"] == {"height": size, "width": size}
    assert found["sha256_of_pixels"] == hash_array(first.image) != second.provenance["sha256_of_pixels"]
    assert json.loads(json.dumps(found)) == found
    alone = keyframes(PROMPTS[1:], 48, 24, [generator(1, 1)], num_inference_steps=2)[0]
    assert np.array_equal(alone.image, second.image)
    assert not any(p.requires_grad for network in keyframes.networks.values() for p in network.parameters())


def test_key_frames_of_sdxl_animate_under_a_video_model_on_stable_diffusion_15(sdxl, base):
    """Two text encoders, another VAE and twice the size: what passes from one to the other is pixels."""
    keyframes, video = open_quietly(sdxl), tiny.video_pipeline(base)
    assert type(keyframes.source) is StableDiffusionXLPipeline
    assert keyframes.source.vae.config.scaling_factor != video.vae.config.scaling_factor
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    output = TextToVideoPipeline(keyframes, video)(PROMPTS[0], seed=3, **arguments)
    assert output.frames.shape == (1, 4, tiny.SIZE, tiny.SIZE, 3)
    (keyframe,) = output.keyframes
    assert keyframe.provenance["original_size"] == {"height": 64, "width": 64}
    assert keyframe.provenance["scaled"] == {"method": "bicubic, antialiased", "height": 32, "width": 32}
    # The second half of the same by hand: the drawn image, encoded by stage 2's VAE.
    item = PromptItem(PROMPTS[0], seed=3)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    drawn = keyframes.source(PROMPTS[0], generator=item.generator("keyframe"), **settings).images[0]
    cropped = resize_and_crop(np.array(drawn)[None], (32, 32))[0].permute(1, 2, 0).numpy()
    by_hand = video(PROMPTS[0], cropped, generator=[item.generator("video")], **arguments)
    assert np.array_equal(by_hand.frames, output.frames)


def test_a_class_that_the_automatic_one_does_not_know_draws_too(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "sag")
    rewrite_index(folder, _class_name="StableDiffusionSAGPipeline")
    keyframes = open_quietly(folder)
    assert type(keyframes.source) is StableDiffusionSAGPipeline
    (keyframe,) = keyframes(PROMPTS[:1], 32, 32, [generator(0)], num_inference_steps=1)
    assert keyframe.provenance["class"] == "StableDiffusionSAGPipeline"


def test_a_folder_saved_by_a_pipeline_of_another_task_draws_from_text(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "img2img")
    rewrite_index(folder, _class_name="StableDiffusionImg2ImgPipeline")
    assert type(KeyframePipeline.from_pretrained(folder).source).__name__ == "StableDiffusionPipeline"


def test_the_drawing_size_is_asked_for_and_recorded(base):
    keyframes = open_quietly(base)
    (keyframe,) = keyframes(PROMPTS[:1], 32, 32, num_inference_steps=1, draw_height=40, draw_width=64)
    found = keyframe.provenance
    assert found["arguments"] == {"num_inference_steps": 1, "height": 40, "width": 64}
    assert found["original_size"] == {"height": 40, "width": 64}
    assert found["scaled"] == {"method": "bicubic, antialiased", "height": 32, "width": 51}
    assert found["cropped"] == {"top": 0, "left": 9, "height": 32, "width": 32}


def test_the_schedule_of_stage_1_is_recorded(sdxl):
    found = KeyframePipeline.from_pretrained(sdxl).provenance()
    assert found["schedulers"]["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert found["schedulers"]["scheduler"]["settings"]["timestep_spacing"] == "leading"


def test_weights_are_of_the_wanted_type_whatever_they_are_stored_in(base, tmp_path):
    tiny.base_pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    for dtype in (torch.float32, torch.bfloat16):
        keyframes = KeyframePipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=dtype)
        assert {p.dtype for network in keyframes.networks.values() for p in network.parameters()} == {dtype}
        assert keyframes.provenance()["variant"] == "fp16"
    own = tiny.base_pipeline(tmp_path).to(torch.bfloat16)
    assert KeyframePipeline(own).networks["unet"].dtype == torch.bfloat16  # what is given is left as it is


def test_unloading_gives_the_memory_back(base):
    keyframes = open_quietly(base)
    kept = [weakref.ref(network) for network in keyframes.networks.values()]
    keyframes(PROMPTS[:1], 32, 32, num_inference_steps=1)
    keyframes.unload()
    assert [reference() for reference in kept] == [None] * len(kept)
    assert keyframes.networks == {}
    with pytest.raises(UserError, match="unloaded"):
        keyframes(PROMPTS[:1], 32, 32)
    keyframes.unload()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_unloading_empties_the_device(sdxl, offload):
    before = torch.cuda.memory_allocated()
    keyframes = open_quietly(sdxl)
    apply(keyframes.source, MemorySettings(offload=offload), "cuda")
    keyframes(PROMPTS[:1], 32, 32, [generator(0)], num_inference_steps=1)
    keyframes.unload()
    assert torch.cuda.memory_allocated() == before


# Pictures that are none


def test_a_flagged_picture_and_a_prompt_without_its_end_are_in_the_provenance(base, sd3, tmp_path, caplog):
    flagged = open_quietly(tiny.flagging(tmp_path / "flagging"))
    (keyframe,) = flagged(["a star"], 32, 32, num_inference_steps=1)
    assert keyframe.provenance["flagged"] == "by the safety checker" and not np.any(keyframe.image)
    assert not check_flagged(keyframe.provenance, "only here", "skip")
    assert check_flagged(keyframe.provenance, "only here", "keep")
    assert "the key frame of 'only here' was flagged by the safety checker" in caplog.text
    with pytest.raises(UserError, match=r"key frame of 'a' was flagged.*keyframe\.on_flagged=skip or keep"):
        check_flagged(keyframe.provenance, "a", "error")
    long = " ".join(["star"] * 14)  # with begin and end as many tokens as the encoder reads
    for folder in (base, sd3):
        keyframes = open_quietly(folder)
        one, two = keyframes([long, f"{long} moving left"], 16, 16, num_inference_steps=1)
        assert (
            "flagged" not in one.provenance
            and "truncated" not in one.provenance
            and check_flagged(one.provenance, "", "error")
        )
        assert two.provenance["truncated"] == "moving left"
    assert f"stage 1 reads '{long} moving left' without its end 'moving left'" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_not_finite_are_an_error_and_no_black_picture(base, sdxl, value):
    for folder in (base, sdxl):
        keyframes = open_quietly(folder)
        keyframes.source.vae.decoder.conv_out.bias.data[0] = value
        with pytest.raises(UserError, match="stage 1 draws pixels that are not finite; use"):
            keyframes(PROMPTS[:1], 32, 32, num_inference_steps=1)
        # Outside of stage 1 the VAE is as it was: in training it is the video pipeline's, too.
        vae = keyframes.source.vae
        assert not vae.decode(torch.zeros(1, vae.config.latent_channels, 2, 2)).sample.isfinite().all()


# Bad pipelines


@pytest.mark.parametrize(
    "name, words",
    [
        ("ImageToVideoPipeline", "ImageToVideoPipeline.*text-to-image"),
        ("StableDiffusionInstructPix2PixPipeline", "InstructPix2PixPipeline.*does not make images from text"),
        ("TextToVideoSDPipeline", "TextToVideoSDPipeline.*does not make images from text"),
        ("NextYearsPipeline", "NextYearsPipeline, which diffusers .* does not know"),
    ],
)
def test_what_is_no_text_to_image_pipeline_is_refused_before_its_weights_are_read(base, tmp_path, name, words):
    folder = shutil.copytree(base, tmp_path / "other")
    rewrite_index(folder, _class_name=name)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=words) as error:
        KeyframePipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_broken_pipelines_are_named_in_one_line(base, tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json"):
        KeyframePipeline.from_pretrained(tmp_path)
    folder = shutil.copytree(base, tmp_path / "torn")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot open the text-to-image pipeline") as error:
        KeyframePipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "pickled")
    unet = tiny.base_pipeline(tmp_path / "again").unet
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", safe_serialization=False)
    with pytest.raises(UserError, match="weights as a pickle .*convert it"):
        KeyframePipeline.from_pretrained(folder)


def test_a_repository_that_is_not_in_the_cache_while_offline_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing'.*offline") as error:
        KeyframePipeline.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_size_that_the_pipeline_refuses_is_named(base):
    keyframes = open_quietly(base)
    with pytest.raises(UserError, match="StableDiffusionPipeline.*height=30.*divisible by 8") as error:
        keyframes(PROMPTS[:1], 32, 32, draw_height=30, draw_width=32)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="draw_height=32, draw_width=None; give both"):
        keyframes(PROMPTS[:1], 32, 32, draw_height=32)


class Silent(StableDiffusionPipeline):
    """Knows neither guidance nor sizes, and its result holds no images."""

    def __call__(self, prompt, generator=None):
        return {}


def test_arguments_that_a_pipeline_does_not_know_and_results_that_are_no_images_are_named(tmp_path):
    keyframes = KeyframePipeline(Silent(**tiny.base_pipeline(tmp_path).components, requires_safety_checker=False))
    with pytest.raises(UserError, match="Silent, returns no images"):
        keyframes(PROMPTS[:1], 32, 32)
    assert keyframes.takes("prompt") and not keyframes.takes("guidance_scale")
    with pytest.raises(UserError, match="Silent takes no argument 'guidance_scale'"):
        keyframes(PROMPTS[:1], 32, 32, guidance_scale=2.0)


# Files


def test_key_frames_from_a_file_and_from_a_folder(tmp_path, image):
    image.save(tmp_path / "b.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png")
    from_file = KeyframePipeline(tmp_path / "b.png")(PROMPTS, tiny.SIZE, tiny.SIZE)
    assert [np.array_equal(keyframe.image, image) for keyframe in from_file] == [True, True]
    assert (from_file[0].provenance["scaled"], from_file[0].provenance["cropped"]) == (None, None)
    from_folder = KeyframePipeline(tmp_path)(PROMPTS, tiny.SIZE, tiny.SIZE)
    assert [keyframe.provenance["source"][-5:] for keyframe in from_folder] == ["a.png", "b.png"]
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        KeyframePipeline(tmp_path)(PROMPTS[:1], 8, 8)


def test_images_are_turned_as_cameras_say(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), image.transpose(Image.Transpose.ROTATE_270))


def test_bad_images_are_named(tmp_path, base):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png.*not an image"):
        KeyframePipeline(tmp_path / "text.png")(PROMPTS, 8, 8)
    with pytest.raises(UserError, match=r"gone\.png.*does not exist"):
        KeyframePipeline(tmp_path / "gone.png")
    with pytest.raises(UserError, match="no images"):
        KeyframePipeline(base)


# How an image comes to the video's size


def test_crop_is_what_training_clips_go_through(image):
    keyframe = make_keyframe(image, 24, 16, {})
    assert np.array_equal(keyframe.image, resize_and_crop(np.array(image)[None], (24, 16))[0].permute(1, 2, 0))
    assert keyframe.provenance["scaled"] == {"method": "bicubic, antialiased", "height": 24, "width": 24}
    assert keyframe.provenance["cropped"] == {"top": 0, "left": 4, "height": 24, "width": 16}


def test_stretch_keeps_the_whole_image():
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 255
    keyframe = make_keyframe(Image.fromarray(halves), 32, 16, {}, "stretch")
    pixels = np.array(keyframe.image)
    assert (pixels[:, :5] < 30).all() and (pixels[:, 11:] > 225).all()
    assert keyframe.provenance["cropped"] is None
    assert keyframe.provenance["scaled"] == {"method": "bicubic, antialiased", "height": 32, "width": 16}


def test_exact_takes_no_other_size(tmp_path, image):
    assert np.array_equal(make_keyframe(image, tiny.SIZE, tiny.SIZE, {}, "exact").image, image)
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="32x32.*24x32"):
        KeyframePipeline(tmp_path / "a.png", resize_mode="exact")(PROMPTS[:1], 24, 32)


def test_an_unknown_fit_is_named(tmp_path, image):
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="'squeeze'.*crop, stretch, exact"):
        KeyframePipeline(tmp_path / "a.png", resize_mode="squeeze")
