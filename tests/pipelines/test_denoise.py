"""The sampling loop with noise priors: schedulers see plain diffusion, the network what it was trained with."""

from types import SimpleNamespace

import pytest
import torch

from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import PREDICTION_TYPES, make_sampler, make_scheduler, set_timesteps
from microcinema.pipelines.denoise import StepCallback, denoise
from microcinema.pipelines.long_video import Windows
from scripts.recipes import sampler_table
from scripts.recipes.sampler_table import STABLE_DIFFUSION, ZERO_SNR, measure

SHAPE, STEPS = (2, 5, 4, 3, 3), 10  # steps of 100: DDIM rounds other numbers to whole steps of training
PLAIN = Guidance(1.0, 1.0)
PRIORS = [NoisePrior("appearance", 0.3, 0.1), NoisePrior("mixed", 2.0, 0.1), NoisePrior("progressive", 0.7, 0.0)]


class Network:
    """Any function that is neither linear nor the same at all times, in float64."""

    dtype = torch.float64

    def __init__(self):
        self.seen = []

    def __call__(self, z_t, t, conditions):
        self.seen.append(z_t)
        return torch.tanh(z_t.roll(1, dims=1) + z_t * (0.5 + float(t) / 1000))


def sample(scheduler, prior, callback=None, network=None, guidance=PLAIN, dtype=torch.float64):
    """z0, the network, the key frame and z_T."""
    z_ref = torch.randn(SHAPE[0], *SHAPE[2:], dtype=dtype, generator=generator(1))
    eps = torch.randn(SHAPE, dtype=dtype, generator=generator(2))
    z_T, network = prior.initial_noise(eps, z_ref), network or Network()
    set_timesteps(scheduler, STEPS)
    bar = SimpleNamespace(update=lambda n: None, total=STEPS, n=0)
    windows, step_end = Windows(SHAPE[1], SHAPE[1]), StepCallback(None, callback, ("latents",))
    inputs = (None, guidance, windows, None, generator(3), step_end, bar)
    return denoise(network, scheduler, z_T, prior, z_ref, *inputs), network, z_ref, z_T


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_samplers_without_noise_of_their_own_give_what_they_give_on_the_networks_latents(
    prior, prediction_type, spacing
):
    """Their steps are linear, so that a change of variables and back changes nothing but the last digits."""
    zero_snr = ZERO_SNR if spacing == "trailing" and prediction_type != "epsilon" else {}
    changes = {**zero_snr, "prediction_type": prediction_type}
    training = make_scheduler({**STABLE_DIFFUSION, "set_alpha_to_one": True}, changes)
    names = ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"]
    names += [] if spacing == "linspace" else ["DDIM"]  # which goes by whole steps of training there
    for name in names:
        scheduler = make_sampler(training, f"{name}Scheduler", timestep_spacing=spacing)
        ours, network, _, z_T = sample(scheduler, prior)
        scheduler.set_timesteps(STEPS)
        z, plain = z_T * scheduler.init_noise_sigma, Network()
        for t in scheduler.timesteps:
            z = scheduler.step(plain(scheduler.scale_model_input(z, t), t, None), t, z).prev_sample
        torch.testing.assert_close(network.seen[0], plain.seen[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, z, rtol=0, atol=2e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
def test_under_autocast_the_network_alone_is_in_low_precision(prior):
    """UniPC's steps, guidance and correlated noise are sums of products, which autocast would round."""
    seen = []

    def network(z_t, t, conditions):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(z_t.roll(1, dims=1) + z_t * (0.5 + float(t) / 1000))

    def latents(enabled):
        network.dtype = torch.float32
        training = make_scheduler({**STABLE_DIFFUSION, "set_alpha_to_one": True}, {"prediction_type": "v_prediction"})
        scheduler = make_sampler(training, "UniPCMultistepScheduler")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return sample(scheduler, prior, network=network, guidance=Guidance(7.5, 2.0), dtype=torch.float32)[0]

    plain, cast = latents(False), latents(True)
    assert seen == [False] * STEPS + [True] * STEPS
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
def test_callbacks_get_and_return_latents_of_the_clip(prior):
    training = make_scheduler({**STABLE_DIFFUSION, "set_alpha_to_one": True}, {"prediction_type": "v_prediction"})
    scheduler, last = make_sampler(training), []
    z0, *_ = sample(scheduler, prior, lambda pipe, step, t, tensors: last.append(tensors["latents"]))
    assert torch.equal(last[-1], z0)
    again, *_ = sample(scheduler, prior, lambda pipe, step, t, tensors: {"latents": tensors["latents"].clone()})
    assert torch.equal(again, z0)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerAncestralDiscrete"])
def test_clips_have_the_right_distribution_only_if_the_loop_knows_the_prior(name):
    """With noise of their own in the place of the prior's, samplers lose the key frame, or the correlation between frames."""
    training = make_scheduler(STABLE_DIFFUSION, {"prediction_type": "v_prediction"})
    sampler = make_sampler(training, f"{name}Scheduler")
    for prior in sampler_table.PRIORS.values():
        assert measure(training, sampler, prior).verdict == "right", prior
    unaware = NoisePrior("none")
    verdicts = [measure(training, sampler, prior, unaware).verdict for prior in sampler_table.PRIORS.values()]
    wrong = ["right", "wrong mean", "wrong mean", "wrong correlation", "wrong correlation"]
    assert verdicts == (["right"] * 5 if name == "DDIM" else wrong)
    strong = measure(training, sampler, sampler_table.PRIORS["appearance 0.3"], unaware)
    assert strong.mean == pytest.approx(1.0 if name == "DDIM" else 0.68, abs=0.02)
