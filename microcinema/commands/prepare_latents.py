"""The command `prepare latents`: the clips of a training run encoded once, by all processes, into shards that training reads."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from microcinema.config.compose import instantiate
from microcinema.data import latent_writer
from microcinema.data.flow_clips import FlowClips
from microcinema.data.latents import Layout
from microcinema.data.quarantine import ErrorRate
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.build import build_networks, build_pipeline
from microcinema.training.cached_latents_check import fingerprint
from microcinema.utils.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Encodes the clips of the run that the config describes into its `cached_latents`, and prints what is there.

    Raises:
        UserError: no folder named, a config that describes nothing that can be made, and as of `encode_clips`.
    """
    from omegaconf import OmegaConf

    if config.cached_latents is None:
        raise UserError("cached_latents is null; set it to the folder to write, in training as well")
    # A process that is done waits for the slowest one, which may take long.
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))]
    )
    dataset = instantiate(config.data)
    encode_clips(
        accelerator,
        _pipeline(OmegaConf.merge(config, {"fps": config.fps or 8.0})),  # type: ignore[arg-type]
        dataset,
        Path(config.cached_latents),
        config.model.flow_model,
        cached_parts=config.cached_parts,
        layout=Layout(len(dataset), config.passes, config.clips_per_shard),
        num_workers=config.dataloader_num_workers,
        clip_retries=config.clip_retries,
        max_error_rate=config.max_error_rate,
    )
    accelerator.end_training()


def encode_clips(
    accelerator: Accelerator,
    pipeline: ImageToVideoPipeline,
    dataset: Any,
    folder: Path,
    flow_model: str | None,
    cached_parts: Sequence[str] | None,
    layout: Layout,
    num_workers: int = 0,
    clip_retries: int = 1,
    max_error_rate: float = 0.05,
) -> None:
    """Encodes a data set for the training of a pipeline. Every process calls it with the same arguments; shards that are finished stand.

    Args:
        accelerator: the processes, their devices and the precision that encoders work in.
        pipeline: of which the frozen encoders are used.
        dataset: of clips; those that cannot be read go to quarantine, and are missing.
        folder: to write.
        flow_model: of PredictNet; None: there is none.
        cached_parts: beside latents, some of what the model reads; None: all that it reads.
        layout: of the folder.
        num_workers: processes that decode, for each process.
        clip_retries: more tries of a clip that cannot be read.
        max_error_rate: share of broken clips that is borne.

    Raises:
        UserError: a folder of something else or of other latents, something to keep that the model does not read, more processes than
            shards, too many clips that cannot be read, a full disk.
    """
    if accelerator.num_processes > layout.num_shards:
        raise UserError(
            f"{accelerator.num_processes} processes and {layout.num_shards} shards; "
            "use at most as many processes, or a smaller clips_per_shard"
        )
    for encoder in (pipeline.vae, pipeline.text_encoder, pipeline.image_encoder, pipeline.motion_encoder):
        if encoder is not None:
            encoder.requires_grad_(False).eval().to(accelerator.device)
    parts = fingerprint(pipeline, dataset, flow_model)
    cached_parts = _kept(cached_parts, parts, pipeline.uses_keyframe_pixels)
    encode = BatchEncoder(pipeline, accelerator.device)

    def kept(items: dict[str, Any]) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            return _encode(encode, items, cached_parts)

    if accelerator.is_main_process:
        with accelerator.autocast():
            empty = {name: part for name, part in vars(encode.dropped()).items() if name in cached_parts}
        latent_writer.begin(folder, layout, {name: parts[name] for name in ("vae", "clips", *cached_parts)}, empty)
    accelerator.wait_for_everyone()

    if "flow" in cached_parts:
        dataset = FlowClips(dataset, str(flow_model), pipeline.vae_scale_factor)
    rank = accelerator.process_index
    shards = latent_writer.missing(folder, layout, rank, accelerator.num_processes)
    errors = ErrorRate(max_error_rate)
    batches = latent_writer.read(dataset, folder, layout, shards, clip_retries, rank, num_workers, errors)
    total = sum(len(layout.rows(shard)) for shard in shards)
    with tqdm(total=total, desc="encoding", unit="clip", disable=None if rank == 0 else True) as bar:
        for shard in shards:
            latent_writer.write(folder, shard, layout, batches, kept)
            bar.update(len(layout.rows(shard)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        count = latent_writer.finish(folder, layout)
        size = sum(file.stat().st_size for file in folder.glob("[0-9]*.tar"))
        broken = f"; {layout.num_rows - count} that are broken are in quarantine" if count < layout.num_rows else ""
        print(f"{count} clips in {layout.num_shards} shards, {size / 2**20:.1f} MiB{broken}")
        print(f"cached_latents={folder} trains from them, with the keys that they were made with")


def _pipeline(config: "DictConfig") -> ImageToVideoPipeline:
    base = load_base(**config.base)
    return build_pipeline(
        config,
        base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        **build_networks(config, base),
    )


def _kept(cached_parts: Sequence[str] | None, parts: Mapping[str, Any], uses_keyframe_pixels: bool) -> list[str]:
    """What to keep beside the latents; by default all that the model reads, pixels of the key frame only if its tokens are not enough.

    Raises:
        UserError: something that the model does not read.
    """
    known = [name for name in parts if name not in ("vae", "clips")]
    unknown = [name for name in cached_parts or () if name not in known]
    if unknown:
        raise UserError(f"cached_parts={unknown[0]}, which this model does not read; it reads {', '.join(known)}")
    if cached_parts is None:
        return [name for name in known if name != "keyframe" or uses_keyframe_pixels]
    return [name for name in known if name in cached_parts]


@torch.no_grad()
def _encode(encode: BatchEncoder, items: dict[str, Any], cached_parts: list[str]) -> dict[str, torch.Tensor]:
    """What is kept of a batch."""
    made: dict[str, torch.Tensor] = {"latents": encode.latents(items)}
    for name in cached_parts:
        if name == "keyframe":
            made[name] = ((encode.pixels(items) + 1) * 127.5).round().to(torch.uint8)
        elif name == "flow":
            made |= {"flow": items["flow"], "flow_valid": items["flow_valid"]}
        elif name == "image_tokens":
            made[name] = encode.pipeline.encode_pixels(encode.pixels(items))[name]
        else:
            made[name] = getattr(encode, name)(items)
    return made
