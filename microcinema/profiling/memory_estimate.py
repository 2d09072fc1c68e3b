"""Memory requirements of a run, estimated before it starts: its own code runs once on fake tensors, which have sizes and no data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import set_trainable
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_networks, build_pipeline
from microcinema.training.ema import ema_weights
from microcinema.training.loss import TrainableModel, make_loss_config, training_loss
from microcinema.training.settings import Settings
from microcinema.training.trainer import make_optimizer

if TYPE_CHECKING:
    from microcinema.config.schema import Train

PROMPT = "a large red star moving quickly to the left on sand"
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors in one process. Phases are consecutive; each includes what is held throughout.

    Attributes:
        weights: of all networks.
        phases: peak by phase.
        gradients, optimizer, average: of the trained weights (training only).
        activations: what the forward keeps for the backward (training only).
    """

    weights: int
    phases: dict[str, int]
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        """The peak over all phases."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def empty_pipeline(config: "Train", dtype: torch.dtype = torch.float32) -> ImageToVideoPipeline:
    """The pipeline that a run of `train` would train, with weights without data; only the configs of the base are read.

    Args:
        config: of the command `train`.
        dtype: of the weights.

    Raises:
        UserError: as the run would.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        base = load_base(**vars(config.base), weights=False)
        networks = build_networks(config, base, weights=False)
    # Outside of the mode, since schedules need real values; they are small.
    pipeline = build_pipeline(
        config,
        base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        **{name: value.eval() if isinstance(value, nn.Module) else value for name, value in networks.items()},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def empty_predict_net(config: "Train", pipeline: ImageToVideoPipeline) -> PredictNet | None:
    """The PredictNet that a run of `train` would train beside the pipeline, without data; None without a flow model."""
    if config.model.flow_model is None:
        return None
    with FakeTensorMode():
        return PredictNet.for_unet(pipeline.unet)


def sampling_memory(pipeline: ImageToVideoPipeline, **arguments: Any) -> Estimate:
    """Memory of sampling one video.

    Args:
        pipeline: with weights or without data; with weights the result is measured, not estimated.
        arguments: of the pipeline's call: sizes, guidance, `decode_chunk_size`.

    Raises:
        UserError: as the call would.
    """
    phases: dict[str, int] = {}
    with LiveMemory() as live:
        live.watch(tensors(pipeline))
        weights = live.now

        def end_denoising(*_: Any) -> dict[str, Any]:
            phases["denoising"] = live.reset_peak()
            return {}

        # One step needs as much as many.
        pipeline(
            PROMPT,
            Image.new("RGB", (64, 64)),
            num_inference_steps=1,
            callback_on_step_end=end_denoising,
            output_type="pt",
            **arguments,
        )
        phases["decoding"] = live.peak
    return Estimate(weights, phases)


def training_memory(
    pipeline: ImageToVideoPipeline,
    config: Settings,
    latents: bool = False,
    device: str = "cpu",
    predict_net: PredictNet | None = None,
) -> Estimate:
    """Memory of a training step once the optimizer has its state, and of the validation if there is one.

    Args:
        pipeline: from `empty_pipeline`; not to be used afterwards.
        config: of the run, with its `mixed_precision`.
        latents: whether the clips are cached latents.
        device: type of the device whose autocast rules apply: cpu or cuda.
        predict_net: as in `Trainer`, without data.
    """
    model, parameters = _trainable(pipeline, config, predict_net)
    gradients = sum(parameter.nbytes for parameter in parameters)
    loss_config = make_loss_config(pipeline, config)
    encode = BatchEncoder(pipeline, torch.device("cpu"))
    phases: dict[str, int] = {}

    def denoiser(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with autocast(config.mixed_precision):
            prediction, flow = model(*args, **kwargs)
        return prediction.float(), flow

    with LiveMemory() as live, CudaAutocast() if device == "cuda" else nullcontext():
        live.watch(tensors(pipeline))
        weights = live.now
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer_step = _optimizer_step(parameters, config)
        optimizer = live.now - weights - gradients
        ema = EMAModel(parameters, foreach=True) if config.use_ema else None
        average = live.now - weights - gradients - optimizer
        if config.gradient_accumulation_steps == 1:
            _clear_gradients(parameters)  # otherwise they are held while the next batch is encoded
        live.reset_peak()

        with autocast(config.mixed_precision):
            batch = encode(_items(pipeline, config.train_batch_size, latents, predict_net is not None))
            null = encode.null_conditioning()
        phases["encoding"] = live.reset_peak()
        noise = loss_config.sample_noise_and_timesteps(batch.indices, batch.latents.shape[1:])
        before = live.now
        loss = training_loss(denoiser, batch, noise, null, loss_config).total.mean()
        activations = live.now - before
        torch.autograd.backward(loss)  # `loss.backward()` would suspend CudaAutocast
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        phases["training"] = live.reset_peak()
        optimizer_step()
        _clear_gradients(parameters)
        if ema is not None:
            ema.step(parameters)
        phases["updating"] = live.reset_peak()
        del batch, noise, loss, null
        if config.validation_prompts:
            model.eval()
            # On a GPU the weights that the averages replace are kept in the memory of the CPU.
            with ema_weights(ema if device == "cpu" else None, parameters), autocast(config.mixed_precision):
                pipeline(PROMPT, Image.new("RGB", (64, 64)), num_inference_steps=1, output_type="pt")
            phases["validating"] = live.reset_peak()
    return Estimate(weights, phases, gradients, optimizer, average, activations)


def _trainable(
    pipeline: ImageToVideoPipeline, config: Settings, predict_net: PredictNet | None
) -> tuple[TrainableModel, list[nn.Parameter]]:
    """The model of a run and its trained parameters."""
    model = TrainableModel(pipeline.unet, pipeline.condition_encoder, predict_net).train()
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.condition_encoder.enable_gradient_checkpointing()
    parameters = set_trainable(
        pipeline.unet, pipeline.condition_encoder, config.trainable_parameters, config.trainable_unet_layers
    )
    if predict_net is not None:
        parameters += predict_net.parameters()
    return model, parameters


def tensors(pipeline: ImageToVideoPipeline) -> Iterator[torch.Tensor]:
    """Weights and buffers of all networks."""
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            yield from network.parameters()
            yield from network.buffers()


def _optimizer_step(parameters: list[nn.Parameter], config: Settings) -> Callable[[], Any]:
    """The step of an optimizer that has its state; the function holds the state."""
    if config.use_8bit_adam:
        # Its kernels need real tensors on a GPU; it keeps two bytes for each weight, and scales of blocks.
        state = [torch.empty_like(parameter, dtype=torch.int16) for parameter in parameters]
        return lambda: state
    optimizer = make_optimizer(parameters, config)
    optimizer.step()
    return optimizer.step


def _clear_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _items(pipeline: ImageToVideoPipeline, count: int, latents: bool, flow: bool) -> dict[str, Any]:
    """A batch from the loader."""
    num_frames, height, width = (pipeline.config[key] for key in ("num_frames", "height", "width"))
    factor = pipeline.vae_scale_factor
    if latents:
        shape = (pipeline.vae.config["latent_channels"], height // factor, width // factor)
    else:
        shape = (3, height, width)
    # Derived from a weight: without data if the weights have none.
    clips = pipeline.unet.conv_in.weight.detach().new_zeros(count, num_frames, *shape)
    grid = height // factor, width // factor
    return {
        "latents" if latents else "video": clips,
        **(
            {"keyframe": clips.new_zeros(count, 3, height, width)}
            if latents and pipeline.uses_image_conditioning
            else {}
        ),
        **({"flow": clips.new_zeros(count, num_frames - 1, 2, *grid)} if flow else {}),
        **({"flow_valid": clips.new_zeros(count, num_frames - 1, *grid, dtype=torch.bool)} if flow else {}),
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
    """Mixed precision on the CPU; within `CudaAutocast` by the rules of CUDA."""
    dtype = DTYPES[mixed_precision or "no"]
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


class CudaAutocast(TorchFunctionMode):
    """Within it autocast on the CPU follows the rules of CUDA: normalization in float32, interpolation in the input's dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in (functional.group_norm, functional.layer_norm):
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            elif func is functional.interpolate:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
