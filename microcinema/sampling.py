"""The command `sample`: videos from a prompt, from an image, or from a file of prompts, each with its provenance beside it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from microcinema.data.video_io import write_contact_sheet, write_gif, write_video
from microcinema.diffusion.randomness import generator
from microcinema.files import atomic_path, make_folder
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline, open_image
from microcinema.pipelines.saved import load_keyframe_pipeline, load_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.provenance import describe_code, hash_networks
from microcinema.requests import Request, read_requests

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: "DictConfig") -> None:
    """Makes what the config of `sample` asks for.

    Raises:
        UserError: bad input; nothing is written then, or only whole videos before it.
    """
    from omegaconf import OmegaConf

    requests = read_requests(
        config.prompt, config.motion_prompt, config.prompts, config.image, config.seed, config.num_videos_per_prompt
    )
    for request in requests:
        if request.image is not None:
            open_image(request.image)
    folder = make_folder(config.output_dir)
    quieten_libraries()
    video = load_pipeline(config.pipeline, config.scheduler)
    video.check([request.prompt for request in requests], config.height, config.width, config.num_frames, config.fps)
    arguments = {key: config[key] for key in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    sampler = Sampler(
        video,
        load_keyframe_pipeline(video) if any(request.image is None for request in requests) else None,
        {
            key: config[key]
            for key in ("height", "width", "num_frames", "fps", "image_guidance_scale", "decode_chunk_size")
        }
        | arguments,
        {key: value for key, value in arguments.items() if value != ""},
        {"config": OmegaConf.to_container(config, resolve=True)},
    )
    for request in tqdm(requests, "videos", unit="video", disable=len(requests) == 1):
        path = sampler.write(request, folder, config.crf)
        tqdm.write(str(path))


class Sampler:
    """Makes videos one at a time, so that a video has the same bits whatever was asked for beside it.

    Args:
        video: stage 2.
        keyframe: stage 1; None if every request brings an image.
        arguments: for `ImageToVideoPipeline.__call__`.
        keyframe_arguments: for `KeyframePipeline.__call__`.
        record: put into every provenance as it is.
    """

    def __init__(
        self,
        video: ImageToVideoPipeline,
        keyframe: KeyframePipeline | None,
        arguments: dict[str, Any],
        keyframe_arguments: dict[str, Any],
        record: dict[str, Any],
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.video = video.to(device)
        self.keyframe = keyframe.to(device) if keyframe else None
        self.arguments, self.keyframe_arguments = arguments, keyframe_arguments
        video.set_progress_bar_config(desc="video", unit="step", leave=False)
        if keyframe is not None:
            keyframe.set_progress_bar_config(desc="key frame", unit="step", leave=False)
            networks = TextToVideoPipeline(keyframe, video).networks
        else:
            networks = video.components
        self.record = {**record, "weights_sha256": hash_networks(networks), "versions": describe_code()}

    def make(self, request: Request) -> tuple[np.ndarray, Keyframe, dict[str, Any]]:
        """Frames, uint8 (f, h, w, 3), the key frame, and the provenance of a video."""
        keyframe = self.keyframe if request.image is None else KeyframePipeline(request.image)
        assert keyframe is not None
        output = TextToVideoPipeline(keyframe, self.video)(
            request.prompt,
            request.motion_prompt,
            generator=[generator(*request.numbers)],
            keyframe_arguments=self.keyframe_arguments,
            output_type="np",
            **self.arguments,
        )
        frames = np.rint(output.frames[0] * 255).astype(np.uint8)
        return frames, output.keyframes[0], self._describe(request, frames, output.keyframes[0])

    def write(self, request: Request, folder: Path, crf: int) -> Path:
        """Makes a video and writes its files, each of them whole, the provenance last; returns the video's path."""
        frames, keyframe, provenance = self.make(request)
        files = {
            "video": f"{request.id}.mp4",
            "gif": f"{request.id}.gif",
            "contact_sheet": f"{request.id}.png",
            "keyframe": f"{request.id}_keyframe.png",
        }
        record = folder / f"{request.id}.json"
        record.unlink(missing_ok=True)  # a provenance must never stand beside files of another run
        fps = provenance["fps"]
        write_video(folder / files["video"], frames, fps, crf=crf)
        write_gif(folder / files["gif"], frames, fps)
        write_contact_sheet(folder / files["contact_sheet"], frames, [request.prompt])
        with atomic_path(folder / files["keyframe"]) as temporary:
            keyframe.image.save(temporary)
        with atomic_path(record) as temporary:
            temporary.write_text(json.dumps({**provenance, "files": files}, indent=2) + "\n", encoding="utf-8")
        return folder / files["video"]

    def _describe(self, request: Request, frames: np.ndarray, keyframe: Keyframe) -> dict[str, Any]:
        scheduler = self.video.scheduler
        settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        shape = dict(zip(("num_frames", "height", "width"), frames.shape, strict=False))
        return {
            "id": request.id,
            "prompt": request.prompt,
            "motion_prompt": request.motion_prompt,
            "negative_prompt": self.arguments["negative_prompt"],
            "seed": request.numbers[0],
            "generator": list(request.numbers),
            **shape,
            "fps": self.arguments["fps"] or self.video.config["fps"],
            "num_inference_steps": self.arguments["num_inference_steps"],
            "guidance_scale": self.arguments["guidance_scale"],
            "image_guidance_scale": self.arguments["image_guidance_scale"],
            "keyframe": keyframe.provenance,
            "pipeline": {
                key: self.video.config.get(key)
                for key in (
                    "_name_or_path",
                    "base",
                    "noise_prior",
                    "noise_prior_strength",
                    "noise_prior_gamma",
                    "reference_frame",
                    "training_schedule",
                )
            },
            "schedule": {
                "class": type(scheduler).__name__,
                "settings": settings,
                "timesteps": [float(t) for t in scheduler.timesteps],
            },
            **self.record,
        }


def quieten_libraries() -> None:
    """Turns off the notices and loading bars of diffusers and transformers, which say nothing to who makes a video."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
