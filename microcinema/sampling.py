"""The command `sample`: videos from a prompt, from an image, or from a file of prompts, each with its provenance beside it."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from microcinema.data.video_io import write_contact_sheet, write_gif, write_video
from microcinema.diffusion.randomness import generator
from microcinema.errors import UserError
from microcinema.files import atomic_path, make_folder
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline, open_image
from microcinema.pipelines.saved import load_keyframe_pipeline, load_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.provenance import describe_code, hash_networks

if TYPE_CHECKING:
    from omegaconf import DictConfig

COLUMNS = ("prompt", "motion_prompt", "id", "seed", "image")


@dataclass(frozen=True)
class Request:
    """One video to make.

    Attributes:
        id: stem of its files.
        numbers: of its generator: seed, place in the file of prompts, which of the videos of the prompt.
        image: file of the key frame; None: draw one.
    """

    id: str
    prompt: str
    motion_prompt: str | None
    numbers: tuple[int, int, int]
    image: Path | None


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


def read_requests(
    prompt: str | None,
    motion_prompt: str | None,
    prompts: str | None,
    image: str | None,
    seed: int,
    num_videos_per_prompt: int,
) -> list[Request]:
    """What to make: of one prompt, or of each line of a file.

    A file's line n is sample n of the seed; a line with a seed of its own is sample 0 of that one, as if it were run alone.

    Args:
        prompts: a CSV file with the column `prompt` and, if wanted, `motion_prompt`, `id`, `seed` and `image` (relative to the
            file), or a text file with one prompt in each line.
        image: file of every video's key frame, or a folder with one for each prompt, in the order of names.

    Raises:
        UserError: neither or both of `prompt` and `prompts`, an empty prompt, a file that cannot be read, an unknown column, a
            seed that is not a number, an id that is taken twice or is no file name.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('give one of prompt="..." and prompts=file.csv')
    rows = [{"prompt": prompt or "", "motion_prompt": motion_prompt or ""}] if prompts is None else _read_rows(prompts)
    images = _images(image, len(rows))
    requests = []
    for number, (row, given) in enumerate(zip(rows, images, strict=True)):
        where = f"prompts file '{prompts}', prompt {number + 1}" if prompts else "prompt"
        text = row["prompt"].strip()
        if not text:
            raise UserError(f"{where} is empty; say what is to be seen and how it moves")
        own_seed = row.get("seed", "").strip()
        if own_seed and not own_seed.isdecimal():
            raise UserError(f"{where}: seed '{own_seed}' is not a whole number >= 0")
        numbers = (int(own_seed), 0) if own_seed else (seed, number)
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "video"
        slug = slug if len(slug) <= 60 else slug[:60].rpartition("-")[0] or slug[:60]
        name = row.get("id", "").strip() or (f"{number:04d}-{slug}" if prompts else f"{slug}-seed{seed}")
        if not re.fullmatch(r"[\w][\w. +-]*", name):
            raise UserError(f"{where}: id '{name}' cannot be a file name; use letters, digits, '-', '_' and '.'")
        own_image = row.get("image", "").strip()
        path = Path(prompts or "").parent / own_image if own_image else given
        motion = row.get("motion_prompt", "").strip() or motion_prompt or None
        for video in range(num_videos_per_prompt):
            suffix = f"-{video}" if num_videos_per_prompt > 1 else ""
            requests.append(Request(name + suffix, text, motion, (*numbers, video), path))
    names = [request.id for request in requests]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"prompts file '{prompts}': id '{twice[0]}' is there twice; every video needs its own")
    return requests


def _read_rows(path: str) -> list[dict[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read prompts file '{path}' ({reason}); give a CSV or text file") from None
    if Path(path).suffix.lower() != ".csv":
        rows = [{"prompt": line} for line in text.splitlines() if line.strip()]
    else:
        reader = csv.DictReader(text.splitlines(keepends=True), restval="")
        columns: Sequence[str] = reader.fieldnames or ()
        if "prompt" not in columns:
            raise UserError(f"prompts file '{path}' has no column 'prompt'; it has {', '.join(columns) or 'none'}")
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise UserError(f"prompts file '{path}': column '{unknown[0]}' is unknown; there are {', '.join(COLUMNS)}")
        rows = list(reader)
        if any(None in row for row in rows):
            raise UserError(f"prompts file '{path}': a line has more fields than the header; put quotes round commas")
    if not rows:
        raise UserError(f"prompts file '{path}' holds no prompts")
    return rows


def _images(image: str | None, count: int) -> Sequence[Path | None]:
    if image is None:
        return [None] * count
    source = KeyframePipeline(image)
    if source.files and len(source.files) != count:
        raise UserError(f"folder '{image}' holds {len(source.files)} images for {count} prompts; give one each")
    return source.files or [Path(image)] * count


def quieten_libraries() -> None:
    """Turns off the notices and loading bars of diffusers and transformers, which say nothing to who makes a video."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
