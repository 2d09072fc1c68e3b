"""Memory requirements of a run, estimated before it starts: its own code runs once on fake tensors, which have sizes and no data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from microcinema.config.schema import Train
from microcinema.diffusion.guidance import Guidance
from microcinema.models.int8 import quantize_frozen
from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import load_component, resolve_snapshot
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_networks, build_pipeline, check_schedule
from microcinema.training.consistency import Consistency
from microcinema.training.ema import Averages, ema_weights
from microcinema.training.loss import TrainableModel, make_loss_config, training_loss
from microcinema.training.trainer import make_optimizer

PROMPT = "a large red star moving quickly to the left on sand"
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors in one process. Phases are consecutive; each includes what is held throughout."""

    weights: int  # of all networks
    phases: dict[str, int]  # peak by phase
    gradients: int = 0  # of the trained weights, as optimizer and average
    optimizer: int = 0
    average: int = 0
    activations: int = 0  # what the forward keeps for the backward

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """The peak over all phases."""
        return self.phases[self.worst]


def empty_pipeline(config: Train, dtype: torch.dtype = torch.float32) -> ImageToVideoPipeline:
    """The pipeline that a run would train, with weights without data; only the configs of the base are read."""
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        base = load_base(**vars(config.base), weights=False)
        networks = build_networks(config, base, weights=False)
    for network in networks.values():
        if isinstance(network, nn.Module):
            network.eval()
    # Outside of the mode, since schedules need real values; they are small.
    pipeline = build_pipeline(config, base.scheduler, check_schedule(config, base.scheduler), **base.shared, **networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling_memory(pipeline: ImageToVideoPipeline, **arguments: Any) -> Estimate:
    """Memory of sampling one video with these arguments; of a pipeline with data it is measured, not estimated."""
    phases: dict[str, int] = {}
    with LiveMemory() as live:
        live.watch(tensors(pipeline))
        weights = live.now

        def end_denoising(*_: Any) -> dict[str, Any]:
            phases["denoising"] = live.reset_peak()
            return {}

        _sample_one_step(pipeline, callback_on_step_end=end_denoising, **arguments)
        phases["decoding"] = live.peak
    return Estimate(weights, phases)


def group_offload_memory(estimate: Estimate, pipeline: ImageToVideoPipeline) -> Estimate:
    """What sampling, as estimated without it, takes on the device with `memory.offload=group`: two layers at a time, this one and the next."""
    networks = [network for network in pipeline.components.values() if isinstance(network, nn.Module)]
    layers = [layer for network in networks for layer in network.modules()]
    sizes = [sum(tensor.nbytes for tensor in (*layer.parameters(False), *layer.buffers(False))) for layer in layers]
    held = sum(sorted(sizes)[-2:])
    phases = {name: peak - estimate.weights + held for name, peak in estimate.phases.items()}
    return replace(estimate, weights=held, phases=phases)


def training_memory(
    pipeline: ImageToVideoPipeline, config: Train, latents: bool = False, device: str = "cpu"
) -> Estimate:
    """Memory of a training step once the optimizer has its state, and of the validation if there is one.

    Args:
        pipeline: without data; not to be used afterwards.
        latents: whether the clips are cached latents.
        device: type of the device whose autocast rules apply: cpu or cuda.
    """
    predict_net, phases = None, {}
    if config.model.flow_model is not None:
        with FakeTensorMode():
            predict_net = PredictNet.for_unet(pipeline.unet)
    model = TrainableModel.for_training(pipeline, config, predict_net)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in parameters)
    objective, others = _objective(pipeline, config)
    loss_config = replace(make_loss_config(pipeline, config), objective=objective)
    encode = BatchEncoder(pipeline, torch.device("cpu"))
    if config.quantization is not None:
        # Originals are in the memory of the CPU.
        others += [layer.original for layer in quantize_frozen(model, keep_originals=True) if device == "cpu"]
    with LiveMemory() as live, cuda_autocast() if device == "cuda" else nullcontext():
        live.watch([*tensors(pipeline), *others])
        weights = live.now
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer_step = _optimizer_step(parameters, config)
        optimizer = live.now - weights - gradients
        ema = Averages(parameters, foreach=True) if config.use_ema else None
        average = live.now - weights - gradients - optimizer
        if config.gradient_accumulation_steps == 1:
            model.zero_grad()  # otherwise they are held while the next batch is encoded
        live.reset_peak()
        with autocast(config.mixed_precision):
            batch = encode(_items(pipeline, config.train_batch_size, latents, predict_net is not None))
            null = encode.null_conditioning()
        phases["encoding"] = live.reset_peak()
        noise = loss_config.sample_noise_and_timesteps(batch.indices, batch.latents.shape[1:])
        before = live.now
        denoiser = partial(_predict, model, config.mixed_precision)
        loss = training_loss(denoiser, batch, noise, null, loss_config).total.mean()
        activations = live.now - before
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        phases["training"] = live.reset_peak()
        optimizer_step()
        model.zero_grad()
        if ema is not None:
            ema.step(parameters)
        phases["updating"] = live.reset_peak()
        del batch, noise, loss, null
        if config.validation_prompts:
            model.eval()
            # On a GPU the weights that the averages replace are kept in the memory of the CPU.
            with ema_weights(ema if device == "cpu" else None, parameters), autocast(config.mixed_precision):
                _sample_one_step(pipeline)
            phases["validating"] = live.reset_peak()
    return Estimate(weights, phases, gradients, optimizer, average, activations)


