"""The command doctor: whether `train` can run here with these settings, line by line, and what to do where it cannot."""

import importlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from microcinema import __version__
from microcinema.config.compose import compose
from microcinema.config.schema import Train
from microcinema.data.indexed import IndexedDataset
from microcinema.data.latents import EncodedClips
from microcinema.data.source import ClipSource
from microcinema.models.int8 import quantize_frozen
from microcinema.pipelines.base_model import base_components
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import check_weight_files, is_embedded, resolve_model_path, resolve_snapshot
from microcinema.pipelines.single_file import is_single_file
from microcinema.profiling.memory_estimate import (
    Estimate,
    empty_pipeline,
    group_offload_memory,
    sampling_memory,
    training_memory,
)
from microcinema.training.build import build_held_out
from microcinema.training.distributed import make_accelerator
from microcinema.training.launch_settings import launch_settings
from microcinema.training.resume import check_identity, choose_checkpoint, read_state, run_identity
from microcinema.utils.errors import UserError, first_line
from microcinema.utils.files import lock_folder

OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIB = 2**30
CPU = torch.device("cpu")
# What is measured may be this much more than the estimate (docs/memory.md).
MARGIN = 1.15
# The values of gradient_checkpointing, from the fastest on.
CHECKPOINTING: tuple[Any, ...] = (False, "first_level", True)
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")
DECODERS = {"pyav": "av", "decord": "decord"}
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do, which is printed unless it is ok."""

    topic: str
    found: str
    status: str = OK
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice and self.status != OK else ""
        return f"{self.status:<8} {self.topic:<11} {self.found}{advice}"


def run(config: Train) -> int:
    """Prints all findings. Returns 1 if the run cannot work, else 0."""
    problems = 0
    for finding in examine(config):
        print(finding, flush=True)
        problems += finding.status == PROBLEM
    print(f"{problems} problem{'s' * (problems != 1)}: this run cannot work here" if problems else "this run can start")
    return 1 if problems else 0


def examine(config: Train) -> Iterator[Finding]:
    """All findings, the slowest last."""
    # Of this process, as accelerate hands them out.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU
    yield versions()
    found, precision = launch(config)
    yield found
    config = replace(config, mixed_precision=precision)
    yield from devices(config, small=is_embedded(config.base.pretrained_model_name_or_path))
    yield from attention()
    yield modules("decoders", DECODERS, config.data.arguments.get("decoder"), "data.decoder")
    yield modules("trackers", TRACKERS, config.report_to, "report_to")
    if config.use_8bit_adam:
        yield modules("optimizer", {"true": "bitsandbytes"}, "true", "use_8bit_adam")
    found, clips = data(config)
    yield found
    found, checkpoint = output(config)
    yield found
    found, folder = base(**{key: value for key, value in vars(config.base).items() if key != "prediction_type"})
    yield found

    def check(pipeline: ImageToVideoPipeline) -> None:
        if clips is not None and checkpoint is not None:
            ordered = IndexedDataset(clips, config.seed)
            identity = run_identity(config, pipeline, ordered, int(os.environ.get("WORLD_SIZE", 1)), precision)
            check_identity(checkpoint, read_state(checkpoint)["run"], identity)

    if folder is not None:
        yield from needs(config, folder, device, check)


def versions() -> Finding:
    """Versions, and whether they are those that this package declares to work with."""
    try:
        declared = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(requires("microcinema") or ()), re.MULTILINE))
    except PackageNotFoundError:  # run from a checkout that is not installed
        declared = {}
    found = {name: version(name) for name in LIBRARIES}
    old = [name for name in found if _numbers(found[name]) < _numbers(declared.get(name, "0"))]
    libraries = ", ".join(f"{name} {number}" for name, number in found.items())
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    text = f"microcinema {__version__}, Python {platform.python_version()}, {libraries}, {cuda}"
    required = " ".join(f'"{name}>={declared[name]}"' for name in old)
    return Finding("versions", text, PROBLEM if old else OK, f"pip install {required}")


def launch(config: Train) -> tuple[Finding, Any]:
    """Whether accelerate can start and its environment agrees with the run, and the precision where the config leaves it open."""
    try:
        settings = launch_settings(make_accelerator(config))
    except UserError as error:
        return Finding("accelerate", str(error), PROBLEM), config.mixed_precision or "no"
    text = ", ".join(f"{key} {settings[key]}" for key in ("distributed_type", "mixed_precision"))
    return Finding("accelerate", text), settings["mixed_precision"]


def devices(config: Train, small: bool) -> Iterator[Finding]:
    """The devices, and whether they support the precision of the run; `small`: the base is an embedded one, which a CPU can train."""
    if not torch.cuda.is_available():
        bf16 = "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "slow"
        text = f"CPU alone: {os.cpu_count()} cores, {_gib(psutil.virtual_memory().total)}, bf16 {bf16}"
        if config.mixed_precision == "fp16":
            yield Finding("device", text, PROBLEM, "fp16 needs a GPU; set mixed_precision=no")
        else:
            advice = "a model of this size is for a GPU; if there is one, install a torch built for it"
            yield Finding("device", text, OK if small else WARNING, advice)
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        knows_bf16 = (about.major, about.minor) >= (8, 0)
        text = f"{index}: {about.name}, {_gib(about.total_memory)}, bf16 {'yes' if knows_bf16 else 'no'}"
        status = WARNING if config.mixed_precision == "bf16" and not knows_bf16 else OK
        yield Finding("device", text, status, "bf16 is emulated and slow; set mixed_precision=fp16")


def attention() -> Iterator[Finding]:
    """Which kernels of scaled-dot-product attention there are, and xformers."""
    if torch.cuda.is_available():
        kernels = {
            "flash": torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
    else:
        kernels = {"flash (of the CPU)": torch.backends.cuda.flash_sdp_enabled(), "math": True}
    usable = [name for name, is_usable in kernels.items() if is_usable]
    advice = "it takes far more memory than is estimated here; install a current torch"
    status = WARNING if usable == ["math"] else OK
    yield Finding("attention", f"scaled-dot-product kernels: {', '.join(usable)}", status, advice)
    number, reason = _version_of("xformers", imported=True)
    without = f'{reason}; only memory.attention=xformers needs it: pip install "microcinema[xformers]"'
    yield Finding("attention", f"xformers {number or without}")


def modules(topic: str, known: Mapping[str, str], used: str | None, key: str) -> Finding:
    """Which of some interchangeable modules (`known`: value of the key to distribution) are there; the used one is imported, to be sure."""
    found = {name: _version_of(module, imported=name == used) for name, module in known.items()}
    states = {name: number or reason for name, (number, reason) in found.items()}
    text = ", ".join(f"{known[name]} {state}{' (used)' * (name == used)}" for name, state in states.items())
    if used not in found or found[used][0]:
        return Finding(topic, text)
    others = [f"set {key}={name}" for name, (number, _) in found.items() if number]
    return Finding(topic, text, PROBLEM, " or ".join([f"pip install {known[used]}", *others]))


def data(config: Train) -> tuple[Finding, ClipSource | None]:
    """Whether the clips of the run, encoded or not, and the held-out ones can be opened, and the clips."""
    try:
        clips: ClipSource = config.data.build()
        clips = clips if config.cached_latents is None else EncodedClips(config.cached_latents, clips)
        build_held_out(config)
    except UserError as error:
        advice = "set data.* to where your clips are, or make Moving Sprites: microcinema prepare sprites"
        return Finding("data", str(error), PROBLEM, advice), None
    return Finding("data", f"{len(clips)} clips"), clips


def output(config: Train) -> tuple[Finding, Path | None]:
    """Whether output_dir can be written and is free, and the checkpoint that the run resumes from, if it does."""
    try:
        with lock_folder(config.output_dir):
            checkpoint = choose_checkpoint(config.output_dir, config.resume_from_checkpoint, warn=lambda _: None)
    except UserError as error:
        return Finding("output", str(error), PROBLEM), None
    found = f"a new run in '{config.output_dir}'" if checkpoint is None else str(checkpoint)
    return Finding("output", found), checkpoint


def base(pretrained_model_name_or_path: str, revision: str | None, variant: str | None) -> tuple[Finding, str | None]:
    """Whether the base can be opened, and the folder of its settings if they are there."""
    name = pretrained_model_name_or_path
    try:
        source = resolve_model_path(name)
        of_hub = not Path(source).is_dir()
        folder = (_cached(source, revision) if of_hub else None) or resolve_snapshot(name, (), revision)
    except UserError as error:
        return Finding("base", str(error), PROBLEM), None
    where = "of the hub" if of_hub else "embedded" if is_embedded(name) else "a folder"
    where += " (offline)" if of_hub and constants.HF_HUB_OFFLINE else ""
    if is_single_file(name):
        return Finding("base", f"{name}, a single file with the configs of '{source}'"), folder
    download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        networks = [name for name in base_components(folder)[0] if not name.startswith("tokenizer")]
        for network in (*networks, "unet"):
            check_weight_files(Path(folder, network), variant)
    except UserError as error:
        if not of_hub:
            return Finding("base", str(error), PROBLEM), folder
        if constants.HF_HUB_OFFLINE:
            return Finding("base", str(error), PROBLEM, f"where the hub can be reached, run: {download}"), folder
        advice = f"the run fetches them when it starts; before it: {download}"
        return Finding("base", f"{name}, {where}, not all weights in the cache", WARNING, advice), folder
    return Finding("base", f"{name}, {where}" + ", in the cache" * of_hub), folder


def needs(
    config: Train, folder: str, device: torch.device, check: Callable[[ImageToVideoPipeline], None] = lambda _: None
) -> Iterator[Finding]:
    """Free disk and memory against what the run and sampling from its model need; of the base only `folder` with its settings is read.
    `check` may refuse the pipeline of the run."""
    config = replace(config, base=replace(config.base, pretrained_model_name_or_path=folder, revision=None))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    sample = compose("sample")
    arguments = {key: getattr(sample, key) for key in ("guidance_scale", "image_guidance_scale", "decode_chunk_size")}
    arguments["decode_chunk_size"] = arguments["decode_chunk_size"] or (1 if device.type == "cuda" else None)
    with tqdm(total=3, desc="estimating memory", unit="part", delay=2, leave=False) as bar:  # shown from two seconds on
        try:
            pipeline = empty_pipeline(config)
            check(pipeline)
            networks = sum(parameter.nbytes for parameter in pipeline.unet.parameters())
            bar.update()
            sampling = sampling_memory(pipeline, **arguments)
            with_less = [f"memory.offload=group ({_gib(group_offload_memory(sampling, pipeline).peak)})"]
            if free < MARGIN * sampling.peak:
                halved = empty_pipeline(config, torch.float16)
                half = sampling_memory(halved, **{**arguments, "decode_chunk_size": 1})
                way = "memory.torch_dtype=float16 decode_chunk_size=1"
                if free < MARGIN * half.peak:
                    quantize_frozen(halved.unet.requires_grad_(False))
                    half = sampling_memory(halved, **{**arguments, "decode_chunk_size": 1})
                    way = f"{way} memory.quantization=int8"
                with_less.insert(0, f"{way} ({_gib(half.peak)})")
            bar.update()
            training = training_memory(pipeline, config, config.cached_latents is not None, device.type)
            checkpointing = least_checkpointing(config, training, free, device)
            bar.update()
        except UserError as error:
            yield Finding("model", str(error), PROBLEM)
            return
    yield disk(config, networks, training)
    yield memory("training", training, free, PROBLEM, checkpointing + ways_to_train_with_less(config, training))
    yield memory("sampling", sampling, free, WARNING, with_less)


def disk(config: Train, networks: int, training: Estimate) -> Finding:
    """Room for the checkpoints of a run and its pipeline; `networks`: bytes of the trained ones."""
    folder = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    one = networks + training.optimizer + training.average
    kept = config.max_train_steps // config.checkpointing_steps + 1
    if config.checkpoints_total_limit is not None:
        kept = min(kept, config.checkpoints_total_limit + 1)  # the oldest goes when the newest is there
    total = kept * one + training.weights
    found = f"{_gib(free)} free at '{config.output_dir}', {kept} checkpoints of {_gib(one)} and the model take {_gib(total)}"
    if free < one + training.weights:
        return Finding("disk", found, PROBLEM, "set output_dir to a larger disk")
    status = WARNING if free < total else OK
    return Finding("disk", found, status, "set output_dir to a larger disk, or checkpoints_total_limit=1")


def memory(topic: str, needed: Estimate, free: int, short: str, advice: list[str]) -> Finding:
    """Needed against free memory; `short` is the status if there is too little, `advice` what to set then."""
    held = {name: getattr(needed, name) for name in ("weights", "gradients", "optimizer", "average", "activations")}
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in held.items() if size)
    found = f"{_gib(needed.peak)} at most, when {needed.worst} ({parts}), {_gib(free)} free"
    status = OK if free >= MARGIN * needed.peak else WARNING if free >= needed.peak else short
    return Finding(topic, found, status, f"set {', '.join(advice)}")


def least_checkpointing(config: Train, training: Estimate, free: int, device: torch.device) -> list[str]:
    """The least `gradient_checkpointing` with which a run of this estimate fits, or the most if none does; empty if it is not needed."""
    ways: list[str] = []
    for value in CHECKPOINTING[CHECKPOINTING.index(config.gradient_checkpointing) + 1 :]:
        if free >= MARGIN * training.peak:
            break
        changed = replace(config, gradient_checkpointing=value)
        training = training_memory(empty_pipeline(config), changed, config.cached_latents is not None, device.type)
        ways = [f"gradient_checkpointing={str(value).lower()} ({_gib(training.peak)})"]
    return ways


def ways_to_train_with_less(config: Train, training: Estimate) -> list[str]:
    """Further settings that lower the memory of a run and are not made use of, the mildest first."""
    ways = {
        "mixed_precision=bf16": config.mixed_precision == "no" and torch.cuda.is_available(),
        "train_batch_size=1 (and gradient_accumulation_steps for it)": config.train_batch_size > 1,
        "data to clips that are encoded already": training.worst == "encoding",
        "validation_prompts=[]": training.worst == "validating",
        "quantization=int8": torch.cuda.is_available()
        and (config.quantization, config.trainable_parameters) == (None, "temporal"),
        "use_8bit_adam=true": not config.use_8bit_adam,
        "use_ema=false": config.use_ema,
        "trainable_parameters=temporal": config.trainable_parameters == "all",
        "a lower resolution or num_frames": True,
    }
    return [way for way, open_ in ways.items() if open_]


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def _numbers(release: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0), for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("+")[0]))


def _version_of(module: str, imported: bool) -> tuple[str | None, str]:
    """Its version and "", or None and the reason; `imported`: import it as well, since installed need not mean working."""
    try:
        number = version(module)
        if imported:
            importlib.import_module(module)
        return number, ""
    except PackageNotFoundError:
        return None, "not installed"
    except Exception as error:  # an extension module may fail in any way
        return None, f"cannot be imported ({first_line(error)})"


def _cached(repository: str, revision: str | None) -> str | None:
    """Its folder in the hub's cache. The hub is not asked, which may take its time."""
    try:
        return snapshot_download(repository, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
