"""The amount of motion: the score of a clip, the network that is told it, its cache, and asking for it in sampling."""

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import tiny, tiny_training
from fixtures.tiny_unet import base, inputs, network, randomise
from microcinema.data.latents import EncodedClips
from microcinema.data.motion_score import UNKNOWN, MotionClips, motion_quantiles, motion_score
from microcinema.data.source import ClipSource
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.sprites import scene
from microcinema.training import cached_latents_check
from microcinema.training.build import build_clips
from microcinema.training.loss import make_loss_config
from microcinema.utils.errors import UserError

OPTION = ("model.motion_score=true",)


def clip(speed: str, frames: int = 8, size: int = 64, fps: float = 8.0) -> np.ndarray:
    motion = "right" if speed else "still"
    sprite = scene.place(np.random.default_rng(5), "star", "red", "large", "brick", motion, speed)
    return scene.render(sprite, frames, size, fps).frames


class Clips(ClipSource):
    """Clips of a square that moves `index` pixels a frame; the third is broken, the last is a picture."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        if index == 2:
            raise UserError("broken")
        video = torch.full((1 if index == 4 else tiny_training.FRAMES, 3, tiny.SIZE, tiny.SIZE), -0.5)
        for k, frame in enumerate(video):
            frame[:, 8:20, 2 + index * k : 14 + index * k] = torch.rand(12, 12, generator=torch.manual_seed(3))
        texts = dict.fromkeys(("caption", "description", "motion"), "a star")
        return {"video": (127.5 * (video + 1)).byte(), **texts, "fps": 8.0, "index": index, "id": str(index)}

    def fingerprint(self) -> dict:
        return {"clips": 5}


class Videos(Clips):
    def __len__(self) -> int:
        return 4


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A model that is told motion scores, not as at its start."""
    model = tiny_training.pipeline(
        tmp_path_factory.mktemp("told"), network=OPTION, motion_quantiles=[0.0, 10.0, 40.0], fps=8.0
    )
    randomise(model.unet)
    model.set_progress_bar_config(disable=True)
    return model


def test_the_score_measures_motion_per_second_and_height():
    slow, quick = (motion_score(clip(speed), 8.0) for speed in ("slowly", "quickly"))
    assert motion_score(clip(""), 8.0) < 0.1 < 5 < 1.5 * slow < quick
    assert motion_score(clip("quickly", size=256), 8.0) == pytest.approx(quick, rel=0.25)
    assert motion_score(clip("quickly", 15, fps=16.0), 16.0) == pytest.approx(quick, rel=0.25)
    assert motion_score(clip("quickly", 1), 8.0) == UNKNOWN


def test_quantiles_are_those_of_clips_that_have_a_score():
    clips = MotionClips(Clips())
    scores = sorted(clips[index]["motion_score"] for index in (0, 1, 3))
    found = motion_quantiles(clips)
    assert len(found) == 101 and found == sorted(found) and found[0] >= 0
    assert [found[0], found[50], found[100]] == pytest.approx(scores, abs=1e-3)
    with pytest.raises(UserError, match="no clip has a motion score"):
        motion_quantiles(MotionClips(tiny_training.PoisonedClips(0)))


@torch.no_grad()
def test_the_network_starts_without_it_and_then_is_told():
    z_t, t, text, z_ref, fps = inputs(3)
    plain, video = network(base(), "microcinema"), network(base(), "microcinema", *OPTION)
    added = video.state_dict().keys() - plain.state_dict().keys()
    assert added and all("motion_score_embedding." in name for name in added)
    assert {id(p) for name, p in video.named_parameters() if name in added} <= {id(p) for p in video.new_parameters()}

    def predict(model, score):
        score = None if score is None else torch.tensor(score)
        return model(z_t, t, model.encode(text, z_ref, fps, motion_score=score))

    assert torch.equal(predict(video, [3.0, 50.0]), predict(video, None))
    randomise(video)
    untold, one = predict(video, None), predict(video, [UNKNOWN, 20.0])
    assert torch.equal(untold, predict(video, [UNKNOWN, UNKNOWN])) and torch.equal(untold[0], one[0])
    assert (untold[1] - one[1]).abs().max() > 1e-3 < (predict(video, [0.0, 30.0]) - one).abs().amax((1, 2, 3, 4)).min()
    assert torch.equal(predict(plain, [3.0, 50.0]), predict(plain, None))  # what a network does not have is ignored


def test_scores_are_dropped_without_a_change_of_other_draws(told, tmp_path):
    config = tiny_training.make_config(tmp_path, motion_dropout=0.25)
    plain = make_loss_config(tiny_training.pipeline(tmp_path), config)
    shape, indices = torch.Size((1, 1, 1, 1)), range(2000)
    without, noise = (
        each.sample_noise_and_timesteps(indices, shape) for each in (plain, make_loss_config(told, config))
    )
    assert without.motion_mask is None and noise.motion_mask is not None
    for name in ("noise", "t", "text_mask", "image_mask"):
        assert torch.equal(getattr(without, name), getattr(noise, name))
    assert (~noise.motion_mask).float().mean().item() == pytest.approx(0.25, abs=0.03)
    both = (~noise.motion_mask & ~noise.text_mask).float().mean().item()
    assert both == pytest.approx(0.025, abs=0.012)  # text_dropout is 0.1
    alone = make_loss_config(told, config).sample_noise_and_timesteps([7], torch.Size((2, 4, 3, 3)))
    assert alone.motion_mask[0] == noise.motion_mask[7]


