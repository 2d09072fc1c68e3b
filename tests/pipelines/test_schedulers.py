"""Every scheduler of diffusers on the image-to-video pipeline: it ends where it should, or is refused before it starts."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from fixtures import tiny, tiny_sampling
from fixtures.tiny_sampling import PROMPTS, Oracle, sample
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import make_sampler, make_scheduler
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def image():
    return tiny_sampling.image()


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample", "zero terminal SNR"])
def oracle(request, base):
    """A pipeline whose denoiser is an oracle, the clip that it knows, and the kind of its training schedule."""
    zero_snr = request.param == "zero terminal SNR"
    changes = {"prediction_type": "v_prediction" if zero_snr else request.param, "rescale_betas_zero_snr": zero_snr}
    training = make_scheduler(tiny.scheduler().config, changes)
    pipeline = tiny.video_pipeline(base)
    pipeline.register_to_config(training_schedule=dict(training.config))
    z0 = torch.randn(1, 4, tiny.LATENT_CHANNELS, 8, 8, generator=generator(3))
    pipeline.register_modules(unet=Oracle(pipeline.unet, training, z0))
    return pipeline, z0, request.param


# Largest error at the end, of latents with a standard deviation of 1: nothing but rounding, except for what the order of a solver or
# the noise of its last step leaves.
EXACT = [
    "DDIM",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LCM",
]
EXACT += ["KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"]
ERRORS = dict.fromkeys(EXACT, 1e-5) | {"PNDM": 0.02, "LMSDiscrete": 0.02}
ERRORS |= {"DEISMultistep": 0.15, "SASolver": 0.15, "TCD": 0.15}
# What diffusers' own do not know.
LACKING = {
    "sample": "EulerAncestralDiscrete KDPM2Discrete KDPM2AncestralDiscrete PNDM",
    "zero terminal SNR": "HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete PNDM DEISMultistep DPMSolverSinglestep SASolver",
}


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if name.endswith("Scheduler")))
def test_every_scheduler_of_diffusers_ends_at_the_clip_that_an_oracle_knows_or_is_refused(oracle, image, name):
    pipeline, z0, kind = oracle
    short = name.removesuffix("Scheduler")
    # Stable Diffusion's files end DDIM at the noise of step 0; at no noise the end is exactly z0.
    make = functools.partial(make_sampler, pipeline.training_scheduler, name, set_alpha_to_one=True)
    if short not in ERRORS or short in LACKING.get(kind, "").split():
        with pytest.raises(UserError) as error:
            make()
        assert "\n" not in str(error.value)
        return
    pipeline.register_modules(scheduler=make())
    z = sample(pipeline, PROMPTS[0], image, num_inference_steps=20, guidance_scale=1.0, output_type="latent")
    assert (z - z0).abs().max() < ERRORS[short]


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "SASolverScheduler"]
)
def test_schedulers_draw_a_videos_noise_from_its_own_generator(base, image, name):
    pipeline = tiny.video_pipeline(base)
    pipeline.scheduler = make_sampler(pipeline.training_scheduler, name)
    together = sample(pipeline, PROMPTS, image, seeds=(0, 1), output_type="latent")
    alone = sample(pipeline, PROMPTS[1], image, seeds=(1,), output_type="latent")
    assert torch.allclose(together[1:], alone, atol=1e-3)
    assert torch.equal(alone, sample(pipeline, PROMPTS[1], image, seeds=(1,), output_type="latent"))


def test_numbers_of_steps_that_a_scheduler_cannot_make_are_refused(base, image):
    pipeline = tiny.video_pipeline(base)
    for name, steps in [("DDIMScheduler", 1000), ("DDIMScheduler", 1001), ("LCMScheduler", 51)]:
        pipeline.scheduler = make_sampler(pipeline.training_scheduler, name, steps_offset=1)
        with pytest.raises(UserError, match=f"{name} cannot make {steps} steps"):
            sample(pipeline, PROMPTS[0], image, num_inference_steps=steps)


def test_a_scheduler_that_does_not_draw_from_the_given_generators_is_refused(base, image):
    pipeline = tiny.video_pipeline(base)
    pipeline.scheduler = make_sampler(pipeline.training_scheduler)
    pipeline.scheduler.register_to_config(noise_sampler_seed=0)
    with pytest.raises(UserError, match="its own generator"):
        sample(pipeline, PROMPTS[0], image)


def test_a_scheduler_that_disagrees_is_refused(base, image):
    pipeline = tiny.video_pipeline(base)
    for wrong in (
        DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, beta_end=0.02),
    ):
        pipeline.scheduler = wrong
        with pytest.raises(UserError, match="trained"):
            sample(pipeline, PROMPTS[0], image)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.training_scheduler.config)
    first, again = (sample(pipeline, PROMPTS[0], image) for _ in range(2))
    assert np.array_equal(first, again)  # also its noise comes from the given generator


def test_callback_gets_the_tensors_that_it_asks_for(oracle, image):
    pipeline, z0, kind = oracle
    pipeline.scheduler = make_sampler(pipeline.training_scheduler)
    seen = []

    def callback(pipe, step, t, values):
        seen.append(values["prediction"])
        assert torch.allclose(values["z0"], z0, atol=1e-4)  # which the oracle's prediction stands for

    names = ["prediction", "z0"]
    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 1.0}
    sample(pipeline, PROMPTS[0], image, **arguments)
    assert len(seen) == 3
    if kind == "sample":
        assert all(torch.equal(prediction, z0) for prediction in seen)
