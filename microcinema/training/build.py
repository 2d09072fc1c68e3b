"""Builds what a config of the command `train` describes: networks, pipeline, data set and trainer."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch.profiler import record_function

from microcinema.config.compose import save
from microcinema.config.instantiate import Component
from microcinema.config.schema import Train
from microcinema.data.indexed import IndexedDataset
from microcinema.data.latents import EncodedClips
from microcinema.data.motion_score import MotionClips, motion_quantiles
from microcinema.data.optical_flow import FlowClips
from microcinema.data.quarantine import MAX_REPLACEMENTS, Quarantine
from microcinema.data.source import ClipSource, spread
from microcinema.diffusion.schedule import check_keeps_prediction_type, make_sampler, make_scheduler, schedule_summary
from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base_model import BASE_COMPONENTS, Base, load_base
from microcinema.pipelines.encoders import load_image_encoder, load_motion_encoder
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.training import cached_latents_check
from microcinema.training.batch_encoder import Region
from microcinema.training.consistency import few_step_sampler
from microcinema.training.distributed import make_accelerator
from microcinema.training.heldout_loss import SEED, HeldOutLoss
from microcinema.training.launch_settings import launch_settings
from microcinema.training.trainer import Trainer
from microcinema.training.validation import Validation
from microcinema.training.warm_start import known_schedule, warm_start, warm_start_summary
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder
from microcinema.utils.provenance import append_record, describe_environment

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"  # one entry for each start of the run


def build_trainer(
    config: Train,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
    region: Region = record_function,
) -> Trainer:
    """The trainer of the run that the config describes, ready for its first step. Collective. A UserError if that cannot be built or trained."""
    output_dir = make_folder(config.output_dir)
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    base = load_base(**vars(config.base))
    levels = check_schedule(config, base.scheduler)
    dataset = build_dataset(config, accelerator, base.vae_scale_factor)
    if config.fps is None:  # the saved config has to state it
        config = replace(config, fps=first_fps(dataset))
    networks = build_networks(config, base)
    if config.init_weights_from is not None:
        new_weights = warm_start(networks["unet"], config.init_weights_from)
        accelerator.print(warm_start_summary(new_weights, config.init_weights_from))
        if config.lora is not None and new_weights:
            fault = f"'{config.init_weights_from}' has no {new_weights[0]}, and a LoRA needs the whole model"
            raise UserError(f"{fault}; set the keys of model as that model was trained")
    scores = {"motion_quantiles": motion_quantiles(dataset)} if config.model.motion_score else {}
    pipeline = build_pipeline(config, base.scheduler, levels, **base.shared, **networks, **scores)
    if isinstance(dataset, EncodedClips):
        cached_latents_check.check(dataset, pipeline, config.model.flow_model)
    predict_net = None if config.model.flow_model is None else PredictNet.for_unet(pipeline.unet)
    validation = None
    if config.validation_prompts:
        keyframes = build_keyframes(base)
        validation = Validation(accelerator, pipeline, keyframes, config.validation_prompts, output_dir, config.seed)

    trainer = Trainer(accelerator, pipeline, dataset, config, validation, predict_net, on_metrics, region)
    if (held_out := build_held_out(config)) is not None:
        quarantine = Quarantine(output_dir / "validation/quarantine", config.clip_retries, accelerator.process_index)
        measured = IndexedDataset(held_out, SEED, quarantine), config.validation_clips, output_dir
        trainer.validations.append(HeldOutLoss(accelerator, trainer.encode, trainer.loss_config, *measured))
    if accelerator.is_main_process:  # only now: a run that is refused leaves no records
        save(config, output_dir / CONFIG)
        start = {**describe_environment(accelerator.num_processes), "launch": launch_settings(accelerator)}
        append_record(output_dir / ENVIRONMENT, start)
    return trainer


def first_fps(dataset: ClipSource) -> float:
    """The frame rate of the first clip, or of another, should it be broken; a UserError if all that were tried are."""
    for index in spread(len(dataset), 1 + MAX_REPLACEMENTS):
        with suppress(UserError):
            return float(dataset[index]["fps"])
    return float(dataset[0]["fps"])  # its error says why


def build_clips(config: Train, accelerator: Accelerator) -> ClipSource:
    """The data set of a config, with motion scores if its model uses them; the main process prints how many clips are skipped, and why."""
    dataset = config.data.build()
    if accelerator.is_main_process:
        for reason, count in dataset.skipped.items():
            print(f"{count} clips skipped: {reason}")
    return MotionClips(dataset) if config.model.motion_score else dataset


def build_dataset(config: Train, accelerator: Accelerator, vae_scale_factor: int) -> ClipSource:
    """The clips of a run: cached latents if the config names them, with optical flow if PredictNet trains."""
    dataset = build_clips(config, accelerator)
    if config.cached_latents is not None:
        return EncodedClips(config.cached_latents, dataset)
    if config.model.flow_model is not None:
        return FlowClips(dataset, config.model.flow_model, vae_scale_factor)
    return dataset


def build_held_out(config: Train) -> ClipSource | None:
    """The clips of the held-out loss; None if there is none."""
    if config.validation_data is None:
        return None
    seed = {"seed": SEED} if "seed" in config.data.arguments else {}  # of random clip positions
    dataset = Component(config.data.target, {**config.data.arguments, **seed, **config.validation_data}).build()
    return MotionClips(dataset) if config.model.motion_score else dataset


def build_networks(config: Train, base: Base, weights: bool = True) -> dict[str, Any]:
    """The new `unet` of a run, and the encoders that the base does not have.

    Args:
        base: the weights of its UNet are copied.
        weights: whether to load those of the encoders, as in `load_base`.

    Raises:
        UserError: settings that cannot work, an unsupported UNet, or a missing encoder.
    """
    model = config.model
    networks: dict[str, Any] = {}
    widths: dict[str, int | None] = {"image": None, "motion": None}
    if model.adapter is not None:
        source = config.base.pretrained_model_name_or_path, config.base.revision, config.base.variant
        networks |= load_image_encoder(model.image_encoder, *source, base.vae.dtype, weights)
        widths["image"] = networks["image_encoder"].config.hidden_size
    if model.motion_encoder is not None:
        networks |= load_motion_encoder(model.motion_encoder, base.vae.dtype, weights)
        widths["motion"] = networks["motion_encoder"].config.d_model
    networks["unet"] = VideoUNet.from_unet2d(base.unet, model, widths["image"], widths["motion"], base.vae_scale_factor)
    return networks


def check_schedule(config: Train, base_scheduler: DDPMScheduler) -> dict[str, Any]:
    """The schedule by whose timesteps the network of a run knows noise levels before it trains. A UserError if the training schedule cannot
    work, or has another target than layers which stay frozen."""
    schedule = make_scheduler(base_scheduler.config, vars(config.diffusion.scheduler))
    levels, prediction_type = known_schedule(config.init_weights_from, base_scheduler)
    if config.trainable_parameters == "temporal":
        check_keeps_prediction_type(schedule, prediction_type)
    return levels


def build_pipeline(
    config: Train, base_scheduler: DDPMScheduler, levels: Mapping[str, Any] | None = None, **components: Any
) -> ImageToVideoPipeline:
    """The video pipeline of a training run.

    Args:
        base_scheduler: the training schedule of the base.
        levels: of `check_schedule`; None: the base's.
        components: of the pipeline, except the scheduler, None for the base's own, or its `shared` arguments; and `motion_quantiles` of its
            training set.

    Raises:
        UserError: settings that cannot work, or components that do not fit together.
    """
    prior = config.diffusion.noise_prior.build()
    schedule = make_scheduler(base_scheduler.config, vars(config.diffusion.scheduler))
    objective = config.objective
    few_steps = objective and few_step_sampler(schedule, objective.num_ode_steps, objective.phases)
    ignored = {"prediction_type": None}  # it does not change the noise levels
    levels = dict(levels or schedule_summary(base_scheduler))
    same_levels = levels | ignored == schedule_summary(schedule) | ignored
    height, width = (config.resolution,) * 2 if isinstance(config.resolution, int) else config.resolution
    return ImageToVideoPipeline(
        **components,
        scheduler=few_steps or make_sampler(schedule),
        network_schedule=None if same_levels else levels,
        noise_prior=prior.kind,
        noise_prior_strength=prior.strength,
        noise_prior_gamma=prior.gamma,
        keyframe_position=config.model.keyframe_position,
        num_frames=config.num_frames,
        fps=config.fps or 8.0,
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
        **vars(config.sampling),
    )


def build_keyframes(base: Base) -> KeyframePipeline:
    """The base's own text-to-image pipeline, for the key frames of validation."""
    own: dict[str, Any] = {"unet": base.unet, "scheduler": make_sampler(base.scheduler)}
    if base.text_encoder_2 is not None:
        pipeline = StableDiffusionXLPipeline(**base.shared, **own, add_watermarker=False)
    else:
        own |= {name: base.shared[name] for name in BASE_COMPONENTS}
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**own, **checker)
    pipeline.set_progress_bar_config(disable=True)
    return KeyframePipeline(pipeline)
