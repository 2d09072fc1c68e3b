"""The training loop: order of clips, loss, optimiser, averages, checkpoints and reports, each from its own module."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from microcinema.config.compose import instantiate, save
from microcinema.data.flow_clips import FlowClips
from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.latents import EncodedClips
from microcinema.data.quarantine import ErrorRate, Quarantine
from microcinema.data.source import ClipSource
from microcinema.diffusion.schedule import check_keeps_schedule
from microcinema.models.predict_net import PredictNet
from microcinema.models.video_unet import set_trainable
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import INDEX, is_embedded
from microcinema.pipelines.saving import save_pipeline
from microcinema.training import cached_latents_check
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_keyframes, build_networks, build_pipeline
from microcinema.training.checkpoint import Checkpoints
from microcinema.training.distributed import broadcast_from_main, has_zero3, make_accelerator
from microcinema.training.ema import evaluated
from microcinema.training.loss import Objective, TrainableModel, training_loss
from microcinema.training.metrics import Meter
from microcinema.training.nan_guard import Guard
from microcinema.training.preemption import EXIT_STATUS, Preempted, Preemption, ignore_signals_in_worker
from microcinema.training.resume import Progress, choose_checkpoint, run_identity
from microcinema.training.settings import Settings
from microcinema.training.validation import Validation
from microcinema.training.warm_start import describe, warm_start
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_folder, make_folder, sweep
from microcinema.utils.provenance import append_record, describe_environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"  # one entry for each start of the run
Validate = Callable[[Accelerator, ImageToVideoPipeline, int], None]


def train(
    accelerator: Accelerator,
    pipeline: ImageToVideoPipeline,
    dataset: ClipSource,
    settings: Settings,
    validate: Validate | None = None,
    predict_net: PredictNet | None = None,
    listen: Callable[[dict[str, float]], None] | None = None,
    before_first_step: Callable[[], None] | None = None,
) -> Path:
    """Trains the pipeline's `unet` and `condition_encoder` and saves it, with averaged weights, as `output_dir`.

    Every process of a distributed run calls it with the same arguments. Clips, their noise and their dropout depend on `settings.seed` and
    their number alone; interrupted and resumed, a run ends in the same bits.

    Args:
        accelerator: from `make_accelerator`, for these settings and this call alone.
        pipeline: the model; only its `unet` and `condition_encoder` change.
        dataset: items as in data/clips.py: `video` (f, 3, H, W) or scaled `latents` (f, c, h, w), `caption`, `fps`.
        predict_net: trained beside the pipeline, and in its checkpoints alone, on the clips' `flow` and `flow_valid`.
        validate: called every `validation_steps` and after the last step, in all processes, with the step; the pipeline then holds the
            averaged weights.
        listen: given all figures that are logged: those of each step, and the seconds of each checkpoint and validation.
        before_first_step: called in the main process before the first step, when all that can be refused has been checked.

    Returns:
        output_dir.

    Raises:
        UserError: settings that cannot work, a checkpoint that does not fit, a loss or gradient that is not finite (training/guard.py).
        Preempted: SIGTERM or SIGUSR1 asked the run to end, and it has saved.
    """
    output_dir = make_folder(settings.output_dir)
    checkpoint = broadcast_from_main(accelerator, lambda: _choose(output_dir, settings.resume_from_checkpoint))
    device = accelerator.device

    for encoder in (pipeline.vae, pipeline.text_encoder, pipeline.image_encoder, pipeline.motion_encoder):
        if encoder is not None:
            encoder.requires_grad_(False).eval().to(device)
    denoiser: nn.Module = TrainableModel(pipeline.unet, pipeline.condition_encoder, predict_net).train()
    if settings.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.condition_encoder.enable_gradient_checkpointing()
    set_trainable(
        pipeline.unet, pipeline.condition_encoder, settings.trainable_parameters, settings.trainable_unet_layers
    )
    optimizer = make_optimizer([each for each in denoiser.parameters() if each.requires_grad], settings)
    lr_schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    denoiser, optimizer, lr_schedule = accelerator.prepare(denoiser, optimizer, lr_schedule)
    # Only now: FSDP puts others in the place of the parameters that it parts.
    named = accelerator.unwrap_model(denoiser).named_parameters()
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    parameters = list(trained.values())
    if settings.use_ema and has_zero3(denoiser):
        raise UserError(
            "use_ema=true averages no parameters that ZeRO-3 has parted; use FSDP or ZeRO-2, or use_ema=false"
        )
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True) if settings.use_ema else None

    clips = IndexedDataset(dataset, settings.seed)
    identity = run_identity(settings, pipeline, clips, accelerator.num_processes, accelerator.mixed_precision)
    checkpoints = Checkpoints(
        accelerator, output_dir, denoiser, trained, ema, settings.checkpoints_total_limit, identity
    )
    progress = checkpoints.load(checkpoint) if checkpoint else Progress(0, 0)
    if before_first_step is not None and accelerator.is_main_process:
        before_first_step()
    if settings.report_to:
        accelerator.init_trackers("microcinema", {key: _loggable(value) for key, value in asdict(settings).items()})

    objective = make_objective(pipeline, settings)
    encode = BatchEncoder(pipeline, device, dataset.empty_tokens)
    meter = Meter(accelerator, objective.scheduler.config["num_train_timesteps"])
    guard = Guard(accelerator, output_dir, settings.seed)

    def report(figures: dict[str, float]) -> None:
        accelerator.log(figures, step=progress.step)
        if listen is not None:
            listen(figures)

    def loss_of(items: dict[str, Any]) -> torch.Tensor:
        with accelerator.autocast():
            batch, dropped = encode(items), encode.dropped()
        draws = objective.draw(batch.numbers, batch.latents.shape[1:]).to(device)
        losses = training_loss(denoiser, batch, draws, dropped, objective)
        meter.add(losses.total, draws.t, losses.flow)
        guard.hold(items, batch.latents, draws.t, losses.total)
        return losses.total.mean()

    clips_per_step = settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps
    errors = ErrorRate(settings.max_error_rate)
    micro_batches = meter.waiting(errors.watch(_micro_batches(accelerator, clips, settings, progress)))
    with (
        Preemption() as preemption,
        closing(micro_batches),  # type: ignore[type-var]  # and with them the workers
        tqdm(
            total=settings.max_train_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        ) as bar,
    ):
        meter.start()
        stopping = False
        while progress.step < settings.max_train_steps:
            norm = _optimise(accelerator, denoiser, optimizer, settings, micro_batches, loss_of, meter)
            figures = {**meter.read(), "lr": lr_schedule.get_last_lr()[0], "broken_clips": errors.total}
            if norm is not None:
                figures["grad_norm"] = norm
            reached = Progress(progress.step + 1, progress.clips + clips_per_step)
            # A step that was skipped is a loss scale being found, whose gradients overflow.
            guard.check(reached.step, meter.losses, None if accelerator.optimizer_step_was_skipped else norm)
            if not accelerator.optimizer_step_was_skipped:
                lr_schedule.step()
                if ema:
                    ema.step(parameters)
            progress = reached
            report(figures)
            bar.set_postfix_str(
                f"loss {meter.recent_loss:.4f}, {figures['clips_per_second']:.1f} clips/s", refresh=False
            )
            bar.update()

            done = progress.step == settings.max_train_steps
            stopping = preemption.agreed(accelerator) and not done
            if done or stopping or progress.step % settings.checkpointing_steps == 0:
                with meter.aside():
                    checkpoints.save(progress)
                report({"checkpoint_seconds": meter.seconds_aside})
            if stopping:
                break
            if validate is not None and (done or progress.step % settings.validation_steps == 0):
                with meter.aside(), evaluated(accelerator, pipeline, denoiser, ema, trained) as whole:
                    validate(accelerator, whole, progress.step)
                report({"validation_seconds": meter.seconds_aside})

    if not stopping:
        with evaluated(accelerator, pipeline, denoiser, ema, trained) as whole:
            if accelerator.is_main_process:
                export(whole, output_dir)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    if stopping:
        raise Preempted(f"asked to end; saved step {progress.step} of {settings.max_train_steps}")
    return output_dir


def run(config: "DictConfig", listen: Callable[[dict[str, float]], None] | None = None) -> int:
    """The command `train`: makes the objects that its config describes, and trains.

    Args:
        listen: as in `train`.

    Returns:
        The exit status: 0, or `EXIT_STATUS` of a run that was asked to end, and goes on with resume_from_checkpoint=latest.

    Raises:
        UserError: the config describes something that cannot be made or trained.
    """
    from omegaconf import OmegaConf

    settings = Settings(**{field.name: config[field.name] for field in fields(Settings)})
    output_dir = make_folder(settings.output_dir)
    accelerator = make_accelerator(settings)
    set_seed(settings.seed)
    base = load_base(**config.base)
    if settings.trainable_parameters == "temporal":
        check_keeps_schedule(base.scheduler, config.diffusion.scheduler)
    dataset, teacher = instantiate(config.data), config.model.flow_model
    if accelerator.is_main_process:
        for reason, count in dataset.skipped.items():
            print(f"{count} clips skipped: {reason}")
    if config.cached_latents is not None:
        dataset = EncodedClips(config.cached_latents, dataset)
    elif teacher is not None:
        dataset = FlowClips(dataset, teacher, base.vae_scale_factor)
    if config.fps is None:  # the saved config has to know it
        config = OmegaConf.merge(config, {"fps": dataset[0]["fps"]})  # type: ignore[assignment]
    parts = build_networks(config, base)
    if config.init_weights_from is not None:
        new = warm_start({name: parts[name] for name in ("unet", "condition_encoder")}, config.init_weights_from)
        accelerator.print(describe(new, config.init_weights_from))
    pipeline = build_pipeline(
        config,
        base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        **parts,
    )
    if isinstance(dataset, EncodedClips):
        cached_latents_check.check(dataset, pipeline, teacher)
    predict_net = None if teacher is None else PredictNet.for_unet(pipeline.unet)
    validate = None
    if settings.validation_prompts:
        keyframes = build_keyframes(base)
        validate = Validation(accelerator, pipeline, keyframes, settings.validation_prompts, output_dir, settings.seed)
    del base  # its 2D UNet has been copied

    def record() -> None:
        save(config, output_dir / CONFIG)
        append_record(output_dir / ENVIRONMENT, describe_environment(accelerator.num_processes))

    try:
        train(accelerator, pipeline, dataset, settings, validate, predict_net, listen, record)
        status = 0
    except Preempted as stop:
        accelerator.print(f"{stop}; go on with resume_from_checkpoint=latest")
        status = EXIT_STATUS
    accelerator.end_training()
    return status


def export(pipeline: ImageToVideoPipeline, output_dir: Path) -> None:
    """Saves the pipeline among the checkpoints of its run, `model_index.json` last; what is embedded is named, not copied."""
    sources = (pipeline.config["base"], pipeline.config["unet_source"] or pipeline.config["base"])
    whole = output_dir / ".pipeline.partial"
    save_pipeline(pipeline, whole, with_base=any(source is None or not is_embedded(source) for source in sources))
    for part in sorted(whole.iterdir(), key=lambda path: path.name == INDEX):
        if part.is_dir():
            with atomic_folder(output_dir / part.name) as folder:
                for file in part.iterdir():
                    os.replace(file, folder / file.name)
        else:
            os.replace(part, output_dir / part.name)
    shutil.rmtree(whole)


def make_objective(pipeline: ImageToVideoPipeline, settings: Settings) -> Objective:
    """What a run with these settings trains the pipeline on."""
    return Objective(
        scheduler=pipeline.training_scheduler,
        prior=pipeline.noise_prior,
        remapped_timesteps=pipeline.remapped_timesteps,
        keyframe_position=pipeline.keyframe_position,
        snr_gamma=settings.snr_gamma,
        motion_weight=settings.motion_weight,
        flow_weight=settings.flow_weight,
        timestep_logit_normal=settings.timestep_logit_normal,
        text_dropout=settings.text_dropout,
        image_dropout=settings.image_dropout,
        seed=settings.seed,
    )


def _optimise(
    accelerator: Accelerator,
    denoiser: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    micro_batches: Iterator[dict[str, Any]],
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    meter: Meter,
) -> float | None:
    """One step of the optimiser over its micro-batches; returns the norm of the gradient before clipping, if it is told."""
    norm: torch.Tensor | float | None = None
    for _ in range(settings.gradient_accumulation_steps):
        items = next(micro_batches)
        with accelerator.accumulate(denoiser):
            with meter.counting(items):
                accelerator.backward(loss_of(items))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(denoiser.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return None if norm is None else float(norm)


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, in 8 bits if asked to.

    Raises:
        UserError: 8 bits without bitsandbytes.
    """
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if not settings.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **arguments)  # a third of the default's time on a CPU
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("use_8bit_adam=true needs bitsandbytes; install it, or set use_8bit_adam=false") from None
    return AdamW8bit(parameters, **arguments)


def _choose(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    sweep(output_dir)
    return choose_checkpoint(output_dir, resume_from_checkpoint)


def _micro_batches(
    accelerator: Accelerator, clips: IndexedDataset, settings: Settings, progress: Progress
) -> Iterator[dict[str, Any]]:
    """This process's share of the clips that are left, collated; those that cannot be read go to `output_dir/quarantine`."""
    clips_per_step = settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps
    stop = progress.clips + max(0, settings.max_train_steps - progress.step) * clips_per_step
    clips.dataset.check_processes(accelerator.num_processes)
    folder = Path(settings.output_dir) / "quarantine"
    if progress.clips == 0:  # a new run: what an earlier one met there says nothing of this one
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()
    clips.quarantine = Quarantine(folder, settings.clip_retries, accelerator.process_index)
    loader = DataLoader(
        clips,
        batch_sampler=DistributedBatchSampler(
            progress.clips,
            stop,
            settings.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            clips.same_shape_run,
        ),
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=ignore_signals_in_worker,
        pin_memory=accelerator.device.type == "cuda",
        # Its own source of seeds: taken from the global one, they would differ between a resumed and an uninterrupted run.
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return iter(loader)


def _loggable(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) else str(value)
