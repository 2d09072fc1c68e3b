"""What a run needs of memory, told before it starts: its own code runs once on tensors that have sizes and no data."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import set_trainable
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_networks, build_pipeline
from microcinema.training.ema import averaged
from microcinema.training.loss import TrainableModel, training_loss
from microcinema.training.settings import Settings
from microcinema.training.trainer import make_objective, make_optimizer

if TYPE_CHECKING:
    from omegaconf import DictConfig

PROMPT = "a large red star moving quickly to the left on sand"
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors in one process. Phases come one after the other; in each, what is held throughout is included.

    Attributes:
        weights: of all networks.
        phases: the most at once, by phase.
        gradients, optimizer, average: of the trained weights (training alone).
        activations: what a forward keeps for its backward (training alone).
    """

    weights: int
    phases: dict[str, int]
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def empty_pipeline(config: "DictConfig", dtype: torch.dtype = torch.float32) -> ImageToVideoPipeline:
    """The pipeline that a run of `train` would train, of weights without data; of the base only the settings are read.

    Args:
        config: of the command `train`.
        dtype: of the weights.

    Raises:
        UserError: as the run would.
    """
    from omegaconf import OmegaConf

    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        base = load_base(**config.base, weights=False)
        networks = build_networks(config, base, weights=False)
    # Outside, since schedules are computed and compared in earnest; they are small.
    config = OmegaConf.merge(config, {"fps": config.fps or 8.0})  # type: ignore[assignment]
    pipeline = build_pipeline(
        config,
        base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        **{name: part.eval() if isinstance(part, nn.Module) else part for name, part in networks.items()},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def empty_predict_net(config: "DictConfig", pipeline: ImageToVideoPipeline) -> PredictNet | None:
    """The PredictNet that a run of `train` would train beside the pipeline, without data; None without a flow teacher."""
    if config.model.flow_model is None:
        return None
    with FakeTensorMode():
        return PredictNet.for_unet(pipeline.unet)


def sampling_memory(pipeline: ImageToVideoPipeline, **arguments: Any) -> Estimate:
    """What one video needs.

    Args:
        pipeline: with weights or without data; with weights it is not an estimate but what the tensors really took.
        arguments: of the pipeline's call: sizes, guidance, `decode_chunk_size`.

    Raises:
        UserError: as the call would.
    """
    phases: dict[str, int] = {}
    with LiveMemory() as live:
        live.watch(tensors(pipeline))
        weights = live.now

        def denoised(*_: Any) -> dict[str, Any]:
            phases["denoising"] = live.peak
            live.restart()
            return {}

        # One step is as large as many.
        pipeline(
            PROMPT,
            Image.new("RGB", (64, 64)),
            num_inference_steps=1,
            callback_on_step_end=denoised,
            output_type="pt",
            **arguments,
        )
        phases["decoding"] = live.peak
    return Estimate(weights, phases)


def training_memory(
    pipeline: ImageToVideoPipeline,
    settings: Settings,
    latents: bool = False,
    device: str = "cpu",
    predict_net: PredictNet | None = None,
) -> Estimate:
    """What a step of training needs once the optimiser has its state, and the validation if there is one.

    Args:
        pipeline: from `empty_pipeline`; not to be used afterwards.
        settings: of the run, with its `mixed_precision`.
        latents: the clips come encoded.
        device: type of the device whose rules of mixed precision hold: cpu or cuda.
        predict_net: as in `train`, without data as the pipeline is.
    """
    denoiser = TrainableModel(pipeline.unet, pipeline.condition_encoder, predict_net).train()
    if settings.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.condition_encoder.enable_gradient_checkpointing()
    parameters = set_trainable(
        pipeline.unet, pipeline.condition_encoder, settings.trainable_parameters, settings.trainable_unet_layers
    )
    if predict_net is not None:
        parameters += predict_net.parameters()
    gradients = sum(parameter.nbytes for parameter in parameters)
    objective = make_objective(pipeline, settings)
    encode = BatchEncoder(pipeline, torch.device("cpu"))
    phases: dict[str, int] = {}

    def denoise(*inputs: torch.Tensor, **read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with autocast(settings.mixed_precision):
            prediction, flow = denoiser(*inputs, **read)
        return prediction.float(), flow

    with LiveMemory() as live, like_cuda() if device == "cuda" else nullcontext():

        def closed(phase: str) -> None:
            phases[phase] = live.peak
            live.restart()

        live.watch(tensors(pipeline))
        weights = live.now
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        update = _optimiser(parameters, settings)
        optimizer = live.now - weights - gradients
        ema = EMAModel(parameters, foreach=True) if settings.use_ema else None
        average = live.now - weights - gradients - optimizer
        if settings.gradient_accumulation_steps == 1:
            _release(parameters)  # else they are there when the next batch begins
        live.restart()

        with autocast(settings.mixed_precision):
            batch = encode(_items(pipeline, settings.train_batch_size, latents, predict_net is not None))
            dropped = encode.dropped()
        closed("encoding")
        draws = objective.draw(batch.numbers, batch.latents.shape[1:])
        before = live.now
        loss = training_loss(denoise, batch, draws, dropped, objective).total.mean()
        activations = live.now - before
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        closed("training")
        update()
        _release(parameters)
        if ema is not None:
            ema.step(parameters)
        closed("updating")
        del batch, draws, loss, dropped
        if settings.validation_prompts:
            denoiser.eval()
            # The weights that the averages stand in for wait in the memory of the processor.
            with (
                averaged(ema, parameters) if device == "cpu" else nullcontext(),
                autocast(settings.mixed_precision),
            ):
                pipeline(PROMPT, Image.new("RGB", (64, 64)), num_inference_steps=1, output_type="pt")
            closed("validating")
    return Estimate(weights, phases, gradients, optimizer, average, activations)


def tensors(pipeline: ImageToVideoPipeline) -> Iterator[torch.Tensor]:
    """Weights and buffers of all networks."""
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            yield from network.parameters()
            yield from network.buffers()


def _optimiser(parameters: list[nn.Parameter], settings: Settings) -> Callable[[], Any]:
    """The update of an optimiser whose state is there; what it returns holds the state."""
    if settings.use_8bit_adam:
        # Its kernels run on real tensors of a GPU alone; it keeps two bytes for each weight, and scales of blocks.
        state = [torch.empty_like(parameter, dtype=torch.int16) for parameter in parameters]
        return lambda: state
    optimizer = make_optimizer(parameters, settings)
    optimizer.step()
    return optimizer.step


def _release(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _items(pipeline: ImageToVideoPipeline, count: int, latents: bool, flow: bool) -> dict[str, Any]:
    """A batch as the loader brings it."""
    frames, height, width = (pipeline.config[key] for key in ("num_frames", "height", "width"))
    factor = pipeline.vae_scale_factor
    if latents:
        shape = (pipeline.vae.config["latent_channels"], height // factor, width // factor)
    else:
        shape = (3, height, width)
    # Like a weight: without data where the weights have none.
    clips = pipeline.unet.conv_in.weight.detach().new_zeros(count, frames, *shape)
    grid = height // factor, width // factor
    return {
        "latents" if latents else "video": clips,
        **(
            {"keyframe": clips.new_zeros(count, 3, height, width)}
            if latents and pipeline.uses_image_conditioning
            else {}
        ),
        **({"flow": clips.new_zeros(count, frames - 1, 2, *grid)} if flow else {}),
        **({"flow_valid": clips.new_zeros(count, frames - 1, *grid, dtype=torch.bool)} if flow else {}),
        **dict.fromkeys(("caption", "description", "motion"), [PROMPT] * count),
        "fps": torch.full((count,), pipeline.config["fps"]),
        "sample_index": torch.arange(count),
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast(mixed_precision: str | None) -> torch.autocast:
    """Mixed precision for tensors of the CPU, within `like_cuda` by the rules of CUDA."""
    dtype = DTYPES[mixed_precision or "no"]
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def like_cuda() -> AbstractContextManager[Any]:
    """Within it the CPU's autocast does what CUDA's does: it normalises in float32, and enlarges pictures in their own type.

    By other functions in torch's places, since a mode of torch would not be there when checkpoints run their forward again.
    """

    def in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def normalise(*args: Any, **kwargs: Any) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            return function(*args, **kwargs)

        return normalise

    def in_its_type(
        *args: Any, function: Callable[..., torch.Tensor] = functional.interpolate, **kwargs: Any
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    norms: dict[str, Any] = {name: in_float32(getattr(functional, name)) for name in ("group_norm", "layer_norm")}
    return patch.multiple(functional, **norms, interpolate=in_its_type)
