"""Noise on the key frame: its distribution, the network that is told its level, and sampling with it."""

import pytest
import torch

from fixtures import tiny_training
from fixtures.tiny_unet import base, inputs, network, options, randomise
from microcinema.config.compose import compose
from microcinema.diffusion.rng import generator
from microcinema.training.loss import Batch, NullConditioning, make_loss_config, training_loss
from microcinema.training.trainer import Trainer
from microcinema.utils.errors import UserError

OPTION = ("model.keyframe_noise=true", "keyframe_noise=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    noised = tiny_training.pipeline(tmp_path_factory.mktemp("model"), network=OPTION)
    randomise(noised.unet)
    noised.set_progress_bar_config(disable=True)
    return noised


def config_of(model, folder, level: float):
    stub = tiny_training.make_config(folder)
    object.__setattr__(stub, "keyframe_noise", level)  # of the trainer alone; the model is the test's
    return make_loss_config(model, stub)


def test_the_level_rises_with_time_and_other_draws_stay(model, tmp_path):
    shape, indices = torch.Size((1, 4, 2, 2)), range(3000)
    plain, noised = (
        config_of(model, tmp_path, level).sample_noise_and_timesteps(indices, shape) for level in (0.0, 3.0)
    )
    assert plain.keyframe is None and plain.keyframe_level is None
    for name in ("noise", "t", "text_mask", "image_mask"):
        assert torch.equal(getattr(plain, name), getattr(noised, name))
    level = noised.keyframe_level
    assert level.min() > 0 and level.max() < 3 and noised.keyframe.std().item() == pytest.approx(1, abs=0.02)
    logit = torch.logit(level / 3)
    early, late = logit[noised.t < 300], logit[noised.t > 980]
    assert early.mean().item() == pytest.approx(-1, abs=0.1) and late.mean().item() == pytest.approx(0.9, abs=0.35)
    assert early.std().item() == pytest.approx(1, abs=0.08)
    assert abs(torch.corrcoef(torch.stack([noised.keyframe[:, 0, 0, 0], noised.noise[:, 0, 0, 0, 0]]))[0, 1]) < 0.06


def test_the_network_gets_the_noisy_key_frame_and_its_level_and_the_prior_the_clean_one(model, tmp_path):
    config, source = config_of(model, tmp_path, 2.0), generator(0)
    latents = torch.randn(2, 3, 4, 2, 2, generator=source)
    batch = Batch(latents, torch.zeros(2, 5, 6), torch.full((2,), 8.0), range(2))
    noise, seen = config.sample_noise_and_timesteps(batch.indices, latents.shape[1:]), {}

    def denoiser(z_t, t, text, z_ref, fps, image_mask, **given):
        seen.update(z_ref=z_ref, **given)
        return torch.zeros_like(z_t), None

    training_loss(denoiser, batch, noise, NullConditioning(torch.zeros(1, 5, 6)), config)
    expected = latents[:, 0] + noise.keyframe_level[:, None, None, None] * noise.keyframe
    assert torch.equal(seen["z_ref"], expected) and torch.equal(seen["keyframe_noise"], 100 * noise.keyframe_level)
    strength = config.prior.strength
    torch.testing.assert_close(config.noise(batch, noise), noise.noise + strength * latents[:, :1])


@torch.no_grad()
def test_the_network_starts_without_the_level_and_then_is_told():
    z_t, t, text, z_ref, fps = inputs(2)
    video = network(base(), "plain", *OPTION)

    def predict(level):
        return video(z_t, t, video.encode(text, z_ref, fps, keyframe_noise=torch.full((2,), level)))

    assert torch.equal(predict(0.0), predict(150.0))
    randomise(video)
    assert (predict(0.0) - predict(150.0)).abs().max() > 1e-3


def test_sampling_with_noise_differs_and_starts_from_the_same_noise(model, tmp_path):
    image, told = torch.rand(1, 3, 32, 32, generator=generator(3)), []
    encode = model.unet.encode
    model.unet.encode = lambda *args, **given: told.append(given["keyframe_noise"].tolist()) or encode(*args, **given)
    first: list[torch.Tensor] = []

    def sample(pipeline, **settings):
        settings = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.manual_seed(0), **settings}
        return pipeline("a star", image, **settings).frames

    def look(_, inputs):
        first.append(inputs[0])

    hook = model.unet.register_forward_pre_hook(look)
    try:
        clean, noisy = sample(model), sample(model, keyframe_noise=1.5)
    finally:
        model.unet.encode = encode
        hook.remove()
    assert [set(each) for each in told] == [{0.0}, {150.0}]
    assert torch.equal(first[0], first[1]) and not torch.equal(clean, noisy)
    with pytest.raises(UserError, match="keyframe_noise=1, but the model was trained without"):
        sample(tiny_training.pipeline(tmp_path), keyframe_noise=1.0)


def test_training_learns_the_level(tmp_path):
    fresh = tiny_training.pipeline(tmp_path / "base", network=OPTION)
    model_config = options("microcinema", "model.max_frames=8", *OPTION)
    changes = {"max_train_steps": 2, "num_frames": 4, "keyframe_noise": 2.0, "model": model_config}
    config = tiny_training.make_config(tmp_path / "run", **changes)
    Trainer(tiny_training.accelerator(config), fresh, tiny_training.LatentClips(), config).train()
    assert fresh.unet.keyframe_noise_embedding.linear_2.weight.any()


@pytest.mark.parametrize(
    "changes",
    [
        ["model.keyframe_noise=true"],
        ["keyframe_noise=1"],
    ],
)
def test_a_level_and_a_network_that_is_told_it_go_together(changes):
    with pytest.raises(UserError, match="keyframe_noise"):
        compose("train", changes)


def test_a_network_that_sees_the_clean_key_frame_refuses_it():
    for part in ("model.keyframe_places=true", "model.pixels={block: attention, scales: null}"):
        with pytest.raises(UserError, match="without noise"):
            network(base(), "plain", *OPTION, part, *["keyframe_places=0.5"] * ("places" in part))