def _objective(pipeline: ImageToVideoPipeline, config: Train) -> tuple[Consistency | None, list[torch.Tensor]]:
    """The objective of a run, if it has one, and the weights of its teacher, without data."""
    if config.objective is None:
        return None, []
    folder = Path(resolve_snapshot(config.objective.teacher, ["unet"]), "unet")
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = TrainableModel(load_component(folder, VideoUNet, weights=False))
    # One evaluation of the teacher holds as much as several, which follow one another.
    denoiser, guidance = partial(_predict, teacher, config.mixed_precision), Guidance(1.0, 1.0)
    settings = config.objective
    objective = Consistency(denoiser, guidance, settings.num_ode_steps, settings.phases, settings.huber_c)
    return objective, list(teacher.parameters())


def _predict(
    model: TrainableModel, precision: str | None, *args: torch.Tensor, **kwargs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with autocast(precision):
        prediction, flow = model(*args, **kwargs)
    return prediction.float(), flow


def _sample_one_step(pipeline: ImageToVideoPipeline, **arguments: Any) -> None:
    """Samples one video with one step, which needs as much memory as many."""
    pipeline(PROMPT, Image.new("RGB", (64, 64)), num_inference_steps=1, output_type="pt", **arguments)


def tensors(pipeline: ImageToVideoPipeline) -> Iterator[torch.Tensor]:
    """Weights and buffers of all networks."""
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            yield from network.parameters()
            yield from network.buffers()


def _optimizer_step(parameters: list[nn.Parameter], config: Train) -> Callable[[], Any]:
    """The step of an optimizer that has its state; the function holds the state."""
    if config.use_8bit_adam:
        # Its kernels need real tensors on a GPU; it keeps two bytes for each weight, and scales of blocks.
        state = [torch.empty_like(parameter, dtype=torch.int16) for parameter in parameters]
        return lambda: state
    optimizer = make_optimizer(parameters, config)
    optimizer.step()
    return optimizer.step


def _items(pipeline: ImageToVideoPipeline, count: int, latents: bool, flow: bool) -> dict[str, Any]:
    num_frames, height, width = (pipeline.config[key] for key in ("num_frames", "height", "width"))
    grid = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
    zeros = pipeline.unet.conv_in.weight.detach().new_zeros  # without data if the weights have none
    items: dict[str, Any] = dict.fromkeys(("caption", "description", "motion"), [PROMPT] * count)
    items |= {"fps": torch.full((count,), pipeline.config["fps"]), "sample_index": torch.arange(count)}
    items["motion_score"] = torch.zeros(count)
    if latents:
        items["latents"] = zeros(count, num_frames, pipeline.vae.config["latent_channels"], *grid)
        if pipeline.uses_image_conditioning:
            items["keyframe"] = zeros(count, 3, height, width, dtype=torch.uint8)
    else:
        items["video"] = zeros(count, num_frames, 3, height, width, dtype=torch.uint8)
    if flow:
        items["flow"] = zeros(count, num_frames - 1, 2, *grid)
        items["flow_valid"] = zeros(count, num_frames - 1, *grid, dtype=torch.bool)
    return items


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast(mixed_precision: str | None) -> torch.autocast:
    """Mixed precision on the CPU; within `cuda_autocast` by the rules of CUDA."""
    dtype = DTYPES[mixed_precision or "no"]
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within it autocast on the CPU follows the rules of CUDA: normalization in float32, interpolation in the input's dtype."""

    def in_float32(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    def in_input_dtype(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    # The functions are replaced: a mode of torch is suspended in backward, where checkpoints run their forward again.
    rules = {"group_norm": in_float32, "layer_norm": in_float32, "interpolate": in_input_dtype}
    originals = {name: getattr(functional, name) for name in rules}
    try:
        for name, rule in rules.items():
            setattr(functional, name, partial(rule, originals[name]))
        yield
    finally:
        for name, function in originals.items():
            setattr(functional, name, function)
