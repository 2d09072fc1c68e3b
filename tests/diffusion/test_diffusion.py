"""The mathematics of microcinema.diffusion by closed forms, round trips and oracles, in float64."""

import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion import losses
from microcinema.diffusion.guidance import Guidance, GuidedDenoiser
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import (
    PREDICTION_TYPES,
    alphas_cumprod,
    check_sampler,
    check_schedules_agree,
    make_sampler,
    make_scheduler,
    match_snr_timesteps,
    predicted_z0_gains,
    right_samplers,
    set_timesteps,
    shifted_betas,
    signal_and_noise,
    snr,
    step_arguments,
    trial_fault,
)
from microcinema.utils.errors import UserError

SD15 = {  # the scheduler file of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def double(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


@pytest.fixture
def clip():
    random = generator(0, 1)
    z0, eps = torch.randn(2, 2, 5, 4, 3, 3, dtype=torch.float64, generator=random)
    z_ref = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=random)
    return z0, eps, z_ref


# ---------------------------------------------------------------- schedule

FACTORIZED = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift": 2.0,
}


def test_the_last_step_of_zero_terminal_snr_has_exactly_no_signal():
    for overrides in (FACTORIZED, {**FACTORIZED, "snr_shift": None}):
        scheduler = make_scheduler(SD15, overrides)
        assert scheduler.alphas_cumprod[-1].item() == 0.0
        assert (scheduler.alphas_cumprod.diff() < 0).all()
        sampler = make_sampler(scheduler)
        sampler.set_timesteps(20)
        assert sampler.timesteps[0].item() == 999  # the spacing reaches it
        assert sampler.alphas_cumprod[-1].item() == 0.0


@pytest.mark.parametrize("shift", [0.5, 2.0, 3.0])
def test_the_snr_shift_is_its_closed_form(shift):
    plain = make_scheduler(SD15)
    shifted = make_scheduler(SD15, {"snr_shift": shift})
    steps = torch.arange(1000)
    torch.testing.assert_close(snr(shifted, steps), snr(plain, steps) / shift**2, rtol=2e-3, atol=0)
    betas = shifted_betas(plain.alphas_cumprod.double(), shift)
    abar = plain.alphas_cumprod.double()
    torch.testing.assert_close(torch.cumprod(1 - betas, 0), abar / (abar + shift**2 * (1 - abar)), rtol=1e-12, atol=0)
    torch.testing.assert_close(make_scheduler(SD15, {"snr_shift": 1.0}).betas, plain.betas)


def test_a_shifted_schedule_is_kept_by_what_saves_and_samples_it(tmp_path):
    training = make_scheduler(SD15, FACTORIZED)
    training.save_pretrained(tmp_path)
    again = make_scheduler(DDIMScheduler.load_config(tmp_path))
    torch.testing.assert_close(again.alphas_cumprod, training.alphas_cumprod, rtol=1e-4, atol=1e-9)
    check_schedules_agree(training, make_sampler(again, "DDIMScheduler"))
    with pytest.raises(UserError, match="snr_shift is -1"):
        make_scheduler(SD15, {"snr_shift": -1.0})


def test_an_oracle_of_v_recovers_the_clip_from_pure_noise(clip):
    z0, eps, _ = clip
    training = make_scheduler(SD15, FACTORIZED)
    sampler = double(make_sampler(training))
    sampler.set_timesteps(10)
    z = eps  # nothing of z0 is in it
    for t in sampler.timesteps:
        signal, sigma = sampler.alphas_cumprod[t] ** 0.5, (1 - sampler.alphas_cumprod[t]) ** 0.5
        implied = (z - signal * z0) / sigma
        z = sampler.step(signal * implied - sigma * z0, t, z).prev_sample
    torch.testing.assert_close(z, z0, rtol=0, atol=1e-6)
    first = losses.target(training, z0, eps, torch.full((len(z0),), 999))
    torch.testing.assert_close(first, -z0)


