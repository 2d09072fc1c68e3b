"""Where sampling starts: closed forms on normal data, the filter of FrameInit, and the timesteps that are left."""

import pytest
import torch
from einops import rearrange

from fixtures import tiny_training
from microcinema.diffusion.initial_noise import initial_latents, low_pass
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import (
    make_sampler,
    make_scheduler,
    set_timesteps,
    signal_and_noise,
    timesteps_from,
    trial_fault,
)
from microcinema.utils.errors import UserError

TRAINING = make_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
PLAIN = NoisePrior("none", 0.0, 0.0)
MEAN, DEVIATION = 1.0, 0.5  # of the clips in every place, frame and channel


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def latents(kind: str, sampler, start_time: float, prior: NoisePrior = PLAIN) -> torch.Tensor:
    """Initial latents in the variance-preserving scale, for a key frame of the normal clips."""
    eps, z_ref = draw(2, 8, 4, 24, 24), MEAN + DEVIATION * draw(2, 4, 24, 24, seed=1)
    scheduler = set_timesteps(sampler, 20, start_time=start_time)
    return initial_latents(kind, prior, eps, z_ref, scheduler, start_time) * scheduler.init_noise_sigma


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
def test_by_default_sampling_starts_from_the_noise_prior(name):
    sampler, prior = make_sampler(TRAINING, f"{name}Scheduler"), NoisePrior("appearance", 0.3, 0.1)
    eps, z_ref = draw(1, 3, 2, 4, 4), draw(1, 2, 4, 4, seed=1)
    found = initial_latents("prior", prior, eps, z_ref, set_timesteps(sampler, 10), 1.0)
    assert torch.equal(found, prior.initial_noise(eps, z_ref))


def test_analytic_noise_is_the_nearest_normal_distribution_to_noisy_clips():
    """Of one variance in all channels, by the Kullback-Leibler divergence from clips whose channels have several."""
    sampler = set_timesteps(make_sampler(TRAINING), 20, start_time=0.8)
    signal, sigma = (float(x) for x in signal_and_noise(sampler, timesteps_from(sampler, 0.8)[0], torch.ones(1)))
    mean, deviation = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.6, 1.5])
    # A key frame whose places have exactly these moments.
    places = draw(1, 3, 16, 16)
    places = (places - places.mean((2, 3), True)) / places.std((2, 3), correction=0, keepdim=True)
    z_ref = rearrange(deviation, "c -> 1 c 1 1") * places + rearrange(mean, "c -> 1 c 1 1")
    eps = torch.stack([-torch.ones(3, 16, 16), torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])[None]
    low, middle, high = initial_latents("analytic", PLAIN, eps, z_ref, sampler, 0.8)[0]
    found_mean, found_deviation = middle[:, 0, 0], ((high - low) / 2).mean()
    noisy = torch.distributions.Normal(signal * mean, (signal**2 * deviation**2 + sigma**2).sqrt())

    def divergence(mean: torch.Tensor, deviation: torch.Tensor) -> float:
        return torch.distributions.kl_divergence(noisy, torch.distributions.Normal(mean, deviation)).sum().item()

    best = divergence(found_mean, found_deviation)
    torch.testing.assert_close(found_mean, noisy.mean, rtol=1e-4, atol=1e-4)
    for step in (-0.05, 0.05):
        assert best < divergence(found_mean, found_deviation + step)
        assert best < divergence(found_mean + step, found_deviation)
    assert best < divergence(torch.zeros(3), torch.tensor(1.0)) - 0.05  # standard noise


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete"])
def test_an_early_start_is_right_from_analytic_noise_alone(name):
    """The exact denoiser of normal clips takes noise of the right mean and deviation to the clips', and no other."""
    results = {}
    for kind in ("analytic", "prior"):
        sampler = make_sampler(TRAINING, f"{name}Scheduler")
        z = latents(kind, sampler, 0.6)
        for t in timesteps_from(sampler, 0.6):
            signal, sigma = signal_and_noise(sampler, t, z)
            z_t = sampler.scale_model_input(z, t)
            z0 = MEAN + signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2) * (z_t - signal * MEAN)
            z = sampler.step((z_t - signal * z0) / sigma, t, z).prev_sample
        results[kind] = z.mean().item(), z.std().item()
    assert results["analytic"] == (pytest.approx(MEAN, abs=0.05), pytest.approx(DEVIATION, abs=0.06))
    assert abs(results["prior"][0] - MEAN) > 0.1
    assert not trial_fault(make_sampler(TRAINING, f"{name}Scheduler"), 20, 0.6)