def test_training_tells_the_score_of_each_clip_and_learns_from_it(told, tmp_path):
    model = tiny_training.pipeline(tmp_path / "base", network=OPTION)
    heard, encode = [], model.unet.encode

    def listen(*args, **kwargs):
        heard.append(kwargs["motion_score"])
        return encode(*args, **kwargs)

    model.unet.encode = listen
    clips = MotionClips(Videos())
    tiny_training.train(model, clips, tmp_path / "run", max_train_steps=2, motion_dropout=0.0, max_error_rate=1.0)
    scores = [clips[index]["motion_score"] for index in (0, 1, 3)]
    for score in torch.cat(heard).tolist():
        assert min(abs(score - each) for each in scores) < 1e-3
    assert model.unet.motion_score_embedding.linear_2.weight.any()
    heard.clear()
    tiny_training.train(model, clips, tmp_path / "dropped", max_train_steps=1, motion_dropout=1.0, max_error_rate=1.0)
    assert (torch.cat(heard) == UNKNOWN).all()
    with pytest.raises(UserError, match="MotionClips"):
        tiny_training.train(model, tiny_training.LatentClips(), tmp_path / "without")


def test_scores_are_cached_with_the_latents_or_added_to_them(told, tmp_path):
    plain, clips = tiny_training.pipeline(tmp_path / "base"), MotionClips(Videos())
    kept = tiny_training.encode_clips(told, clips, tmp_path / "scored", max_error_rate=1.0)
    for index in (0, 1, 3):
        assert kept[index]["motion_score"] == pytest.approx(clips[index]["motion_score"], rel=1e-5)
    assert np.isnan(kept.motion_scores[2]) and motion_quantiles(kept) == pytest.approx(
        motion_quantiles(clips), abs=1e-3
    )
    cached_latents_check.check(kept, told, None)
    cached_latents_check.check(kept, plain, None)

    old = tiny_training.encode_clips(plain, Videos(), tmp_path / "old", cached_parts=[], max_error_rate=1.0)
    assert old.motion_scores is None and "motion_score" not in old[0]
    with pytest.raises(UserError, match="without motion scores.*again"):
        cached_latents_check.check(old, told, None)
    files = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir() if path.is_file()}
    told.vae.encode, encode = None, told.vae.encode  # nothing is encoded again
    try:
        added = tiny_training.encode_clips(told, clips, tmp_path / "old", max_error_rate=1.0)
    finally:
        told.vae.encode = encode
    assert (
        files.items()
        <= {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir() if path.is_file()}.items()
    )
    np.testing.assert_array_equal(added.motion_scores, kept.motion_scores)
    np.save(tmp_path / "old" / "motion.npy", np.zeros(3, np.float32))
    with pytest.raises(UserError, match="other scores"):
        EncodedClips(tmp_path / "old", clips)


def test_sampling_asks_for_a_percentile_of_the_training_clips(told, tmp_path):
    heard, encode = [], told.unet.encode
    told.unet.encode = lambda *args, **kwargs: heard.append(kwargs.get("motion_score")) or encode(*args, **kwargs)
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "np"}

    def sample(model, **changes):
        return model(
            "a star", Image.new("RGB", (32, 32)), generator=torch.manual_seed(0), **arguments, **changes
        ).frames

    try:
        clips = [sample(told, motion=motion) for motion in (None, 0.0, 0.75)]
    finally:
        told.unet.encode = encode
    assert heard[0] is None and [each.tolist() for each in heard[1:]] == [[0.0, 0.0], [25.0, 25.0]]
    assert not np.array_equal(clips[0], clips[1]) and not np.array_equal(clips[1], clips[2])
    save_pipeline(told, tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(sample(again, motion=0.75), clips[2])
    with pytest.raises(UserError, match="motion=0.5, but the model was not trained with motion scores"):
        sample(tiny_training.pipeline(tmp_path / "base"), motion=0.5)
    with pytest.raises(UserError, match="motion"):
        sample(told, motion=1.5)


def test_the_config_decides_whether_clips_are_measured(tmp_path):
    config = tiny_training.make_config(tmp_path)
    videos = type("Data", (), {"build": staticmethod(Videos)})
    accelerator = type("Main", (), {"is_main_process": False})
    for changes, kind in (((), Videos), (OPTION, MotionClips)):
        model = tiny_training.options("microcinema", *changes)
        stub = type("Config", (), {"data": videos, "model": model, "seed": config.seed})
        assert type(build_clips(stub, accelerator)) is kind
