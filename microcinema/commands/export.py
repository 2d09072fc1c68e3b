"""The command `export`: a checkpoint or a finished run becomes a pipeline folder with a model card, or a LoRA with its own."""

from pathlib import Path

import torch

from microcinema.config.compose import load, shareable, to_yaml
from microcinema.config.schema import Export, Train
from microcinema.diffusion.schedule import make_scheduler
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import (
    INDEX,
    freeze,
    is_embedded,
    load_index,
    load_scheduler_config,
    resolve_snapshot,
)
from microcinema.pipelines.saving import load_pipeline, write_pipeline
from microcinema.training.build import CONFIG, build_pipeline
from microcinema.training.checkpoint import EMA, load_ema, load_safetensors
from microcinema.training.lora import CARD, WEIGHTS, save_lora
from microcinema.training.loss import TrainableModel
from microcinema.training.resume import Progress, find_checkpoints, is_checkpoint, read_progress, read_state
from microcinema.training.warm_start import known_schedule
from microcinema.utils.errors import UserError
from microcinema.utils.files import LOCK, atomic_folder
from microcinema.utils.hashing import hash_file
from microcinema.utils.logging import quieten_libraries
from microcinema.utils.provenance import describe_code
from microcinema.utils.templates import render

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"


def run(config: Export) -> None:
    """Writes the pipeline that the config of `export` asks for; bad input, or an output folder with other contents, is a UserError."""
    assert config.checkpoint is not None  # the table of commands requires it
    source, folder = Path(config.checkpoint), Path(config.output_dir)
    check_replaceable(folder)
    quieten_libraries()
    run_folder = source.parent if is_checkpoint(source) else source
    if not (run_folder / CONFIG).is_file():
        fault = f"'{run_folder / CONFIG}' is not there"
        raise UserError(f"{fault}; give a checkpoint in the folder of its run, with the run's config")
    trained_with = load(run_folder / CONFIG, "train")
    if trained_with.lora is not None:
        export_lora(source, folder, trained_with, config)
        return
    if is_checkpoint(source):
        pipeline, progress = open_checkpoint(source, trained_with, config.use_ema), read_progress(source)
    else:
        pipeline, progress = open_run(source, trained_with, config.use_ema), None
    dtype = getattr(torch, config.torch_dtype)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            freeze(part, dtype)
    with atomic_folder(folder) as temporary:
        write_pipeline(pipeline, temporary, config.with_base)
        card = write_card(folder, temporary, pipeline, trained_with, progress, config.use_ema)
        (temporary / CARD).write_text(card, encoding="utf-8")
    print(folder)


def export_lora(source: Path, folder: Path, trained_with: Train, config: Export) -> None:
    """Writes the LoRA of a checkpoint; a UserError if it lacks averages, or the run is finished and has written it."""
    if not is_checkpoint(source):
        raise UserError(f"'{source}' is no checkpoint; a finished run holds its LoRA, {WEIGHTS}, already")
    files = [source / EMA] if config.use_ema else [*(source / "unet").glob("*.safetensors")]
    tensors, dtype = load_safetensors(files, "set use_ema=false, or export another"), getattr(torch, config.torch_dtype)
    weights = {key if config.use_ema else f"unet.{key}": value.to(dtype) for key, value in tensors.items()}
    with atomic_folder(folder) as temporary:
        save_lora(weights, trained_with, temporary, folder.name, read_progress(source).step)
    print(folder)


def open_checkpoint(folder: Path, config: Train, use_ema: bool) -> ImageToVideoPipeline:
    """The pipeline of a training checkpoint and the config of its run; a UserError if it lacks averages or keys, or there is no base."""
    unet = VideoUNet.from_pretrained(folder / "unet")
    if use_ema:
        load_ema(folder, TrainableModel(unet))
    name, revision = config.base.pretrained_model_name_or_path, config.base.revision
    scheduler = make_scheduler(load_scheduler_config(resolve_snapshot(name, revision=revision)))
    levels, _ = known_schedule(str(folder), scheduler)
    components = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet}
    quantiles = (read_state(folder)["run"] or {"fixed": {}})["fixed"].get("motion_quantiles")
    return build_pipeline(config, scheduler, levels, **components, motion_quantiles=quantiles)


def open_run(folder: Path, config: Train, use_ema: bool) -> ImageToVideoPipeline:
    """The pipeline that a run has saved; a UserError if it is not finished, or has saved the other kind of weights."""
    checkpoints = find_checkpoints(folder)
    example = f"such as '{checkpoints[-1]}'" if checkpoints else "if it has left one"
    if not (folder / INDEX).is_file():
        raise UserError(f"'{folder}' is neither a checkpoint nor a finished run; export a checkpoint, {example}")
    if use_ema and not config.use_ema:
        raise UserError(f"'{folder}' was trained without moving averages; set use_ema=false")
    if config.use_ema and not use_ema:
        raise UserError(f"'{folder}' holds the averaged weights; for the others, export a checkpoint, {example}")
    return load_pipeline(folder)


def check_replaceable(folder: Path) -> None:
    """Refuses, with a UserError that names it, anything in the output folder beside a pipeline and its card."""
    names = {path.name for path in folder.glob("*")}
    ours = {INDEX, CARD, WEIGHTS}
    if INDEX in names:
        ours |= {name for name, value in load_index(str(folder)).items() if isinstance(value, list | tuple)}
    if others := sorted(names - ours - {LOCK}):
        raise UserError(f"output_dir '{folder}' is there and holds {others[0]}, no part of a pipeline; choose another")


def write_card(
    folder: Path, files: Path, pipeline: ImageToVideoPipeline, config: Train, progress: Progress | None, averaged: bool
) -> str:
    """The model card of a pipeline whose files are in `files` and will be in `folder`; `progress` None: its run was finished."""
    base = config.base.pretrained_model_name_or_path
    settings = shareable(config)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    weights = sorted(files.rglob("*.safetensors"))
    return render(
        TEMPLATE,
        name=folder.name,
        base=settings["base"]["pretrained_model_name_or_path"],
        base_of_hub=not Path(base).exists() and not is_embedded(base),
        embedded=is_embedded(base),
        pipeline=pipeline.config,
        parameters={name: sum(weight.numel() for weight in part.parameters()) for name, part in networks.items()},
        hashes={file.relative_to(files).as_posix(): hash_file(file) for file in weights},
        dtype=str(pipeline.unet.dtype).removeprefix("torch."),
        config=settings,
        config_yaml=to_yaml(settings).strip(),
        step=progress.step if progress else settings["max_train_steps"],
        clips=progress.clips if progress else None,
        averaged=averaged,
        versions=describe_code(),
    )
