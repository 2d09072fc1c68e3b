"""Saved video pipelines that take their base from the hub's cache, that are shared by the hub, or that are embedded."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from PIL import Image

from fixtures import tiny
from microcinema.diffusion.rng import generator
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import ASSETS
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline, save_pipeline
from microcinema.training.warm_start import known_schedule
from microcinema.utils.errors import UserError

BASE, VIDEO = "owner/base", "owner/video"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub, without a connection to it: `main` of the base is another model than its branch `v2`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for seed, revision in enumerate(("main", "v2")):
        tiny.into_hub_cache(tiny.base_folder(tmp_path / revision, seed=seed), tmp_path / "hub", BASE, revision)
    return tmp_path / "hub"


def frames(pipeline, size=tiny.SIZE):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": [generator(7, 0)]}
    return pipeline("a red star", IMAGE, height=size, width=size, **settings).frames


def test_a_light_folder_takes_the_revision_of_its_base_that_it_was_trained_on(cache, tmp_path):
    pipeline = tiny.video_pipeline(tmp_path / "v2", base=BASE, base_revision="v2")
    save_pipeline(pipeline, tmp_path / "light", with_base=False)
    assert pipeline.components["vae"] is pipeline.vae  # saving has left the pipeline as it was
    wanted = frames(pipeline)
    for open_it in (load_pipeline, ImageToVideoPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        assert np.array_equal(frames(open_it(tmp_path / "light")), wanted)
    other = tiny.video_pipeline(tmp_path / "v2", base=BASE)
    save_pipeline(other, tmp_path / "other", with_base=False)
    assert not np.array_equal(frames(load_pipeline(tmp_path / "other")), wanted)
    drawing = load_keyframe_pipeline(tmp_path / "light").source.unet.state_dict()
    second = tiny.unet(seed=1).state_dict()
    assert all(torch.equal(drawing[name], second[name]) for name in second)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_saved_pipeline_names_no_path_that_it_was_opened_from(cache, tmp_path, with_base):
    save_pipeline(tiny.video_pipeline(tmp_path / "main", base=BASE), tmp_path / "first")
    opened = load_pipeline(tmp_path / "first")
    wanted = frames(opened)
    save_pipeline(opened, tmp_path / "second", with_base)
    files = [*(tmp_path / "second").rglob("*.json")]
    assert all(str(tmp_path) not in file.read_text() for file in files)
    assert np.array_equal(frames(load_pipeline(tmp_path / "second")), wanted)


def test_borrowed_parts_have_the_type_of_the_others(cache, tmp_path):
    save_pipeline(tiny.video_pipeline(tmp_path / "main", base=BASE), tmp_path / "light", with_base=False)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "light", torch_dtype=torch.bfloat16)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.bfloat16}


def test_a_shared_pipeline_opens_from_the_hub(cache, tmp_path):
    pipeline = tiny.video_pipeline(tmp_path / "main", base=BASE)
    for with_base in (True, False):
        name = f"{VIDEO}-{with_base}"
        save_pipeline(pipeline, tmp_path / name, with_base)
        tiny.into_hub_cache(tmp_path / name, cache, name)
        assert np.array_equal(frames(load_pipeline(name)), frames(pipeline))
    with pytest.raises(
        UserError, match="'owner/none' is not a folder and not complete in the hub's cache.*hf download owner/none"
    ):
        load_pipeline("owner/none")


def test_a_base_whose_parts_do_not_fit_is_refused(cache, tmp_path, monkeypatch):
    pipeline = tiny.video_pipeline(tmp_path / "main", base=str(tmp_path / "wide"))
    save_pipeline(pipeline, tmp_path / "light", with_base=False)
    monkeypatch.setattr(tiny, "WIDTH", 2 * tiny.WIDTH)
    tiny.base_folder(tmp_path / "wide")
    with pytest.raises(UserError, match="the text encoder's width is 64, but its UNet has cross_attention_dim=32"):
        load_pipeline(tmp_path / "light")


def test_the_embedded_video_model_opens_by_diffusers_own_means():
    folder = ASSETS / "sprites-microcinema"
    opened, wanted = DiffusionPipeline.from_pretrained(folder), load_pipeline("sprites-microcinema")
    assert np.array_equal(frames(opened.to(torch.float32), 64), frames(wanted, 64))


DAMAGES = [b"", b"[]", b"3", b"{}", b"\xff\xfe", b'{"a": ', b"[" * 100_000]
DAMAGES += [
    b'{"_class_name": "ImageToVideoPipeline", "unet": %s, "scheduler": "x"}' % unet for unet in (b"3", b"[1]", b'"x"')
]
DAMAGES += [
    b'{"_class_name": %s, "beta_schedule": 3, "num_train_timesteps": "x"}' % name for name in (b"3", b'"DDIMScheduler"')
]


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json"])
def test_damaged_files_of_a_model_are_one_line(tmp_path, file):
    base = load_base(tiny.base_folder(tmp_path / "base")).scheduler
    video = tiny.video_pipeline(tmp_path / "base", model="plain")
    save_pipeline(video, tmp_path / "video", with_base=False)
    opened = [(load_base, "base"), (load_pipeline, "video"), (partial(known_schedule, base=base), "video")]
    refused = []
    for function, name in opened:
        whole = (tmp_path / name / file).read_bytes()
        for damage in DAMAGES:
            (tmp_path / name / file).write_bytes(damage)
            try:  # other errors than this one are tracebacks
                function(str(tmp_path / name))
            except UserError as error:
                refused.append(str(error))
        (tmp_path / name / file).write_bytes(whole)
    assert len(refused) >= 2 * len(DAMAGES) and not any("\n" in message for message in refused)
