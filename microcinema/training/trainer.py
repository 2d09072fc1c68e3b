"""The training loop. Loss, metrics, moving averages, checkpoints and validation have modules of their own."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from microcinema.config.schema import Train
from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.quarantine import ErrorRate, Quarantine
from microcinema.data.source import ClipSource
from microcinema.models.int8 import quantize_frozen
from microcinema.models.predict_net import PredictNet
from microcinema.pipelines.components import freeze_encoders
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import INDEX, is_embedded
from microcinema.pipelines.saving import save_pipeline
from microcinema.training.batch_encoder import BatchEncoder, Region
from microcinema.training.checkpoint import Checkpoints
from microcinema.training.compilation import compilation_errors, compile_blocks, count_flops, count_graphs
from microcinema.training.consistency import load_objective
from microcinema.training.distributed import broadcast_from_main, check_replicated, is_zero3, prefetch_layers, unshard
from microcinema.training.ema import Averages, ema_pipeline
from microcinema.training.lora import save_lora
from microcinema.training.loss import TrainableModel, make_loss_config, training_loss
from microcinema.training.metrics import StepMetrics
from microcinema.training.nan_guard import NanGuard
from microcinema.training.preemption import Preempted, Preemption, ignore_signals_in_worker
from microcinema.training.resume import Progress, choose_checkpoint, run_identity
from microcinema.training.trackers import start_trackers
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_folder, make_folder, partial, sweep

Items = dict[str, Any]
"""A collated micro-batch; keys as in data/clips.py."""
Validate = Callable[[Accelerator, ImageToVideoPipeline, int], None]


class Trainer:
    """Trains a pipeline's `unet` and saves it, with averaged weights, as `output_dir`.

    Every process of a distributed run makes one with the same arguments. Clips, their noise and their dropout depend only on the
    seed and the clips' global indices; a run that is interrupted and resumed ends in the same bits.

    Args:
        accelerator: from `make_accelerator`, for this run alone.
        dataset: items as in data/clips.py: `video` (f, 3, H, W) or scaled `latents` (f, c, h, w), `caption`, `fps`.
        validation: of `validations`, which are called on every rank every `validation_steps` and at the end, on averaged weights.
        predict_net: trained beside the pipeline, saved in checkpoints alone; needs clips with `flow` and `flow_valid`.
        on_metrics: called with all metrics that are logged: those of each interval, and the seconds of each checkpoint and validation.
        region: marks named parts of a step for a profiler: `VAE`, `encoders`, `forward`, `backward`, `optimizer`.

    Raises:
        UserError: settings that cannot work, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: ImageToVideoPipeline,
        dataset: ClipSource,
        config: Train,
        validation: Validate | None = None,
        predict_net: PredictNet | None = None,
        on_metrics: Callable[[dict[str, float]], None] | None = None,
        region: Region = record_function,
    ) -> None:
        self.accelerator, self.pipeline, self.config = accelerator, pipeline, config
        self.validations, self.on_metrics, self.region = [validation] if validation else [], on_metrics, region
        self.output_dir = make_folder(config.output_dir)
        if accelerator.is_main_process:
            sweep(self.output_dir, remove=False)  # a checkpoint that was about to be replaced gets its name back
        resume_from = config.resume_from_checkpoint
        checkpoint = broadcast_from_main(accelerator, lambda: choose_checkpoint(self.output_dir, resume_from))
        self._set_up_model(predict_net)
        self.clips = IndexedDataset(dataset, config.seed)
        self.clips_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
        identity = run_identity(config, pipeline, self.clips, accelerator.num_processes, accelerator.mixed_precision)
        self.checkpoints = Checkpoints(
            accelerator, self.output_dir, self.model, self.trained, self.ema, config.checkpoints_total_limit, identity
        )
        self.loss_config = make_loss_config(pipeline, config, accelerator.device)
        if config.objective is not None:  # before the checkpoint, since opening the teacher draws random numbers
            objective = load_objective(config.objective, pipeline, accelerator)
            self.loss_config = replace(self.loss_config, objective=objective)
        self.progress = self.checkpoints.load(checkpoint) if checkpoint else Progress(0, 0)
        self.encode = BatchEncoder(pipeline, accelerator.device, dataset.empty_tokens, region)
        self.metrics = StepMetrics(accelerator, self.loss_config.scheduler.config["num_train_timesteps"])
        self.nan_guard = NanGuard(accelerator, self.output_dir, config.seed)
        quarantine = self.output_dir / "quarantine" if accelerator.is_main_process else None
        self.errors = ErrorRate(config.max_error_rate, quarantine)

    def train(self) -> Path:
        """Trains from the current step to the last and saves the pipeline; returns `output_dir`. Collective.

        Raises:
            UserError: a loss or gradient that is not finite, too many broken clips, a full disk.
            Preempted: the run received SIGTERM or SIGUSR1, and has saved a checkpoint.
        """
        config, preempted = self.config, False
        if self.accelerator.is_main_process:
            sweep(self.output_dir)  # only now: a run that is refused removes nothing
        start_trackers(self.accelerator, config, resumed=self.progress.step > 0)
        with Preemption() as preemption, closing(self._micro_batches()) as micro_batches, self._progress_bar() as bar:
            if self.progress.step > 0:
                self.validate()  # in case the run was killed between the checkpoint and this
            self.metrics.start_interval()
            while self.progress.step < config.max_train_steps and not preempted:
                self.step(micro_batches)
                bar.update()
                # All of these, so that an interval has the same steps in a run that resumes from any of them.
                if not self._is_due(config.logging_steps, config.checkpointing_steps, config.validation_steps):
                    continue
                metrics = self.finish_interval()
                loss, rate = self.metrics.recent_loss, metrics["clips_per_second"]
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} clips/s", refresh=False)
                last = self.progress.step == config.max_train_steps
                preempted = preemption.on_any_rank(self.accelerator) and not last
                if preempted or self._is_due(config.checkpointing_steps):
                    self.save()
                if not preempted:
                    self.validate()
        if not preempted:
            self.export()
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if preempted:
            raise Preempted(f"preempted; saved step {self.progress.step} of {config.max_train_steps}")
        return self.output_dir

    def step(self, micro_batches: Iterator[Items]) -> None:
        """One optimizer step over its micro-batches; waits for nothing that a GPU computes. Collective."""
        accelerator, grad_norm = self.accelerator, None
        for _ in range(self.config.gradient_accumulation_steps):
            items = next(micro_batches)
            with accelerator.accumulate(self.model):
                counting = nullcontext() if self.config.compile else self.metrics.count_flops(items)
                with compilation_errors(), counting:
                    loss = self.loss(items)
                    with self.region("backward"):
                        accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                with self.region("optimizer"):
                    self.optimizer.step()
                self.optimizer.zero_grad()
        self.metrics.end_step(None if grad_norm is None else unshard(torch.as_tensor(grad_norm)))
        self.learning_rate = self.lr_schedule.get_last_lr()[0]
        # Whether the loss scale of fp16 was too large, and the optimizer skipped the step, is known to the device alone: it counts.
        self.lr_schedule.step()
        if self.ema is not None:
            self.ema.step(list(self.trained.values()))
        self.progress = Progress(self.progress.step + 1, self.progress.clips + self.clips_per_step)

    def finish_interval(self) -> dict[str, float]:
        """Reads, checks and logs the metrics of the steps since the last call, before anything of them is saved. Collective. A UserError if a
        loss or gradient was not finite."""
        metrics = {**self.metrics.finish_interval(), "lr": self.learning_rate, "broken_clips": self.errors.total}
        if self.config.compile:
            metrics["compiled_graphs"] = count_graphs()
        # Gradients that overflow are the loss scaler's business.
        norms = self.metrics.grad_norms[: 0 if self.accelerator.mixed_precision == "fp16" else None]
        self.nan_guard.assert_finite(self.metrics.losses, norms)
        self._log(metrics)
        return metrics

    def loss(self, items: Items) -> torch.Tensor:
        """The mean loss of a micro-batch."""
        with self.accelerator.autocast():
            batch, null = self.encode(items), self.encode.null_conditioning()
        noise = self.loss_config.sample_noise_and_timesteps(batch.indices, batch.latents.shape[1:])
        noise = noise.to(self.accelerator.device)
        losses = training_loss(self._forward, batch, noise, null, self.loss_config)
        self.metrics.add(losses.total, noise.t, losses.flow)
        self.nan_guard.record(self.progress.step + 1, items, batch.latents, noise.t, losses.total)
        return losses.total.mean()

    def save(self) -> None:
        """Writes a checkpoint. Collective."""
        with self.metrics.paused():
            self.checkpoints.save(self.progress)
        self._log({"checkpoint_seconds": self.metrics.paused_seconds})

    def validate(self) -> None:
        """Runs the validations, if they are due after this step, with the averaged weights. Collective."""
        if not self.validations or not self._is_due(self.config.validation_steps):
            return
        with self.metrics.paused(), self._ema_pipeline() as pipeline:
            for validation in self.validations:
                validation(self.accelerator, pipeline, self.progress.step)
        self._log({"validation_seconds": self.metrics.paused_seconds})

    def export(self) -> None:
        """Saves the pipeline, or the LoRA, with the averaged weights in the folder of the run. Collective."""
        if self.config.lora is not None:
            averaged = self.ema.shadow_params if self.ema else self.trained.values()
            weights = {name: unshard(p).detach().cpu() for name, p in zip(self.trained, averaged, strict=True)}
            if self.accelerator.is_main_process:
                save_lora(weights, self.config, self.output_dir, self.output_dir.resolve().name, self.progress.step)
            return
        with self._ema_pipeline() as pipeline:
            if self.accelerator.is_main_process:
                export_pipeline(pipeline, self.output_dir)

    @contextmanager
    def _ema_pipeline(self) -> Iterator[ImageToVideoPipeline]:
        """The pipeline as it would be used, not compiled: samples have other shapes than clips. Collective."""
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with eager, ema_pipeline(self.accelerator, self.pipeline, self.model, self.ema, self.trained) as pipeline:
            yield pipeline

    def _set_up_model(self, predict_net: PredictNet | None) -> None:
        """Freezes the encoders, selects what trains, and prepares model, optimizer and schedule for the run's processes."""
        pipeline, config = self.pipeline, self.config
        freeze_encoders(pipeline, self.accelerator.device)
        if config.ddp.comm_hook == "bf16" and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            raise UserError("ddp.comm_hook=bf16 needs GPUs; set ddp.comm_hook=null")
        model = TrainableModel.for_training(pipeline, config, predict_net)
        optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], config)
        lengths = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
        lr_schedule = get_scheduler(config.lr_scheduler, optimizer, **lengths)
        self.model, self.optimizer, self.lr_schedule = self.accelerator.prepare(model, optimizer, lr_schedule)
        prefetch_layers(self.model)
        if config.quantization is not None:
            check_replicated(self.accelerator, "quantization=int8", "quantization=null")
            quantize_frozen(self.model, keep_originals=True)
        if config.compile:
            compile_blocks(self.model, self.accelerator)
        # Only now: FSDP replaces parameters by shards.
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        self.trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        if config.use_ema and any(map(is_zero3, self.model.parameters())):
            raise UserError("use_ema=true does not work with ZeRO-3; use FSDP, ZeRO-2 or use_ema=false")
        trained = list(self.trained.values())
        self.ema = Averages(trained, decay=config.ema_decay, foreach=True) if config.use_ema else None

    def _forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.config.compile and torch.is_grad_enabled():
            model = self.accelerator.unwrap_model(self.model)
            self.metrics.add_flops(args[0].shape, lambda: count_flops(model, *args, **kwargs))
        with self.region("forward"):
            return self.model(*args, **kwargs)

    def _micro_batches(self) -> Generator[Items, None, None]:
        """This process's share of the remaining clips, collated; broken clips are recorded in `output_dir/quarantine`."""
        accelerator, config, clips = self.accelerator, self.config, self.clips
        clips.dataset.check_processes(accelerator.num_processes)
        folder = self.output_dir / "quarantine"
        if self.progress.clips == 0:  # a new run starts without the records of an earlier one
            if accelerator.is_main_process:
                for record in folder.glob("rank-*.jsonl"):
                    record.unlink()
            accelerator.wait_for_everyone()
        clips.quarantine = Quarantine(folder, config.clip_retries, accelerator.process_index)
        remaining_steps = max(0, config.max_train_steps - self.progress.step)
        start, stop = self.progress.clips, self.progress.clips + remaining_steps * self.clips_per_step
        ranks = accelerator.process_index, accelerator.num_processes
        sampler = DistributedBatchSampler(start, stop, config.train_batch_size, *ranks, clips.same_shape_run)
        loader = DataLoader(
            clips,
            batch_sampler=sampler,
            num_workers=config.dataloader_num_workers,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=accelerator.device.type == "cuda",
            # Seeds of its own: drawn from the global generator, they would differ between a resumed and an uninterrupted run.
            generator=torch.Generator().manual_seed(config.seed),
        )
        return self.metrics.timed_iterator(self.errors.watch(iter(loader)))

    def _is_due(self, *every: int) -> bool:
        """Whether this is the last step, or a multiple of any of these."""
        step = self.progress.step
        return step == self.config.max_train_steps or any(step % each == 0 for each in every)

    def _progress_bar(self) -> tqdm:
        total, hidden = self.config.max_train_steps, not self.accelerator.is_main_process
        return tqdm(total=total, initial=self.progress.step, desc="training", unit="step", disable=hidden)

    def _log(self, metrics: dict[str, float]) -> None:
        try:
            self.accelerator.log(metrics, step=self.progress.step)
        except OSError as error:
            fault = f"cannot write to '{self.output_dir}' ({error.strerror})"
            raise UserError(f"{fault}; make room, and resume from the last checkpoint") from error
        if self.on_metrics is not None:
            self.on_metrics(metrics)


def make_optimizer(parameters: list[nn.Parameter], config: Train) -> torch.optim.Optimizer:
    """AdamW, with 8-bit states if the config says so; a UserError if they need bitsandbytes, which is not installed."""
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **arguments)  # a third of the default's time on a CPU
    with user_errors("use_8bit_adam=true needs bitsandbytes; install it, or set use_8bit_adam=false"):
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(parameters, **arguments)


def export_pipeline(pipeline: ImageToVideoPipeline, output_dir: Path) -> None:
    """Saves the pipeline beside the run's checkpoints, `model_index.json` last; embedded components are referenced, not copied."""
    sources = (pipeline.config["base"], pipeline.config["unet_source"] or pipeline.config["base"])
    temporary = partial(output_dir / "pipeline")
    save_pipeline(pipeline, temporary, with_base=any(source is None or not is_embedded(source) for source in sources))
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX):
        if path.is_dir():
            with atomic_folder(output_dir / path.name) as folder:
                for file in path.iterdir():
                    os.replace(file, folder / file.name)
        else:
            os.replace(path, output_dir / path.name)
    shutil.rmtree(temporary)
