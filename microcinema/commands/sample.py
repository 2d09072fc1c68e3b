"""The command `sample`: key frames and videos of a prompt, or of a file of prompts, shared among all processes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, release_memory
from tqdm.auto import tqdm

from microcinema.config.compose import plain
from microcinema.config.sampling import SamplingSettings
from microcinema.config.schema import Sample
from microcinema.pipelines.keyframe_places import read_keyframes
from microcinema.pipelines.prompts import PromptItem, read_prompt_items
from microcinema.pipelines.sample_folder import Format, SampleFolder
from microcinema.pipelines.sampler import Sampler, StepFunction
from microcinema.pipelines.upscale import VideoUpscaler, check_upscaler, upscale_videos
from microcinema.utils.device import set_precision
from microcinema.utils.errors import UserError
from microcinema.utils.logging import quieten_libraries


def run(config: Sample, on_step: StepFunction | None = None) -> None:
    """Makes the samples that a config describes; bad input is a UserError, and leaves nothing or complete files only.

    Args:
        on_step: called after every step of the process, see `StepFunction`; it changes no sample.
    """
    # First of all: a process that fails before it would leave the others waiting for it here.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    set_precision(allow_tf32=True)
    try:
        prompts = config.prompt, config.motion_prompt, config.prompts, config.image
        common = config.seed, config.num_videos_per_prompt, config.negative_prompt, config.mask
        items = read_prompt_items(*prompts, *common)
        settings = SamplingSettings(**{name: getattr(config, name) for name in SamplingSettings.__dataclass_fields__})
        record = {"config": plain(config)}
        quieten_libraries()
        models, progress = (config.pipeline, settings, config.keyframe, config.memory), state.is_main_process
        keyframes = read_keyframes(config.keyframes)
        more: dict[str, Any] = {"keyframes": keyframes, "lora": config.lora, "on_step": on_step}
        sampler = Sampler(*models, state.device, progress=progress, **more)
        formats: tuple[Format, ...] = ("video", "gif", "contact_sheet")
        if has_upscaler := config.upscale.pretrained_model_name_or_path is not None:
            if config.keyframes_only:
                raise UserError("keyframes_only=true makes no video to upscale; leave out one of it and upscale")
            check_upscaler(config.upscale)
            formats += ("frames",)  # of which stage 3 is made
        folder = SampleFolder(config.output_dir, formats, config.video_crf, record)

        def announce(item: PromptItem, is_new: bool, folder: SampleFolder = folder) -> None:
            tqdm.write(f"{folder.path(item, config.keyframes_only)}{'' if is_new else ' is up to date'}")

        sampler.run(items, folder, state.process_index, state.num_processes, announce, config.keyframes_only)
        if has_upscaler:
            del sampler  # and with it the video model
            release_memory()
            upscaler = VideoUpscaler.from_pretrained(config.upscale, getattr(torch, config.memory.torch_dtype))
            large = SampleFolder(Path(config.output_dir, "upscaled"), ("video",), config.video_crf, record)
            share, own = items[state.process_index :: state.num_processes], (config.memory, state.device)
            mode, report = config.keyframe.resize_mode, partial(announce, folder=large)
            upscale_videos(share, folder, large, upscaler, *own, mode, state.is_main_process, report)
    finally:
        state.destroy_process_group()