def test_the_noise_prior_is_in_analytic_noise():
    prior = NoisePrior("appearance", 0.4, 0.2)
    sampler = make_sampler(TRAINING)
    without, with_prior = (latents("analytic", sampler, 0.7, each) for each in (PLAIN, prior))
    sigma = signal_and_noise(sampler, timesteps_from(sampler, 0.7)[0], without)[1]
    z_ref = MEAN + DEVIATION * draw(2, 4, 24, 24, seed=1)
    expected = (sigma * 0.4 * z_ref[:, None]).expand_as(without)
    torch.testing.assert_close(with_prior - without, expected, rtol=1e-4, atol=1e-4)


def test_the_filter_keeps_what_is_constant_and_little_of_the_rest():
    x = draw(1, 8, 2, 16, 16)
    torch.testing.assert_close(low_pass(torch.ones_like(x)), torch.ones_like(x))
    alternating = torch.ones_like(x) * torch.tensor([1.0, -1.0]).repeat(8)
    assert low_pass(alternating).abs().max() < 1e-3
    assert 0.01 < low_pass(x).var() / x.var() < 0.1
    torch.testing.assert_close(low_pass(x).mean(), x.mean())


def test_frame_init_has_the_low_frequencies_of_the_diffused_key_frame():
    eps, sampler = draw(1, 8, 2, 16, 16), set_timesteps(make_sampler(TRAINING), 20)
    still = torch.ones(1, 2, 16, 16) * 3
    z = initial_latents("frame_init", PLAIN, eps, still, sampler, 1.0)
    signal, sigma = signal_and_noise(TRAINING, torch.tensor(0.85 * 999), eps)
    torch.testing.assert_close(z.mean((1, 3, 4)), (signal * 3 + sigma * eps).mean((1, 3, 4)))
    moved = z - (signal * 3)
    torch.testing.assert_close(moved - low_pass(moved), eps - low_pass(eps), rtol=1e-3, atol=0.2)
    assert moved.var() / eps.var() > 0.98  # of independent noises, one by the filter and one by the rest, less is left


def test_an_early_start_leaves_the_timesteps_that_are_not_later():
    sampler = set_timesteps(make_sampler(TRAINING, timestep_spacing="trailing"), 10)
    left = timesteps_from(sampler, 0.7).tolist()
    assert left == [t for t in sampler.timesteps.tolist() if t <= 0.7 * 999] and 0 < len(left) < 10
    heun = timesteps_from(set_timesteps(make_sampler(TRAINING, "HeunDiscreteScheduler"), 10), 0.7)
    assert len(heun) % 2 == 1 and heun[0] != heun[1]
    with pytest.raises(UserError, match="start_time=0 leaves no step"):
        timesteps_from(sampler, 0.0)


def test_the_pipeline_starts_where_it_is_asked_to(tmp_path):
    model = tiny_training.pipeline(tmp_path)
    model.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=generator(3))

    def sample(**settings):
        rng = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 4, "output_type": "latent", "generator": rng, **settings}
        return model("a star", image, **settings).frames

    clips = [sample(), sample(start_time=0.8), sample(start_time=0.8, initial_noise="analytic")]
    assert model.num_timesteps == 3
    clips.append(sample(initial_noise="frame_init"))
    assert all(clip.isfinite().all() for clip in clips)
    assert all(not torch.equal(a, b) for k, a in enumerate(clips) for b in clips[:k])
    with pytest.raises(UserError, match="initial_noise"):
        sample(initial_noise="loud")
