from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from microcinema.data.optical_flow import Flow
from microcinema.diffusion.losses import add_noise, motion_weights, target
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.training.loss import Batch, LossConfig, NullConditioning, TrainingNoise, training_loss

SHAPE = torch.Size((3, 4, 2, 2))


def loss_config(**changes) -> LossConfig:
    settings = {
        "scheduler": DDPMScheduler(clip_sample=False),
        "prior": NoisePrior("appearance", 0.5),
        "keyframe_position": "center",
        "snr_gamma": None,
        "motion_weight": 0.0,
        "timestep_logit_normal": None,
        "flow_weight": 0.1,
        "text_dropout": 0.25,
        "image_dropout": 0.5,
        "seed": 3,
    }
    return LossConfig(**{**settings, **changes})


def batch(size: int = 2) -> Batch:
    source = generator(0)
    latents = torch.randn(size, *SHAPE, generator=source)
    return Batch(latents, torch.randn(size, 5, 6, generator=source), torch.full((size,), 8.0), range(size))


def test_draws_of_a_clip_depend_on_its_number_alone():
    together = loss_config().sample_noise_and_timesteps([4, 5, 6], SHAPE)
    alone = loss_config().sample_noise_and_timesteps([5], SHAPE)
    for name in ("noise", "t", "text_mask", "image_mask"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(loss_config(seed=4).sample_noise_and_timesteps([5], SHAPE).noise, alone.noise)
    # Longer or larger clips keep their diffusion step and dropout.
    assert torch.equal(loss_config().sample_noise_and_timesteps([4, 5, 6], torch.Size((9, 4, 3, 3))).t, together.t)


def test_dropout_is_independent_and_as_frequent_as_configured():
    noise = loss_config().sample_noise_and_timesteps(range(4000), torch.Size((1, 1, 1, 1)))
    no_text, no_image = ~noise.text_mask, ~noise.image_mask
    assert no_text.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert no_image.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (no_text & no_image).float().mean().item() == pytest.approx(0.125, abs=0.02)
    assert noise.t.float().mean().item() == pytest.approx(499.5, abs=20)
    assert noise.t.min() < 5 and noise.t.max() > 994
    kept = loss_config(text_dropout=0.0, image_dropout=0.0).sample_noise_and_timesteps(
        range(500), torch.Size((1, 1, 1, 1))
    )
    assert kept.text_mask.all() and kept.image_mask.all()
    dropped = loss_config(text_dropout=1.0, image_dropout=1.0).sample_noise_and_timesteps(
        range(500), torch.Size((1, 1, 1, 1))
    )
    assert not dropped.text_mask.any() and not dropped.image_mask.any()


def test_diffusion_steps_follow_the_logit_normal_distribution():
    t = (
        loss_config(timestep_logit_normal=(0.8, 1.2))
        .sample_noise_and_timesteps(range(4000), torch.Size((1, 1, 1, 1)))
        .t
    )
    logit = torch.logit((t + 0.5) / 1000)
    assert logit.mean().item() == pytest.approx(0.8, abs=0.06)
    assert logit.std().item() == pytest.approx(1.2, abs=0.06)
    far = (
        loss_config(timestep_logit_normal=(40.0, 1.0)).sample_noise_and_timesteps(range(9), torch.Size((1, 1, 1, 1))).t
    )
    assert (far == 999).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_denoiser_that_knows_the_target_has_no_loss(kind):
    config = loss_config(scheduler=DDPMScheduler(prediction_type=kind, clip_sample=False), snr_gamma=5.0)
    clips = batch()
    noise = config.sample_noise_and_timesteps(clips.indices, SHAPE)
    eps_hat = noise.noise + 0.5 * clips.latents[:, 1:2]

    def oracle(z_t, t, text, z_ref, fps, image_mask):
        assert torch.equal(z_ref, clips.latents[:, 1])
        torch.testing.assert_close(z_t, add_noise(config.scheduler, clips.latents, eps_hat, t))
        return target(config.scheduler, clips.latents, eps_hat, t), None

    torch.testing.assert_close(
        training_loss(oracle, clips, noise, NullConditioning(torch.zeros(1, 5, 6)), config).total, torch.zeros(2)
    )


def test_the_loss_of_a_silent_denoiser_is_the_weighted_power_of_the_target():
    clips, noise = batch(), loss_config().sample_noise_and_timesteps([7, 8], SHAPE)
    power = ((noise.noise + 0.5 * clips.latents[:, 1:2]) ** 2).mean(dim=(1, 2, 3, 4))

    def silent(z_t, *conditions):
        return torch.zeros_like(z_t), None

    plain = training_loss(silent, clips, noise, NullConditioning(torch.zeros(1, 5, 6)), loss_config()).total
    torch.testing.assert_close(plain, power)
    abar = DDPMScheduler().alphas_cumprod[noise.t]
    weight = torch.clamp(5.0 * (1 - abar) / abar, max=1)  # min(snr, 5) / snr
    weighted = training_loss(
        silent, clips, noise, NullConditioning(torch.zeros(1, 5, 6)), loss_config(snr_gamma=5.0)
    ).total
    torch.testing.assert_close(weighted, weight * power)


def test_what_moves_weighs_more():
    clips, noise = batch(), loss_config().sample_noise_and_timesteps([7, 8], SHAPE)
    clips.latents[:] = clips.latents[:, 1:2]  # nothing moves
    clips.latents[0, 0, :, 0, 0] += 0.25  # but one place, a little, and another, a lot
    clips.latents[1, 2, :, 1, 1] += 40.0
    weights = torch.ones(2, 1, 1, *SHAPE[2:])
    weights[0, ..., 0, 0], weights[1, ..., 1, 1] = 1 + 4 * 0.25, 1 + 4
    torch.testing.assert_close(motion_weights(clips.latents, clips.latents[:, 1], 4.0), weights)

    def silent(z_t, *conditions):
        return torch.zeros_like(z_t), None

    power = (noise.noise + 0.5 * clips.latents[:, 1:2]) ** 2
    weighted = training_loss(
        silent, clips, noise, NullConditioning(torch.zeros(1, 5, 6)), loss_config(motion_weight=4.0)
    ).total
    torch.testing.assert_close(weighted, (weights * power).mean(dim=(1, 2, 3, 4)))


def test_a_dropped_caption_is_the_empty_one_and_a_dropped_image_is_told():
    clips = batch()
    empty = torch.full((1, 5, 6), 9.0)
    keep = TrainingNoise(
        torch.zeros(2, *SHAPE), torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([False, True])
    )
    seen = {}

    def spy(z_t, t, text, z_ref, fps, image_mask):
        seen.update(text=text, fps=fps, image_mask=image_mask)
        return z_t, None

    training_loss(spy, clips, keep, NullConditioning(empty), loss_config())
    assert torch.equal(seen["text"], torch.stack([clips.text[0], empty[0]]))
    assert seen["image_mask"].tolist() == [False, True]
    assert seen["fps"].tolist() == [8.0, 8.0]


def test_the_flow_loss_joins_where_predict_net_speaks():
    clips, config = batch(), loss_config(flow_weight=0.5)
    noise = config.sample_noise_and_timesteps(clips.indices, SHAPE)
    wanted = torch.zeros(2, SHAPE[0] - 1, 2, *SHAPE[2:])
    valid = torch.ones(2, SHAPE[0] - 1, *SHAPE[2:], dtype=torch.bool)
    with_flow = replace(clips, flow=Flow(wanted, valid))

    def denoiser(z_t, *conditions):
        return torch.zeros_like(z_t), torch.full_like(wanted, 3.0)

    null = NullConditioning(torch.zeros(1, 5, 6))
    plain = training_loss(denoiser, clips, noise, null, config)
    joined = training_loss(denoiser, with_flow, noise, null, config)
    assert plain.flow is None
    torch.testing.assert_close(joined.flow, torch.full((2,), 18**0.5), atol=2e-3, rtol=1e-3)  # at any noise
    torch.testing.assert_close(joined.total, plain.total + 0.5 * joined.flow)


def test_motion_captions_are_dropped_with_the_text():
    clips = replace(batch(), motion_tokens=torch.ones(2, 3, 4), image={"pixels": torch.zeros(2, 3, 8, 8)})
    keep = TrainingNoise(
        torch.zeros(2, *SHAPE), torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([True, True])
    )
    seen = {}

    def spy(z_t, *conditions, **read):
        seen.update(read)
        return z_t, None

    training_loss(spy, clips, keep, NullConditioning(torch.zeros(1, 5, 6), torch.full((1, 3, 4), 7.0)), loss_config())
    assert seen["pixels"] is clips.image["pixels"]
    assert seen["motion_tokens"][:, 0, 0].tolist() == [1, 7]
