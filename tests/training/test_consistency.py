"""Consistency distillation, where the teacher's denoiser and its ODE have a closed form; then a run from start to sample."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from PIL import Image

from fixtures import tiny, tiny_training
from fixtures.tiny_training import LatentClips, logged, pipeline, train, weights
from microcinema.commands import cli
from microcinema.config import schema
from microcinema.config.compose import compose
from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import signal_and_noise
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.profiling.memory_estimate import empty_pipeline, training_memory
from microcinema.sprites.dataset import write_dataset
from microcinema.training.consistency import Consistency, few_step_sampler, load_objective
from microcinema.training.loss import Batch, LossConfig, NullConditioning, training_loss
from microcinema.utils.errors import UserError

SHAPE = torch.Size((3, 4, 2, 2))
NULL = NullConditioning(torch.zeros(1, 5, 6))
DEVIATION = 0.5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    **{kind: {"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")},
    "zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def loss_config(schedule: str = "epsilon", **changes: Any) -> LossConfig:
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, **SCHEDULES[schedule])
    settings = {"snr_gamma": None, "motion_weight": 0.0, "timestep_logit_normal": None, "flow_weight": 0.0}
    settings |= {"text_dropout": 0.0, "image_dropout": 0.0, "seed": 3, "keyframe_position": "center", **changes}
    return LossConfig(scheduler, NoisePrior("appearance", 0.5), **settings)


def batch(size: int) -> Batch:
    """Clips that are normally distributed round their key frame."""
    z_ref = torch.randn(size, 1, *SHAPE[1:], generator=generator(0))
    latents = z_ref + DEVIATION * torch.randn(size, *SHAPE, generator=generator(1))
    latents[:, 1] = z_ref[:, 0]
    return Batch(latents, torch.ones(size, 5, 6), torch.full((size,), 8.0), range(size))


def predicting(config: LossConfig, z0: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The prediction that stands for z0."""
    signal, sigma = signal_and_noise(config.scheduler, t, z_t)
    eps = (z_t - signal * z0) / sigma
    return {"epsilon": eps, "v_prediction": signal * eps - sigma * z0, "sample": z0}[
        config.scheduler.config["prediction_type"]
    ]