def test_training_schedule_is_the_bases_and_never_clips():
    scheduler = make_scheduler(SD15)
    assert torch.equal(scheduler.alphas_cumprod, PNDMScheduler.from_config(SD15).alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.clip_sample is False
    assert make_scheduler({**SD15, "clip_sample": True}).config.clip_sample is False
    v = make_scheduler(SD15, {"prediction_type": "v_prediction", "beta_schedule": None})
    assert v.config.prediction_type == "v_prediction"
    assert v.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"]
)
def test_samplers_keep_the_training_schedule(name, tmp_path):
    training = make_scheduler(SD15, {"prediction_type": "v_prediction"})
    sampler = make_sampler(training, name)
    assert type(sampler).__name__ == name
    assert not sampler.config.get("clip_sample")
    sampler.save_pretrained(tmp_path)
    check_schedules_agree(training, type(sampler).from_pretrained(tmp_path))


def test_sampler_keeps_settings_the_training_class_has_not():
    assert make_sampler(make_scheduler(SD15)).config.set_alpha_to_one is False


def test_disagreeing_schedules_are_refused():
    training = make_scheduler(SD15)
    for other, word in [
        (DDIMScheduler.from_config(training.config, prediction_type="v_prediction"), "prediction_type"),
        (DDIMScheduler.from_config(training.config, beta_end=0.02), "alpha_bar"),
        (DPMSolverMultistepScheduler.from_config(training.config, num_train_timesteps=500), "num_train_timesteps"),
        (DDIMScheduler.from_config(training.config, clip_sample=True), "clip"),
        (EulerDiscreteScheduler.from_config(training.config, beta_schedule="linear"), "alpha_bar"),
    ]:
        with pytest.raises(UserError, match=word):
            check_schedules_agree(training, other)


def test_bad_schedules_are_named():
    with pytest.raises(UserError, match="no betas"):
        make_scheduler(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(UserError, match="beta_ende"):
        make_scheduler(SD15, {"beta_ende": 0.1})
    with pytest.raises(UserError, match="guess"):
        make_scheduler(SD15, {"prediction_type": "guess"})
    with pytest.raises(UserError, match="NoScheduler"):
        make_sampler(make_scheduler(SD15), "NoScheduler")


def test_epsilon_with_zero_terminal_snr_is_refused():
    """The last step holds nothing of the clip, and epsilon predicted there says nothing of it either."""
    for overrides in ({"rescale_betas_zero_snr": True}, {**FACTORIZED, "prediction_type": None}):
        with pytest.raises(UserError, match="zero terminal SNR.*prediction_type=v_prediction"):
            make_scheduler(SD15, overrides)
    for kind in ("v_prediction", "sample"):
        assert make_scheduler(SD15, {**FACTORIZED, "prediction_type": kind}).alphas_cumprod[-1] == 0


def test_a_refusal_names_the_samplers_that_are_right():
    for overrides, wrong in [
        (FACTORIZED, ["HeunDiscrete", "FlowMatchEulerDiscrete"]),
        ({"prediction_type": "sample"}, ["EulerAncestralDiscrete", "DDIMInverse"]),
    ]:
        training = make_scheduler(SD15, overrides)
        right = right_samplers(training)
        assert {"DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"} <= set(right)
        for name in wrong:
            assert f"{name}Scheduler" not in right
            with pytest.raises(UserError, match=f"^{name}Scheduler does not sample .*; use {', '.join(right)}$"):
                make_sampler(training, f"{name}Scheduler")


class HalfTheMean(DDIMScheduler):
    """Finite, and wrong."""

    def step(self, *arguments, **settings):
        result = super().step(*arguments, **settings)
        return type(result)(prev_sample=result.prev_sample - 0.05)


def test_a_trial_looks_at_the_numbers():
    training = make_scheduler(SD15)
    assert "the mean became 0." in trial_fault(HalfTheMean.from_config(training.config))
    with pytest.raises(UserError, match="HalfTheMean does not sample this model"):
        check_sampler(training, HalfTheMean.from_config(training.config))
    assert trial_fault(DDIMScheduler.from_config(training.config)) == ""


@pytest.mark.parametrize(
    "name, overrides, steps, words",
    [
        ("DDIM", FACTORIZED, 400, "the mean became 0.8"),  # it jumps by 2 steps of training, but stops at every 2.5th
        ("UniPCMultistep", {}, 1000, "not finite"),
        ("HeunDiscrete", {}, 2, "deviation"),
    ],
)
def test_numbers_of_steps_that_give_wrong_numbers_are_refused(name, overrides, steps, words):
    sampler = make_sampler(make_scheduler(SD15, overrides), f"{name}Scheduler")
    assert set_timesteps(sampler, 20) is sampler
    with pytest.raises(UserError, match=f"{name}Scheduler does not work with {steps} steps .*{words}"):
        set_timesteps(sampler, steps)


def sampled(sampler, mean=1.0, deviation=0.5):
    """The mean of numbers that are sampled from pure noise, as videos are, with the denoiser of their closed form."""
    rng = torch.Generator().manual_seed(0)
    z = sampler.init_noise_sigma * torch.randn(1, 1, 1, 1, 8192, generator=rng)
    for t in sampler.timesteps:
        z_t, (signal, sigma) = sampler.scale_model_input(z, t), signal_and_noise(sampler, t, z)
        z0 = mean + signal * deviation**2 / (signal**2 * deviation**2 + sigma**2) * (z_t - signal * mean)
        z = sampler.step((z_t - signal * z0) / sigma, t, z, **step_arguments(sampler, rng)).prev_sample
    return z.mean().item()


@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_sampling_begins_near_pure_noise_whatever_the_number_of_steps(name, spacing):
    """With leading spacing one step began at t = 1, and saved the noise."""
    training = make_scheduler(SD15, {"prediction_type": "epsilon"})
    for steps in (1, 2, 5, 6, 10, 25):
        sampler = make_sampler(training, f"{name}Scheduler", timestep_spacing=spacing)
        try:
            chosen = set_timesteps(sampler, steps)
        except UserError:
            assert (name, spacing) == ("DDIM", "linspace")  # whose steps do not end at zero
            continue
        assert abs(sampled(chosen) - 1) <= 0.08  # 0.034 by the schedule itself, whose last step has a signal of 0.068
        assert chosen.timesteps[0] > 820
        if steps >= 10:  # of two kinds of spacing one is a matter of taste
            assert chosen is sampler and chosen.config.timestep_spacing == spacing
        assert sampler.config.timestep_spacing == spacing  # the next call may have more steps


def test_noise_levels_between_two_steps_are_interpolated(clip):
    scheduler, (z, *_) = double(make_scheduler(SD15)), clip
    abar = scheduler.alphas_cumprod
    for t, expected in [(7, abar[7]), (7.0, abar[7]), (7.25, 0.75 * abar[7] + 0.25 * abar[8]), (999.0, abar[999])]:
        signal, sigma = signal_and_noise(scheduler, torch.tensor(t), z)
        torch.testing.assert_close(signal.flatten() ** 2, expected[None])
        torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))


