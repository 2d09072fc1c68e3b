"""What a config of the command `train` describes: its networks, and the pipelines around them."""

from typing import TYPE_CHECKING, Any

from diffusers import DDPMScheduler, StableDiffusionPipeline

from microcinema.config.compose import instantiate
from microcinema.diffusion.schedule import make_sampler, make_scheduler, schedule_summary
from microcinema.pipelines.base_model import Base
from microcinema.pipelines.encoders import load_image_encoder, load_motion_encoder
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline

if TYPE_CHECKING:
    from omegaconf import DictConfig


def build_networks(config: "DictConfig", base: Base, weights: bool = True) -> dict[str, Any]:
    """The pipeline's `unet` and `condition_encoder`, as new as a run begins with, and the encoders that the base does not lend.

    Args:
        config: of the command `train`.
        base: the weights of its UNet are copied.
        weights: read those of the encoders, as in `load_base`.

    Returns:
        Arguments of `ImageToVideoPipeline`, by name.

    Raises:
        UserError: settings that cannot work, a UNet that is not supported, or an encoder that is not there.
    """
    model = config.model
    parts: dict[str, Any] = {}
    widths: dict[str, int | None] = {"image": None, "motion": None}
    if model.adapter is not None:
        where = config.base.pretrained_model_name_or_path, config.base.revision, config.base.variant
        parts |= load_image_encoder(model.image_encoder, *where, base.vae.dtype, weights)
        widths["image"] = parts["image_encoder"].config.hidden_size
    if model.motion_encoder is not None:
        parts |= load_motion_encoder(model.motion_encoder, base.vae.dtype, weights)
        widths["motion"] = parts["motion_encoder"].config.d_model
    motion_attention = model.motion_encoder is not None
    parts["unet"] = instantiate(
        model.unet,
        unet=base.unet,
        keyframe_channels=base.unet.config["in_channels"] if model.keyframe_concat else 0,
        image_attention=model.adapter == "decoupled",
        motion_attention=motion_attention,
    )
    parts["condition_encoder"] = instantiate(
        model.condition_encoder,
        unet=base.unet,
        image_width=widths["image"],
        vae_scale_factor=base.vae_scale_factor,
        motion_attention=motion_attention,
        motion_width=widths["motion"],
    )
    return parts


def build_pipeline(config: "DictConfig", base_scheduler: DDPMScheduler, **parts: Any) -> ImageToVideoPipeline:
    """The video pipeline of a training run.

    Args:
        config: of the command `train`, with `fps`.
        base_scheduler: the schedule that the base was trained with.
        parts: the pipeline's components except the scheduler; None for the base's own.

    Raises:
        UserError: settings that cannot work, or parts that do not fit together.
    """
    prior = instantiate(config.diffusion.noise_prior)
    schedule = make_scheduler(base_scheduler.config, config.diffusion.scheduler)
    known, new = (schedule_summary(each) | {"prediction_type": None} for each in (base_scheduler, schedule))
    height, width = (config.resolution,) * 2 if isinstance(config.resolution, int) else config.resolution
    return ImageToVideoPipeline(
        **parts,
        scheduler=make_sampler(schedule),
        network_schedule=None if known == new else schedule_summary(base_scheduler),
        noise_prior=prior.kind,
        noise_prior_strength=prior.strength,
        noise_prior_gamma=prior.gamma,
        keyframe_position=config.model.keyframe_position,
        num_frames=config.num_frames,
        fps=config.fps,
        height=height,
        width=width,
        base=config.base.pretrained_model_name_or_path,
        base_revision=config.base.revision,
        base_variant=config.base.variant,
        unet_source=None
        if config.trainable_parameters == "all"
        else config.init_weights_from or config.base.pretrained_model_name_or_path,
        image_encoder_source=config.model.image_encoder,
        motion_encoder_source=config.model.motion_encoder,
        num_motion_tokens=config.model.num_motion_tokens,
        **config.sampling,
    )


def build_keyframes(base: Base) -> KeyframePipeline:
    """Stage 1 of the base itself, for the key frames of validation."""
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=make_sampler(base.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return KeyframePipeline(pipeline)