class Exact:
    """The best denoiser of `batch`, and as a student the end of its ODE, along which a clip's distance from the mean keeps its share of
    the deviation; the end is the clip, or if the diffusion times have phases, that of the phase."""

    def __init__(self, config: LossConfig, student: bool, phases: int = 1) -> None:
        self.config, self.student, self.phases = config, student, phases

    def levels(self, after: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal, sigma = signal_and_noise(self.config.scheduler, (after - 1).clamp(min=0), like)
        noisy = (after > 0).reshape(-1, 1, 1, 1, 1)
        return signal.where(noisy, 1.0), sigma.where(noisy, 0.0)

    def mean(self, signal: torch.Tensor, sigma: torch.Tensor, z_ref: torch.Tensor) -> torch.Tensor:
        return sigma * self.config.prior.mean(z_ref, SHAPE[0]) + signal * z_ref[:, None]

    def end(self, z_t: torch.Tensor, t: torch.Tensor, z_ref: torch.Tensor) -> torch.Tensor:
        """Where the ODE leaves the phase."""
        length = 1000 // self.phases
        there, here = self.levels(t // length * length, z_t), self.levels(t + 1, z_t)
        shares = [(signal**2 * DEVIATION**2 + sigma**2) ** 0.5 for signal, sigma in (there, here)]
        return self.mean(*there, z_ref) + shares[0] / shares[1] * (z_t - self.mean(*here, z_ref))

    def z0(self, z_t: torch.Tensor, t: torch.Tensor, z_ref: torch.Tensor) -> torch.Tensor:
        """What the denoiser means, or what the student has to mean for its step of DDIM to end there."""
        signal, sigma = self.levels(t + 1, z_t)
        if not self.student:
            share = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2)
            return z_ref[:, None] + share * (z_t - self.mean(signal, sigma, z_ref))
        length = 1000 // self.phases
        end_signal, end_sigma = self.levels(t // length * length, z_t)
        ratio = end_sigma / sigma
        return (self.end(z_t, t, z_ref) - ratio * z_t) / (end_signal - ratio * signal)

    def __call__(self, z_t, t, text, z_ref, fps, image_mask):
        return predicting(self.config, self.z0(z_t, t, z_ref), z_t, t), None


def objective(
    config: LossConfig, teacher: Any, num_ode_steps: int = 50, scales: tuple[float, float] = (1.0, 1.0), phases: int = 1
) -> Consistency:
    return Consistency(teacher, Guidance(*scales), num_ode_steps, phases, huber_c=1e-3)


def drawn(config: LossConfig, clips: Batch, t: list[int] | None = None):
    noise = config.sample_noise_and_timesteps(clips.indices, SHAPE)
    return noise if t is None else replace(noise, t=torch.tensor(t))


# What is learned


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_target_of_an_exact_teacher_is_the_end_of_its_ode_up_to_the_solvers_error(schedule, phases):
    config, clips = loss_config(schedule), batch(64)
    teacher, student = Exact(config, student=False), Exact(config, student=True, phases=phases)

    def error(steps: int, first: int) -> float:
        noise = drawn(config, clips, torch.linspace(first, 999, 64).long().tolist())
        # The end of the path from t, and of that from where the teacher's step leads.
        found, expected, _ = objective(config, teacher, steps, phases=phases).pair(student, clips, noise, NULL, config)
        return (found - expected).abs().max().item()

    assert error(20, 0) < 0.15 and error(100, 0) < 0.025
    # A step of DDIM has an error of second order; at the lowest times the noise of time 0, which samplers leave out, is a part of it.
    assert error(500, 100) < error(100, 100) / 20 < error(20, 100) / 400 < 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_of_the_sampler_for_each_phase_leads_where_the_student_learned(schedule):
    config, clips = replace(loss_config(schedule), prior=NoisePrior("none")), batch(4)
    sampler = few_step_sampler(config.scheduler, 40, 4)
    sampler.set_timesteps(4)
    assert type(sampler) is DDIMScheduler and sampler.timesteps.tolist() == [999, 749, 499, 249]
    inputs = []

    def student(z_t, t, *_):
        inputs.append((z_t, t))
        return torch.sin(z_t), None

    noise = drawn(config, clips, sampler.timesteps.tolist())
    found, _, _ = objective(config, student, 40, phases=4).pair(student, clips, noise, NULL, config)
    z, t = inputs[-1]
    assert t.tolist() == sampler.timesteps.tolist()
    ends = torch.cat([sampler.step(torch.sin(z[i : i + 1]), t[i], z[i : i + 1]).prev_sample for i in range(4)])
    signal, sigma = Exact(config, student=True).levels(torch.tensor([750, 500, 250, 0]), z)
    here_signal, here_sigma = signal_and_noise(config.scheduler, t, z)
    torch.testing.assert_close(found * (signal - sigma * here_signal / here_sigma), ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps, phases", [(48, 4), (40, 3), (2000, 1)])
def test_times_that_cannot_be_parted_evenly_are_refused(steps, phases):
    told = f"objective.num_ode_steps is {steps}, with {phases} phases and 1000 times of diffusion"
    with pytest.raises(UserError, match=told):
        few_step_sampler(loss_config().scheduler, steps, phases)


def test_at_the_last_time_the_function_is_the_identity():
    """So that the clip of a teacher's last step is the target, whatever the student says of it; the others hang on the student."""
    config, clips = loss_config("v_prediction"), batch(2)
    z0 = torch.randn(2, *SHAPE, generator=generator(5))
    distil = objective(config, lambda z_t, t, *_: (predicting(config, z0, z_t, t), None))
    for sign in (-1.0, 1.0):
        student = lambda z_t, *_: (torch.full_like(z_t, sign * 1e3), None)  # noqa: B023, E731
        _, expected, _ = distil.pair(student, clips, drawn(config, clips, [7, 20]), NULL, config)
        torch.testing.assert_close(expected[0], z0[0])
        assert (expected[1] - z0[1]).abs().min() > 50


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_student_learns_at_the_times_and_with_the_function_of_its_sampler(schedule):
    config, clips, seen = replace(loss_config(schedule), prior=NoisePrior("none")), batch(10), []

    def spy(z_t, t, *_):
        seen.append((z_t, t))
        return z_t, None

    distil = objective(config, spy)
    found, _, _ = distil.pair(
        spy, clips, drawn(config, clips, [0, 19, 20, 21, 39, 500, 519, 979, 980, 999]), NULL, config
    )
    teacher, target, student = seen
    assert student[1].tolist() == teacher[1].tolist() == [19, 19, 39, 39, 39, 519, 519, 979, 999, 999]
    assert target[1].tolist() == [0, 0, 19, 19, 19, 499, 499, 959, 979, 979]
    sampler = few_step_sampler(config.scheduler, 50, 1)
    sampler.set_timesteps(50)
    assert type(sampler) is LCMScheduler
    assert {*student[1].tolist()} < {*sampler.timesteps.tolist()} and sampler.timesteps[0] == 999
    for (z_t, t), clip in zip(zip(*student, strict=True), found, strict=True):
        sampler.set_timesteps(50)
        torch.testing.assert_close(
            sampler.step(z_t, t, z_t, generator=generator(0)).denoised, clip, rtol=1e-4, atol=1e-4
        )  # c_skip


def test_no_gradient_reaches_target_or_teacher():
    config, clips = loss_config("v_prediction", motion_weight=2.0), batch(3)
    gain, teacher_gain = torch.tensor(0.7, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    distil = objective(config, lambda z_t, *_: (teacher_gain * z_t, None))
    config, noise = replace(config, objective=distil), drawn(config, clips, [30, 400, 999])
    found, expected, _ = distil.pair(lambda z_t, *_: (gain * z_t, None), clips, noise, NULL, config)
    assert found.requires_grad and not expected.requires_grad
    places = 1 + 2 * (clips.latents - clips.latents[:, 1:2]).abs().mean(2).amax(1).clamp(max=1)[:, None, None]
    wanted = (places * (((found - expected) ** 2 + 1e-6).sqrt() - 1e-3)).mean(dim=(1, 2, 3, 4))
    losses = training_loss(lambda z_t, *_: (gain * z_t, None), clips, noise, NULL, config).total
    torch.testing.assert_close(losses, wanted)
    (gradient,) = torch.autograd.grad(wanted.sum(), gain)
    losses.sum().backward()
    torch.testing.assert_close(gain.grad, gradient)
    assert gradient != 0 and teacher_gain.grad is None


def test_the_teacher_is_guided_and_the_student_is_not():
    config, clips = loss_config("sample"), batch(2)

    def denoiser(z_t, t, text, z_ref, fps, image_mask):
        value = text.mean(dim=(1, 2)) + 10.0 * image_mask  # of the caption 1, of the empty one 0
        return value[:, None, None, None, None].expand_as(z_t), None

    noise = replace(drawn(config, clips, [3, 3]), text_mask=torch.tensor([True, False]))
    distil = objective(config, denoiser, scales=(3.0, 2.0))
    found, expected, _ = distil.pair(denoiser, clips, noise, NULL, config)
    assert expected.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([0 + 2 * 10 + 3 * 1, 0 + 2 * 10 + 3 * 0])
    assert found.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx([11.0, 10.0], rel=1e-4)


# A run


def settings(teacher: Path, **changes: Any) -> schema.Consistency:
    values = {"num_ode_steps": 20, "phases": 4, "guidance_scale": None, "image_guidance_scale": None, "huber_c": 1e-3}
    return schema.Consistency(str(teacher), **{**values, **changes})


@pytest.fixture
def teacher(tmp_path) -> Path:
    save_pipeline(pipeline(tmp_path, seed=3, guidance_scale=2.0), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_resumed_run_has_the_same_bits_and_no_other_teacher(tmp_path, teacher):
    changes = {"objective": settings(teacher), "checkpointing_steps": 2, "checkpoints_total_limit": None}
    train(pipeline(tmp_path), LatentClips(), tmp_path / "whole", **changes)
    train(pipeline(tmp_path), LatentClips(), tmp_path / "parts", max_train_steps=2, **changes)
    folders = {path.name for path in (tmp_path / "parts/checkpoint-2").iterdir() if path.is_dir()}
    assert folders == {"unet"}  # nothing of the teacher
    torch.manual_seed(12345)  # nothing may hang on the state that the resuming process happens to start in
    shutil.move(teacher, tmp_path / "moved")
    resumed = {**changes, "resume_from_checkpoint": "latest", "objective": settings(tmp_path / "moved")}
    train(pipeline(tmp_path, seed=7), LatentClips(), tmp_path / "parts", **resumed)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    one, other = (weights(tmp_path / run) for run in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    states = [(tmp_path / run / "checkpoint-4/random_states_0.pkl").read_bytes() for run in ("whole", "parts")]
    assert states[0] == states[1]

    save_pipeline(pipeline(tmp_path, seed=4, guidance_scale=2.0), tmp_path / "other")
    for objective, told in [
        (settings(tmp_path / "other"), r"objective.teacher was \w{12}\.\.\. and is"),
        (settings(tmp_path / "moved", guidance_scale=3.0), "objective.guidance_scale was null and is 3.0"),
        (None, "objective.huber_c was 0.001 and is null"),
    ]:
        with pytest.raises(UserError, match=f"of another run: .*{told}"):
            train(pipeline(tmp_path), LatentClips(), tmp_path / "parts", **{**resumed, "objective": objective})


def test_a_student_may_be_a_lora_of_its_teacher(tmp_path, teacher):
    lora = schema.LoRA(rank=2, alpha=2.0, targets="both", dropout=0.0)
    folder = train(
        load_pipeline(teacher),
        LatentClips(),
        tmp_path / "run",
        objective=settings(teacher),
        lora=lora,
        init_weights_from=str(teacher),
        max_train_steps=2,
    )
    student, began = load_pipeline(teacher), load_pipeline(teacher).unet.state_dict()
    student.load_lora_weights(folder)
    student.fuse_lora()
    student.unload_lora_weights()
    moved = [(began[name] - value).abs().max().item() for name, value in student.unet.state_dict().items()]
    assert 0 < max(moved) < 0.01


def another_vae(model: Any) -> None:
    torch.nn.init.zeros_(model.vae.decoder.conv_in.bias)


def another_target(model: Any) -> None:
    model.register_to_config(training_schedule={**model.config["training_schedule"], "prediction_type": "sample"})


@pytest.mark.parametrize(
    "change, told",
    [
        (another_vae, r"vae was \w{12}\.\.\. and is \w{12}\.\.\."),
        (another_target, "prediction_type was epsilon and is sample"),
        ({"keyframe_position": "center"}, "keyframe_position was first and is center"),
        ({"height": 64, "width": 64}, "height was 32 and is 64; width was 32 and is 64"),
        ({"noise_prior_strength": 0.5}, "noise_prior_strength was 0.03 and is 0.5"),
    ],
)
def test_a_teacher_of_other_clips_noise_or_encoders_is_refused_in_one_line(tmp_path, teacher, change, told):
    model = pipeline(tmp_path, **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(model)
    accelerator = tiny_training.accelerator(tiny_training.make_config(tmp_path / "run"))
    with pytest.raises(UserError, match=f"cannot teach this model: {told}; train with the teacher's settings$"):
        load_objective(settings(teacher), model, accelerator)


def test_weights_of_the_denoising_loss_are_refused():
    with pytest.raises(UserError, match=r"snr_gamma=5.0 weights the denoising loss.*; set snr_gamma=null"):
        compose("train", ["objective=consistency", "snr_gamma=5"])


def test_the_command_makes_a_model_of_few_steps(tmp_path):
    teacher = tiny.video_pipeline(tmp_path / "base", model="plain", guidance_scale=2.0)
    save_pipeline(teacher, tmp_path / "teacher", with_base=False)
    write_dataset(tmp_path / "clips", num_videos=3, seed=0)
    small = ["model=plain", "model.max_frames=8", f"resolution={tiny.SIZE}", "num_frames=4", "max_train_steps=3"]
    small += ["train_batch_size=2", "lr_warmup_steps=0", "dataloader_num_workers=0", "report_to=null"]
    where = [f"base.pretrained_model_name_or_path={tmp_path / 'base'}", f"data.root={tmp_path / 'clips'}"]
    few = [
        "objective=consistency",
        f"objective.teacher={tmp_path / 'teacher'}",
        "objective.num_ode_steps=25",
        "objective.phases=5",
    ]
    run = tmp_path / "run"
    tiny_training.reset_accelerator()
    assert cli.main(["train", *small, *where, *few, f"output_dir={run}"]) == 0
    assert cli.main(["export", f"checkpoint={run / 'checkpoint-3'}", f"output_dir={tmp_path / 'exported'}"]) == 0
    for folder in (run, tmp_path / "exported"):
        student = load_pipeline(folder)
        assert type(student.scheduler) is DDIMScheduler and student.scheduler.config["set_alpha_to_one"]
        assert [student.config[name] for name in ("num_inference_steps", "guidance_scale")] == [5, 1.0]
        assert student.config["keyframe_num_inference_steps"] == 25
        began = dict(teacher.unet.named_parameters())
        moved = [(began[name] - weight).abs().max().item() for name, weight in student.unet.named_parameters()]
        assert 0 < max(moved) < 0.01  # three steps from the teacher's weights
        image = Image.new("RGB", (tiny.SIZE, tiny.SIZE), "red")
        frames = student("a red star", image, num_inference_steps=2, output_type="pt", generator=generator(0)).frames
        assert frames.shape == (1, 4, 3, tiny.SIZE, tiny.SIZE) and frames.isfinite().all() and frames.std() > 0.01

    estimates = []
    for overrides in (["trainable_parameters=all"], few):
        config = compose("train", [*small, *where, *overrides])
        estimates.append(training_memory(empty_pipeline(config), config))
    size = sum(weight.nbytes for weight in teacher.unet.parameters())
    assert estimates[1].weights == estimates[0].weights + size
    assert estimates[1].peak >= estimates[0].peak + size
