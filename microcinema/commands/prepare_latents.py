"""The command `prepare latents`: encodes the clips of a training run once, by all processes, into shards that training reads."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from microcinema.config.schema import PrepareLatents
from microcinema.data import latent_writer
from microcinema.data.latents import Layout
from microcinema.data.optical_flow import FlowClips
from microcinema.data.source import ClipSource
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.components import freeze_encoders
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_clips, build_networks, build_pipeline
from microcinema.training.cached_latents_check import fingerprint
from microcinema.training.distributed import make_accelerator
from microcinema.utils.errors import UserError


def run(config: PrepareLatents) -> None:
    """Encodes the clips of the run that the config describes into its folder `cached_latents`, and prints their number and size. A UserError
    if there is no folder, if the config does not fit its base, and as `encode_clips`."""
    assert config.cached_latents is not None  # the table of commands requires it
    # A finished process waits for the slowest one, which may take long.
    timeout = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    accelerator = make_accelerator(config, timeout)
    dataset, base = build_clips(config, accelerator), load_base(**vars(config.base))
    encode_clips(
        accelerator,
        build_pipeline(config, base.scheduler, **base.shared, **build_networks(config, base)),
        dataset,
        Path(config.cached_latents),
        config.model.flow_model,
        cached_parts=config.cached_parts,
        layout=Layout(len(dataset), config.epochs_cached, config.clips_per_shard),
        num_workers=config.dataloader_num_workers,
        clip_retries=config.clip_retries,
        max_error_rate=config.max_error_rate,
    )
    accelerator.end_training()


def encode_clips(
    accelerator: Accelerator,
    pipeline: ImageToVideoPipeline,
    dataset: ClipSource,
    folder: Path,
    flow_model: str | None,
    cached_parts: Sequence[str] | None,
    layout: Layout,
    **settings: Any,
) -> None:
    """Encodes a data set for the training of a pipeline. Every process calls it with the same arguments; finished shards are kept.

    Args:
        pipeline: whose frozen encoders are used.
        flow_model: source of PredictNet's flow; None: no PredictNet.
        cached_parts: tensors to cache beside the latents, among those that the model reads; None: all of them.
        settings: num_workers, clip_retries and max_error_rate, as in `write_shards`.

    Raises:
        UserError: a folder of something else or of other latents, a part that the model does not read, more processes than
            shards, too many broken clips, a full disk.
    """
    if accelerator.num_processes > layout.num_shards:
        excess = f"{accelerator.num_processes} processes and {layout.num_shards} shards"
        raise UserError(f"{excess}; use at most as many processes, or a smaller clips_per_shard")
    freeze_encoders(pipeline, accelerator.device)
    contents = fingerprint(pipeline, dataset, flow_model)
    parts = _select_parts(cached_parts, contents, pipeline.uses_keyframe_pixels)
    encoder = BatchEncoder(pipeline, accelerator.device)
    if accelerator.is_main_process:
        with accelerator.autocast():
            empty_tokens = {name: tokens for name, tokens in vars(encoder.null_conditioning()).items() if name in parts}
        contents = {name: contents[name] for name in ("vae", "clips", *parts)}
        latent_writer.create_folder(folder, layout, contents, empty_tokens, pipeline.unet.options.motion_score)
    accelerator.wait_for_everyone()

    def encode(items: dict[str, Any]) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            return _encode(encoder, items, parts)

    clips = FlowClips(dataset, str(flow_model), pipeline.vae_scale_factor) if "flow" in parts else dataset
    ranks = accelerator.process_index, accelerator.num_processes
    latent_writer.write_shards(folder, layout, clips, encode, *ranks, **settings)
    if pipeline.unet.options.motion_score:
        latent_writer.write_scores(folder, layout, dataset, *ranks, settings.get("num_workers", 0))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        count = latent_writer.write_index(folder, layout)
        size = sum(file.stat().st_size for file in folder.glob("[0-9]*.tar"))
        broken = f"; {layout.num_rows - count} broken clips are in quarantine" if count < layout.num_rows else ""
        print(f"{count} clips in {layout.num_shards} shards, {size / 2**20:.1f} MiB{broken}")
        print(f"cached_latents={folder} trains on them, with the keys of this command")


def _select_parts(
    cached_parts: Sequence[str] | None, contents: Mapping[str, Any], uses_keyframe_pixels: bool
) -> list[str]:
    """The tensors to cache beside the latents; by default all that the model reads, the key frame's pixels only if its tokens do not suffice."""
    parts = [name for name in contents if name not in ("vae", "clips")]
    unknown = [name for name in cached_parts or () if name not in parts]
    if unknown:
        raise UserError(f"cached_parts={unknown[0]}, which this model does not read; it reads {', '.join(parts)}")
    if cached_parts is None:
        return [name for name in parts if name != "keyframe" or uses_keyframe_pixels]
    return [name for name in parts if name in cached_parts]


@torch.no_grad()
def _encode(encoder: BatchEncoder, items: dict[str, Any], parts: list[str]) -> dict[str, torch.Tensor]:
    """The latents of a batch and the parts to cache, each (b, ...)."""
    tensors: dict[str, torch.Tensor] = {"latents": encoder.latents(items)}
    for name in parts:
        if name == "keyframe":
            tensors[name] = ((encoder.pixels(items) + 1) * 127.5).round().to(torch.uint8)
        elif name == "flow":
            tensors |= {"flow": items["flow"], "flow_valid": items["flow_valid"]}
        elif name == "image_tokens":
            tensors[name] = encoder.pipeline.encode_pixels(encoder.pixels(items))[name]
        else:
            tensors[name] = getattr(encoder, name)(items)
    return tensors
