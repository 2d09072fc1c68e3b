"""The estimate of memory is what real tensors take, in the very code that it stands for."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fixtures import tiny
from fixtures.tiny_training import accelerator
from microcinema.config.compose import compose
from microcinema.config.schema import Train
from microcinema.data.source import ClipSource
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.profiling import memory_estimate
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.training import build
from microcinema.training.trainer import Trainer
from microcinema.utils.errors import UserError

FRAMES = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def composed(base):
    def with_overrides(*overrides: str):
        fixed = [f"resolution={tiny.SIZE}", f"num_frames={FRAMES}", f"base.pretrained_model_name_or_path={base}"]
        return compose("train", [*fixed, *overrides])

    return with_overrides


def settings_of(composed, **changes: Any) -> Train:
    return replace(composed, **changes)


def real_pipeline(composed) -> ImageToVideoPipeline:
    """As the command `train` makes it."""
    base = load_base(**vars(composed.base))
    networks = build.build_networks(composed, base)
    pipeline = build.build_pipeline(
        composed, base.scheduler, vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, **networks
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_of_a_run_has_the_priors_gamma_and_no_epsilon_without_signal(composed):
    silent = ["diffusion.scheduler.rescale_betas_zero_snr=true", "diffusion.scheduler.timestep_spacing=trailing"]
    overrides = [*silent, "diffusion.scheduler.prediction_type=v_prediction", "trainable_parameters=all"]
    for changes, gamma in [((), 0.02), (["diffusion.noise_prior.gamma=0.05"], 0.05), (["diffusion=mixed"], 0.0)]:
        assert memory_estimate.empty_pipeline(composed(*changes)).noise_prior.gamma == gamma
    assert memory_estimate.empty_pipeline(composed(*overrides)).noise_prior.gamma == 0.0
    with pytest.raises(UserError, match="zero terminal SNR.*epsilon; use prediction_type=v_prediction"):
        real_pipeline(composed(*silent))


class Clips(ClipSource):
    """Black clips, as pixels or as latents."""

    def __init__(self, latents: bool, side: int, length: int = 4):
        self.name = "latents" if latents else "video"
        self.shape = (FRAMES, tiny.LATENT_CHANNELS if latents else 3, side, side)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        dtype = torch.float32 if self.name == "latents" else torch.uint8
        return {self.name: torch.zeros(self.shape, dtype=dtype), "caption": "a red star", "fps": 8.0}


@pytest.mark.parametrize(
    "model, arguments",
    [
        ("microcinema", {"guidance_scale": 4.0}),
        ("plain", {"guidance_scale": 1.0, "decode_chunk_size": 1}),
        ("microcinema", {"guidance_scale": 4.0, "image_guidance_scale": 2.0, "num_frames": 7}),
    ],
)
def test_sampling_takes_what_was_estimated(composed, model, arguments):
    train = composed(f"model={model}")
    estimate = memory_estimate.sampling_memory(memory_estimate.empty_pipeline(train), **arguments)
    measured = memory_estimate.sampling_memory(real_pipeline(train).to("cpu"), **arguments)
    assert estimate.weights == measured.weights
    # Masks of a few bytes may be released later in one run than in the other.
    assert estimate.phases == pytest.approx(measured.phases, rel=0, abs=16)
    assert estimate.peak == max(estimate.phases.values()) == estimate.phases[estimate.worst]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_type_is_half_the_weights(composed, dtype):
    full, half = (
        memory_estimate.sampling_memory(memory_estimate.empty_pipeline(composed(), kind))
        for kind in (torch.float32, dtype)
    )
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
    assert half.phases["denoising"] < 0.6 * full.phases["denoising"]


def test_guidance_and_decoding_at_once_cost_memory(composed):
    def estimate(**arguments):
        return memory_estimate.sampling_memory(memory_estimate.empty_pipeline(composed()), **arguments)

    alone, guided = estimate(guidance_scale=1.0), estimate(guidance_scale=4.0)
    working = [estimate.phases["denoising"] - estimate.weights for estimate in (alone, guided)]
    assert 1.6 < working[1] / working[0] < 2.1
    assert estimate(decode_chunk_size=1).phases["decoding"] < alone.phases["decoding"]


RUNS = {
    "temporal": {},
    "temporal, and a 2D block": {"trainable_unet_layers": ["up_blocks.1"]},
    "everything, with checkpoints": {
        "trainable_parameters": "all",
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "bf16, no average": {"mixed_precision": "bf16", "use_ema": False},
    "int8, bf16, with checkpoints": {"quantization": "int8", "mixed_precision": "bf16", "gradient_checkpointing": True},
    "pixels, validation": {"validation_prompts": ["a red star"]},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_what_was_estimated(composed, tmp_path, name):
    train, latents = composed(), "pixels" not in name
    changes = {"output_dir": str(tmp_path), "max_train_steps": 2, "train_batch_size": 2, "dataloader_num_workers": 0}
    settings = settings_of(train, **changes, report_to=None, **RUNS[name])
    estimate = memory_estimate.training_memory(memory_estimate.empty_pipeline(train), settings, latents)
    pipeline = real_pipeline(train)

    def validate(accelerator, pipeline, step):
        with accelerator.autocast():
            pipeline("a red star", Image.new("RGB", (64, 64)), num_inference_steps=1, output_type="pt")

    clips = Clips(latents, tiny.SIZE // tiny.VAE_FACTOR if latents else tiny.SIZE)
    with LiveMemory() as live:
        live.watch(memory_estimate.tensors(pipeline))
        Trainer(
            accelerator(settings), pipeline, clips, settings, validate if settings.validation_prompts else None
        ).train()
    assert live.peak == pytest.approx(estimate.peak, rel=0.02)


def test_what_is_held_is_told_apart(composed):
    def estimate(**changes: Any) -> memory_estimate.Estimate:
        settings = settings_of(composed("model=plain"), mixed_precision="no", train_batch_size=1, **changes)
        return memory_estimate.training_memory(
            memory_estimate.empty_pipeline(composed("model=plain")), settings, latents=True
        )

    temporal, everything = (
        estimate(),
        estimate(trainable_parameters="all", gradient_checkpointing=True, use_8bit_adam=True, use_ema=False),
    )
    assert temporal.weights == everything.weights
    int8 = estimate(quantization="int8")
    assert int8.gradients == temporal.gradients and int8.activations < temporal.activations
    assert temporal.gradients < everything.gradients < everything.weights
    assert temporal.optimizer == pytest.approx(2 * temporal.gradients, rel=0.01)
    assert temporal.average == temporal.gradients
    assert everything.optimizer == everything.gradients / 2  # two bytes for four
    assert everything.average == 0
    first = estimate(gradient_checkpointing="first_level")
    assert everything.activations < first.activations < temporal.activations
    assert set(temporal.phases) == {"encoding", "training", "updating"}
    held = temporal.weights + temporal.optimizer + temporal.average
    assert held < temporal.phases["updating"]
    assert held + temporal.activations <= temporal.phases["training"]


@pytest.mark.parametrize(
    "precision, wanted", [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_mixed_precision_follows_the_rules_of_the_device(precision, wanted):
    x, weight = torch.ones(1, 4, 2, 2), torch.ones(4, 4, 1, 1)

    def types(rules) -> list[torch.dtype]:
        with rules, memory_estimate.autocast(precision):
            h = functional.conv2d(x, weight)
            normed = functional.layer_norm(functional.group_norm(h, 2), (2,))
            return [h.dtype, normed.dtype, functional.interpolate(h, scale_factor=2.0).dtype]

    assert types(memory_estimate.cuda_autocast()) == [wanted, torch.float32, wanted]
    assert types(nullcontext())[:2] == [wanted, wanted]


def test_the_rules_of_cuda_apply_when_a_checkpoint_runs_its_forward_again():
    x, weight, dtypes = torch.ones(1, 4, 2, 2, requires_grad=True), torch.ones(4, 4, 1, 1), []

    def block(x: torch.Tensor) -> torch.Tensor:
        normed = functional.group_norm(functional.conv2d(x, weight), 2)
        dtypes.append(normed.dtype)
        return normed.square()  # recomputation ends with the last tensor that is saved

    with memory_estimate.cuda_autocast():
        with memory_estimate.autocast("bf16"):
            loss = checkpoint(block, x, use_reentrant=False).sum()
        loss.backward()
    assert dtypes == [torch.float32, torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_rules_of_cuda_are_those_of_cuda(precision):
    x, weight = torch.ones(1, 4, 2, 2), torch.ones(4, 4, 1, 1)

    def types(where: str) -> list[torch.dtype]:
        h = functional.conv2d(x.to(where), weight.to(where))
        normed = functional.layer_norm(functional.group_norm(h, 2), (2,))
        enlarged = functional.interpolate(h, scale_factor=2.0)
        attended = functional.scaled_dot_product_attention(normed, normed, normed)
        return [y.dtype for y in (h, normed, enlarged, attended, functional.silu(normed), torch.cat([h, normed]))]

    with torch.autocast("cuda", memory_estimate.DTYPES[precision]):
        wanted = types("cuda")
    with memory_estimate.cuda_autocast(), memory_estimate.autocast(precision):
        assert types("cpu") == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_takes_what_was_estimated(composed, tmp_path):
    train = composed("resolution=64")
    changes = {"output_dir": str(tmp_path), "max_train_steps": 2, "train_batch_size": 8, "dataloader_num_workers": 0}
    settings = settings_of(train, **changes, report_to=None, mixed_precision="bf16", trainable_parameters="all")
    estimate = memory_estimate.training_memory(
        memory_estimate.empty_pipeline(train), settings, latents=True, device="cuda"
    )
    pipeline = real_pipeline(train)
    clips = Clips(latents=True, side=64 // tiny.VAE_FACTOR, length=16)
    torch.cuda.reset_peak_memory_stats()
    Trainer(accelerator(settings), pipeline, clips, settings).train()
    assert torch.cuda.max_memory_allocated() == pytest.approx(estimate.peak, rel=0.15)