def test_snr_is_its_definition():
    scheduler = double(make_scheduler(SD15))
    t = torch.tensor([0, 500, 999])
    abar = torch.cumprod(1 - scheduler.betas.double(), 0)[t]
    assert torch.allclose(snr(scheduler, t), abar / (1 - abar), rtol=1e-4)


# ---------------------------------------------------------------- noise prior: the three exact facts of method.md


@pytest.mark.parametrize("kind", ["none", "appearance", "mixed", "progressive"])
def test_strength_zero_is_the_schedulers_own_add_noise(kind, clip):
    z0, eps, z_ref = clip
    scheduler = make_scheduler(SD15)
    t = torch.tensor([17, 801])
    ours = losses.add_noise(scheduler, z0, NoisePrior(kind, 0.0).noise(eps, z_ref), t)
    assert torch.equal(ours, scheduler.add_noise(z0, eps, t))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("prior", [NoisePrior("appearance", 0.3), NoisePrior("mixed", 1.0)])
def test_oracle_lets_ddim_recover_the_clip(prediction_type, prior, clip):
    z0, eps, z_ref = clip
    training = double(make_scheduler({**SD15, "set_alpha_to_one": True}, {"prediction_type": prediction_type}))
    sampler = double(make_sampler(training))
    sampler.set_timesteps(20)
    noise = prior.noise(eps, z_ref)
    z = losses.add_noise(training, z0, noise, sampler.timesteps[:1])
    for t in sampler.timesteps:
        z = sampler.step(losses.target(training, z0, noise, t), t, z).prev_sample
    assert torch.allclose(z, z0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_mean_of_noisy_latents(prediction_type, clip):
    """Averaging over eps and -eps is the exact mean, since eps is symmetric and z_t affine in it."""
    z0, eps, z_ref = clip
    scheduler, prior, t = (
        make_scheduler(SD15, {"prediction_type": prediction_type}),
        NoisePrior("appearance", 0.3),
        torch.tensor([3, 700]),
    )
    mean = sum(losses.add_noise(scheduler, z0, prior.noise(sign * eps, z_ref), t) for sign in (1, -1)) / 2
    abar = alphas_cumprod(scheduler).double()[t].reshape(2, 1, 1, 1, 1)
    assert torch.allclose(mean, abar.sqrt() * z0 + (1 - abar).sqrt() * 0.3 * z_ref[:, None], atol=1e-12)
    # and of the target, which is what makes the network subtract the key frame again
    target = sum(losses.target(scheduler, z0, prior.noise(sign * eps, z_ref), t) for sign in (1, -1)) / 2
    wanted = {
        "epsilon": 0.3 * z_ref[:, None].expand_as(z0),
        "v_prediction": abar.sqrt() * 0.3 * z_ref[:, None] - (1 - abar).sqrt() * z0,
        "sample": z0,
    }
    assert torch.allclose(target, wanted[prediction_type], atol=1e-12)


def test_sampling_starts_at_the_key_frames_noise(clip):
    _, eps, z_ref = clip
    z_T = NoisePrior("appearance", 0.03, gamma=0.02).initial_noise(eps, z_ref)
    assert torch.allclose(z_T, eps + 0.05 * z_ref[:, None], atol=1e-14)
    assert torch.equal(NoisePrior("none", gamma=0.0).initial_noise(eps, z_ref), eps)


def test_gamma_by_default_gives_back_the_signal_that_sampling_lacks():
    for prior, abar_T, gamma in [
        (NoisePrior("appearance"), 0.0047, 0.02),
        (NoisePrior("appearance"), 0.0, 0.0),
        (NoisePrior("appearance", gamma=0.5), 0.0, 0.5),
        (NoisePrior("appearance", gamma=0.0), 0.0047, 0.0),
        (NoisePrior("progressive"), 0.0047, 0.0),
    ]:
        assert prior.resolve(abar_T) == NoisePrior(prior.kind, 0.03, gamma)


@pytest.mark.parametrize("frames", [1, 6])
def test_correlated_priors_have_pyocos_covariance(frames):
    """noise() is linear, so its response to unit vectors is its matrix M, and its covariance M M^T, exactly."""
    basis = torch.eye(frames, dtype=torch.float64).reshape(frames, frames, 1, 1, 1)  # clip g is one at frame g
    a = 2.0
    shared, step = a**2 / (1 + a**2), a / (1 + a**2) ** 0.5
    i = torch.arange(frames)
    gap = (i[:, None] - i).abs().double()
    wanted = {"mixed": torch.where(gap == 0, 1.0, shared).double(), "progressive": step**gap}
    for kind, covariance in wanted.items():
        root = (
            NoisePrior(kind, a)
            .noise(basis, torch.zeros(frames, 1, 1, 1, dtype=torch.float64))
            .reshape(frames, frames)
            .T
        )
        assert torch.allclose(root @ root.T, covariance, atol=1e-12), kind
        assert torch.allclose((root @ root.T).diagonal(), torch.ones(frames, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "appearance", "mixed", "progressive"])
def test_whitening_undoes_the_correlation_of_frames(kind, clip):
    _, eps, z_ref = clip
    prior = NoisePrior(kind, 1.5)
    noise = prior.noise(eps, z_ref)
    torch.testing.assert_close(prior.whiten(noise - prior.mean(z_ref, eps.shape[1])), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(prior.correlate(prior.whiten(noise)), noise, rtol=0, atol=1e-12)
    correlated = not torch.equal(prior.correlate(eps), eps)
    assert correlated == (kind in ("mixed", "progressive"))


def test_progressive_noise_is_pyocos_recursion():
    eps = torch.randn(1, 7, 1, 1, 1, dtype=torch.float64, generator=generator(3))
    a, noise = 1.5, NoisePrior("progressive", 1.5).noise(eps, torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    previous = eps[:, 0]
    for frame in range(1, 7):
        previous = a / (1 + a**2) ** 0.5 * previous + eps[:, frame] / (1 + a**2) ** 0.5
        assert torch.allclose(noise[:, frame], previous, atol=1e-12)


def test_bad_priors_are_named():
    with pytest.raises(UserError, match="pink"):
        NoisePrior("pink")
    with pytest.raises(UserError, match="-1"):
        NoisePrior(strength=-1)
    with pytest.raises(UserError, match="nan"):
        NoisePrior(gamma=float("nan"))


def test_reference_frame():
    assert [keyframe_index(r, 16) for r in ("first", "center", 15)] == [0, 8, 15]
    assert keyframe_index("center", 1) == 0
    for bad in ("last", 16, -1, 1.5, True):
        with pytest.raises(UserError, match="keyframe_position="):
            keyframe_index(bad, 16)


# ---------------------------------------------------------------- objective


def predicted_sample(scheduler, prediction, z_t, t):
    """The `z0` implied by a prediction at `z_t`: the inverse of `losses.target`."""
    kind = scheduler.config["prediction_type"]
    signal, sigma = signal_and_noise(scheduler, t, z_t)
    if kind == "sample":
        return prediction
    return (z_t - sigma * prediction) / signal if kind == "epsilon" else signal * z_t - sigma * prediction


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predicted_sample_inverts_target(prediction_type, clip):
    z0, eps, _ = clip
    scheduler = make_scheduler(SD15, {"prediction_type": prediction_type})
    t = torch.tensor([5, 990])
    z_t, wanted = losses.add_noise(scheduler, z0, eps, t), losses.target(scheduler, z0, eps, t)
    assert torch.allclose(predicted_sample(scheduler, wanted, z_t, t), z0, atol=1e-10)


def test_velocity_is_the_schedulers_own(clip):
    z0, eps, _ = clip
    scheduler = make_scheduler(SD15, {"prediction_type": "v_prediction"})
    t = torch.tensor([5, 990])
    assert torch.equal(losses.target(scheduler, z0, eps, t), scheduler.get_velocity(z0, eps, t))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_one_weight_on_the_sample(prediction_type, clip):
    """Whatever is predicted, the weighted error is min(snr, gamma) times the error of the z0 it stands for."""
    z0, eps, _ = clip
    scheduler = double(make_scheduler(SD15, {"prediction_type": prediction_type}))
    t = torch.tensor([2, 600])
    assert snr(scheduler, t)[0] > 5 > snr(scheduler, t)[1]
    z_t, wanted = losses.add_noise(scheduler, z0, eps, t), losses.target(scheduler, z0, eps, t)
    wrong = wanted + 0.1 * torch.randn(z0.shape, dtype=torch.float64, generator=generator(9))
    ours = losses.loss_weights(scheduler, t, 5.0) * losses.squared_error(wrong, wanted)
    of_sample = losses.squared_error(predicted_sample(scheduler, wrong, z_t, t), z0)
    assert torch.allclose(ours, snr(scheduler, t).clamp(max=5.0) * of_sample, rtol=1e-9)


def test_without_snr_gamma_all_steps_weigh_alike():
    assert torch.equal(losses.loss_weights(make_scheduler(SD15), torch.tensor([0, 999]), None), torch.ones(2))
    with pytest.raises(UserError, match="snr_gamma"):
        losses.loss_weights(make_scheduler(SD15), torch.tensor([0]), 0.0)


def test_half_precision_latents_meet_a_full_precision_schedule():
    """In float16, 1 - abar of the first step would round to nothing like itself."""
    scheduler = make_scheduler(SD15)
    z0, eps = torch.randn(2, 1, 2, 4, 3, 3, generator=generator(1)).half()
    t = torch.tensor([0])
    z_t = losses.add_noise(scheduler, z0, eps, t)
    assert torch.allclose(z_t, losses.add_noise(scheduler, z0.float(), eps.float(), t), atol=1e-6)


# ---------------------------------------------------------------- guidance


class ClosedForm:
    """p(z, t, image, text), not linear in anything, which counts the evaluations of each call."""

    def __init__(self, guidance, clips):
        self.terms, self.clips, self.evaluations = guidance.terms, clips, []

    def __call__(self, z, t):
        parts = z.split(self.clips)
        self.evaluations.append(len(parts))
        terms = self.terms[-len(parts) :]
        return torch.cat([self.at(z, term.image, term.text, t) for z, term in zip(parts, terms, strict=True)])

    @staticmethod
    def at(z, image, text, t=0.0):
        return torch.sin(z + t) + 0.3 * image * torch.cos(z) + text * z**2 * (1 - t / 10)


def guided_steps(guidance, z, steps=1, gains=(0.0, 1.0)):
    """The predictions of `steps` steps at z, of which step i has time i, and the number of evaluations of each."""
    denoiser = ClosedForm(guidance, len(z))
    run = GuidedDenoiser(guidance, denoiser, steps)
    return [run(z, float(t), gains) for t in range(steps)], denoiser.evaluations


def plain_steps(scales, z, steps):
    """What plain guidance and no guidance predict."""
    p00, p10, p11 = ([ClosedForm.at(z, *c, float(t)) for t in range(steps)] for c in ((0, 0), (1, 0), (1, 1)))
    text, image = scales
    return [a + image * (b - a) + text * (c - b) for a, b, c in zip(p00, p10, p11, strict=True)], p11


@pytest.mark.parametrize(
    ("text", "image", "evaluations"),
    [
        (7.5, 2.0, 3),
        (3.0, 3.0, 2),
        (1.0, 1.0, 1),
        (4.0, 1.0, 2),
        (1.0, 2.0, 3),
        (0.0, 1.0, 1),
        (0.0, 0.0, 1),
        (0.0, 2.0, 2),
    ],
)
def test_guidance_is_its_formula_with_no_wasted_evaluation(text, image, evaluations, clip):
    ours, counts = guided_steps(Guidance(text, image), clip[0])
    assert torch.allclose(ours[0], plain_steps((text, image), clip[0], 1)[0][0], atol=1e-6)
    assert counts == [evaluations]


@pytest.mark.parametrize("scales", [(7.5, 1.0), (7.5, 2.0), (3.0, 3.0), (0.0, 1.0)])
def test_guidance_acts_in_its_interval_and_elsewhere_costs_one_evaluation(scales, clip):
    z, steps = clip[0], 5
    plain, _ = guided_steps(Guidance(*scales), z, steps)
    whole, _ = guided_steps(Guidance(*scales, interval=(0.0, 1.0)), z, steps)
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))
    some, counts = guided_steps(Guidance(*scales, interval=(0.2, 0.6)), z, steps)
    guided, unguided = plain_steps(scales, z, steps)
    for i, prediction in enumerate(some):
        assert torch.allclose(prediction, guided[i] if i in (1, 2) else unguided[i], atol=1e-5), i
        assert i in (1, 2) or torch.equal(prediction, unguided[i])
    # Where the text's scale is 0, p(img,txt) is an evaluation that plain guidance does not need.
    evaluations = len(Guidance(*scales, interval=(0.2, 0.6)).terms)
    assert counts == [1, evaluations, evaluations, 1, 1]
    assert guided_steps(Guidance(1.0, 1.0, interval=(0.2, 0.6)), z, steps)[1] == [1] * steps


def test_a_reused_update_is_that_of_the_last_whole_step(clip):
    z, scales = clip[0], (4.0, 2.0)
    guided, unguided = plain_steps(scales, z, 6)
    reused, counts = guided_steps(Guidance(*scales, reuse=3, interval=(1 / 6, 1.0)), z, 6)
    assert counts == [1, 3, 1, 1, 3, 1]  # the first guided step is whole
    for i, source in enumerate((None, 1, 1, 1, 4, 4)):
        expected = unguided[i] + (0 if source is None else guided[source] - unguided[source])
        assert torch.allclose(reused[i], expected, atol=1e-5), i
    assert not torch.allclose(reused[2], guided[2], atol=1e-2)


@pytest.mark.parametrize("phi", [0.4, 1.0])
def test_a_rescaled_prediction_has_the_deviation_of_the_unguided_one(phi, clip):
    z, scales = clip[0].double(), (7.5, 1.0)
    (rescaled,), _ = guided_steps(Guidance(*scales, rescale=phi), z)
    (guided,), (unguided,) = plain_steps(scales, z, 1)
    deviation = [x.flatten(1).std(1) for x in (rescaled, guided, unguided)]
    torch.testing.assert_close(deviation[0], phi * deviation[2] + (1 - phi) * deviation[1])
    assert (deviation[1] > 2 * deviation[2]).all()


def test_projected_guidance_is_its_algorithm_and_without_settings_plain_guidance(clip):
    """arXiv 2410.02416, algorithm 1, written out for guidance by the text alone, of a prediction of v."""
    z, scales, (signal, sigma) = clip[0].double(), (7.5, 1.0), (0.8, 0.6)
    gains = signal, -sigma
    plain, _ = plain_steps(scales, z, 3)
    settings = {"apg_eta": 1.0, "apg_norm_threshold": None, "apg_momentum": 0.0}
    pairs = zip(
        guided_steps(Guidance(*scales), z, 3)[0],
        guided_steps(Guidance(*scales, **settings), z, 3, gains)[0],
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    loose, _ = guided_steps(Guidance(*scales, apg_norm_threshold=1e9), z, 3, gains)
    for a, b in zip(loose, plain, strict=True):
        torch.testing.assert_close(a, b)
    eta, threshold, momentum = 0.25, 3.0, -0.5
    ours, counts = guided_steps(
        Guidance(*scales, apg_eta=eta, apg_norm_threshold=threshold, apg_momentum=momentum), z, 3, gains
    )
    average = 0.0
    for i in range(3):
        cond, uncond = (signal * z - sigma * ClosedForm.at(z, 1, text, float(i)) for text in (1, 0))
        average = (cond - uncond) + momentum * average
        for k in range(len(z)):
            delta = average[k] * min(1.0, threshold / average[k].norm())
            unit = cond[k] / cond[k].norm()
            parallel = (delta * unit).sum() * unit
            expected = cond[k] + (scales[0] - 1) * (delta - parallel + eta * parallel)
            torch.testing.assert_close(signal * z[k] - sigma * ours[i][k], expected)
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_clip_that_a_prediction_stands_for_is_the_clip(prediction_type, clip):
    scheduler = make_scheduler({"beta_schedule": "scaled_linear"}, {"prediction_type": prediction_type})
    z0, t = clip[0].double(), torch.tensor(400)
    noise = torch.randn(z0.shape, dtype=torch.float64, generator=generator(3))
    a, b = predicted_z0_gains(scheduler, t, z0)
    prediction = losses.target(scheduler, z0, noise, t)
    torch.testing.assert_close(a * losses.add_noise(scheduler, z0, noise, t) + b * prediction, z0)


# ---------------------------------------------------------------- randomness


def test_generators_depend_on_every_number_and_nothing_else():
    draws = [torch.randn(8, generator=generator(*numbers)) for numbers in [(1,), (1, 0), (1, 1), (0, 1), (1, 0, 0)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[2], torch.randn(8, generator=generator(1, 1)))
    with pytest.raises(UserError, match="negative"):
        generator(-1)


def test_diffusion_knows_no_network():
    code = (
        "import sys, importlib, pkgutil, microcinema.diffusion as d\n"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(d.__path__, d.__name__ + '.')]\n"
        "ours = {m.split('.')[1] for m in sys.modules if m.startswith('microcinema.')}\n"
        "assert ours <= {'diffusion', 'utils'}, ours\n"
        "networks = {'diffusers.models.unets.unet_2d_condition', 'transformers.models.clip.modeling_clip'}\n"
        "assert not networks & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_flow_loss_is_the_mean_distance_over_valid_places():
    wanted = torch.randn(2, 3, 2, 4, 4, generator=generator(0))
    valid = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    valid[0, :, 1] = True
    off = wanted.clone()
    off[:, :, 0] += 3.0
    off[:, :, 1] -= 4.0
    off[0, :, :, 0] = 1e3  # not valid: of no account
    loss = losses.flow_loss(off, wanted, valid, delta=1e-6)
    torch.testing.assert_close(loss, torch.tensor([5.0, 0.0]))  # the second clip has no valid place
    assert losses.flow_loss(wanted, wanted, valid).abs().max() < 1e-6


def test_a_network_is_told_the_time_at_which_it_knows_the_noise():
    known = make_scheduler({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    assert torch.allclose(match_snr_timesteps(known, known), torch.arange(1000.0), atol=1e-3)
    shifted = make_scheduler(known.config, {"snr_shift": 2.0})
    told = match_snr_timesteps(shifted, known)
    snr = known.alphas_cumprod.double() / (1 - known.alphas_cumprod.double())
    whole = told.round().long()
    inside = told < 999
    assert (told[1:] >= told[:-1]).all() and (told[:800] > torch.arange(800)).all()
    # Between two of its steps, hence not to the last digit.
    ratio = snr[whole][inside] / (snr / 4)[inside]
    assert (ratio[20:] - 1).abs().max() < 0.02
    silent = make_scheduler(known.config, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert match_snr_timesteps(silent, known)[-1] == 999
    assert match_snr_timesteps(known, silent).isfinite().all()
