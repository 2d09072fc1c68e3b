"""Stable Diffusion XL as a base: two text encoders, sizes, its VAE; train, sample, save, reload and export."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from fixtures import tiny
from fixtures.tiny_sampling import image, sample
from fixtures.tiny_training import reset_accelerator
from fixtures.tiny_unet import SDXL, VAE_FACTOR, base, inputs, network, randomise
from microcinema.commands import cli, doctor
from microcinema.config.sampling import MemorySettings
from microcinema.models import vae as vae_module
from microcinema.models.vae import decode_latents, encode_pixels
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.memory import apply
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.utils.errors import UserError

SIZE = 2 * tiny.SIZE
PROMPT = "a red star moving to the left on sand"


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return tiny.sdxl_folder(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipeline(xl):
    return tiny.video_pipeline(xl)


@pytest.fixture(scope="module")
def trained(xl, tmp_path_factory):
    """The folder of a run of two steps, from latents that `prepare latents` cached, with a validation video."""
    folder = tmp_path_factory.mktemp("run")
    call("prepare", "sprites", f"output_dir={folder / 'clips'}", "num_videos=2")
    keys = [f"base.pretrained_model_name_or_path={xl}", f"resolution={SIZE}", "num_frames=4", "train_batch_size=2"]
    keys += [f"data.root={folder / 'clips'}", f"cached_latents={folder / 'latents'}", "dataloader_num_workers=0"]
    keys += [f"output_dir={folder / 'run'}", "max_train_steps=2", "learning_rate=1e-3", "lr_warmup_steps=0"]
    call("prepare", "latents", *keys)
    call("train", *keys, "report_to=null", f'validation_prompts=["{PROMPT}"]', "sampling.num_inference_steps=2")
    return folder / "run"


def call(*arguments):
    reset_accelerator()
    assert cli.main([*arguments]) == 0


def frames(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return sample(pipeline, PROMPT, image())


# The network


@pytest.mark.parametrize("preset", ["microcinema", "microcinema_once"])
@torch.no_grad()
def test_pooled_text_and_size_reach_every_branch(preset):
    video = network(base("sdxl"), preset)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(2)

    def predict(text, z_ref=z_ref):
        return video(z_t, t, video.encode(text, z_ref, fps))

    pooled = SDXL["projection_class_embeddings_input_dim"] - 6 * SDXL["addition_time_embed_dim"]
    text = torch.cat([text[:, :-1], torch.nn.functional.pad(text[:, -1:, :pooled], (0, text.shape[-1] - pooled))], 1)
    other, padding = text.clone(), text.clone()
    other[:, -1, 0] += 1
    padding[:, -1, pooled:] += 1
    assert not torch.allclose(predict(other), predict(text), atol=1e-4)
    assert torch.equal(predict(padding), predict(text))
    branch = video.appear_net if preset == "microcinema" else video.reference_net
    before = predict(text)
    branch.add_embedding.linear_2.bias += 1  # its own, which trains apart from the main branch's
    assert not torch.allclose(predict(text), before, atol=1e-4)
    sizes = video.split_text(text, 8 * VAE_FACTOR, 8 * VAE_FACTOR)[1], video.split_text(text, 8 * VAE_FACTOR, 64)[1]
    assert not torch.equal(*sizes)
    assert torch.equal(video.encode(text, z_ref).added, sizes[0])


# Texts


@torch.no_grad()
def test_texts_are_those_of_diffusers_and_an_empty_one_is_zero_if_the_base_says_so(xl, pipeline, tmp_path):
    texts = ["a red star", PROMPT]
    theirs = StableDiffusionXLPipeline.from_pretrained(xl)
    tokens, negative, pooled, negative_pooled = theirs.encode_prompt(texts, device="cpu")
    mine, empty = pipeline.encode_text(texts), pipeline.encode_text(["", "a"])
    assert torch.equal(mine[:, :-1], tokens)
    assert torch.equal(mine[:, -1, : tiny.POOLED_WIDTH], pooled)
    assert not (negative.any() or negative_pooled.any() or empty[0].any())
    assert empty[1].any()
    other = shutil.copytree(xl, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert load_base(other).shared["force_zeros_for_empty_prompt"] is False
    assert load_base(tiny.base_folder(tmp_path / "sd15")).shared["force_zeros_for_empty_prompt"] is False


def test_encoders_of_other_models_are_refused(xl, pipeline):
    parts = {**pipeline.components, "base": None}
    with pytest.raises(UserError, match="reads two text encoders"):
        ImageToVideoPipeline(**{**parts, "text_encoder_2": None})
    narrow = VideoUNet.from_config({**pipeline.unet.config, "unet2d": {**pipeline.unet.options.unet2d}})
    narrow.options.unet2d["projection_class_embeddings_input_dim"] += 8
    with pytest.raises(UserError, match="pooled text.* is 88.*projection_class_embeddings_input_dim=96"):
        ImageToVideoPipeline(**{**parts, "unet": narrow})


# The VAE


def test_only_the_vae_of_sdxl_stays_in_float32(pipeline, xl, tmp_path):
    """Its activations overflow float16; the other VAEs have the same entry by default, and do not."""
    save_pipeline(pipeline, tmp_path / "saved")
    half = load_pipeline(tmp_path / "saved", torch_dtype=torch.float16)
    apply(half, MemorySettings(torch_dtype="float16"), "cpu")
    assert (half.vae.dtype, half.unet.dtype, half.text_encoder_2.dtype) == (torch.float32, torch.float16, torch.float16)
    older = tiny.video_pipeline(tmp_path / "sd15")
    apply(older, MemorySettings(torch_dtype="float16"), "cpu")
    assert older.vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_in_float16_does_not_reach_it(pipeline, tmp_path, dtype):
    pixels = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    older = tiny.video_pipeline(tmp_path / "sd15")
    for owner, is_exempt in ((pipeline, dtype == torch.float16), (older, False)):
        plain = encode_pixels(owner.vae, pixels)
        decoded = decode_latents(owner.vae, plain)
        with torch.autocast("cpu", dtype):
            assert torch.equal(encode_pixels(owner.vae, pixels), plain) == is_exempt
            assert torch.equal(decode_latents(owner.vae, plain), decoded) == is_exempt
    assert vae_module.overflows(pipeline.vae, torch.float16)


# A run


@pytest.mark.slow
def test_a_trained_model_is_sampled_saved_reloaded_and_exported(trained, tmp_path):
    assert [path.name for path in trained.glob("validation/step-2/*.mp4")] == ["0.mp4"]
    video = load_pipeline(trained)
    assert (video.config["height"], video.config["width"]) == (SIZE, SIZE)
    assert video.text_encoder_2 is not None and video.config["force_zeros_for_empty_prompt"]
    expected = frames(video)
    for name, options in (("whole", []), ("light", ["with_base=false"])):
        call("export", f"checkpoint={trained / 'checkpoint-2'}", f"output_dir={tmp_path / name}", *options)
        assert (tmp_path / name / "text_encoder_2").is_dir() == (name == "whole")
        again = load_pipeline(tmp_path / name)
        assert again.config["force_zeros_for_empty_prompt"]
        assert np.array_equal(frames(again), expected)
    opened = ImageToVideoPipeline.from_pretrained(tmp_path / "whole")
    assert np.array_equal(frames(opened), expected)
    keys = [f"pipeline={tmp_path / 'whole'}", f"prompt={PROMPT}", "num_inference_steps=2", "negative_prompt=sand"]
    call("sample", *keys, f"output_dir={tmp_path / 'out'}")
    (record,) = (path for path in (tmp_path / "out").glob("*.json") if not path.name.endswith("_keyframe.json"))
    content = json.loads(record.read_text())
    assert content["keyframe"]["class"] == "StableDiffusionXLPipeline"
    assert content["keyframe"]["original_size"] == {"height": SIZE, "width": SIZE}
    assert {"text_encoder", "text_encoder_2", "unet", "vae"} <= content["weights_sha256"].keys()


def test_cached_text_has_the_pooled_text_and_is_of_both_encoders(trained):
    folder = trained.parent / "latents"
    empty = load_file(folder / "empty.safetensors")["text"]
    assert tuple(empty.shape) == (1, tiny.MAX_TOKENS + 1, tiny.WIDTH + tiny.SECOND_WIDTH) and not empty.any()
    contents = json.loads((folder / "fingerprint.json").read_text())["contents"]
    assert contents["text"]["second_sha256"] != contents["text"]["sha256"]


def test_doctor_looks_for_the_weights_of_both_encoders(xl, tmp_path):
    folder = shutil.copytree(xl, tmp_path / "base")
    assert doctor.base(str(folder), None, None)[0].status == doctor.OK
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    assert "text_encoder_2' has no weights" in doctor.base(str(folder), None, None)[0].found
