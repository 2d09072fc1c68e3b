"""The command `sample`: all key frames, then all videos, dealt out over the processes; what stands from an earlier run is not made again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm

from microcinema.config.compose import instantiate
from microcinema.config.schema import Count, NotNegative
from microcinema.data.video_writer import write_contact_sheet, write_gif, write_video
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import set_timesteps
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline, ResizeMode, open_image
from microcinema.pipelines.long_video import Windows
from microcinema.pipelines.memory import MemorySettings, apply
from microcinema.pipelines.prompts import Request, read_requests
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.fingerprint import read_record
from microcinema.utils.hashing import hash_array, hash_networks
from microcinema.utils.provenance import describe_code

if TYPE_CHECKING:
    from omegaconf import DictConfig

FILES = {"video": ".mp4", "gif": ".gif", "contact_sheet": ".png", "keyframe": "_keyframe.png"}
RECORD, KEYFRAME_RECORD = ".json", "_keyframe.json"
_DRAWING = 1  # follows a video's own numbers in the generator of its key frame
_SHARED = ("num_inference_steps", "guidance_scale", "negative_prompt")  # by both stages, unless stage 1 has its own
_PASSED_ON = (*_SHARED, "image_guidance_scale", "decode_chunk_size")
_DESCRIBED = ("noise_prior", "noise_prior_strength", "noise_prior_gamma", "keyframe_position", "training_schedule")
_ORIGIN = ("source", "revision", "variant")  # where a model or an image was found; what it is, its hash says


@dataclass(frozen=True)
class Stage1:
    """The keys under `keyframe` in the config of `sample`; what each means stands there."""

    pretrained_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None
    height: Count | None
    width: Count | None
    num_inference_steps: Count | None
    guidance_scale: NotNegative | None
    resize_mode: ResizeMode

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise UserError(f"keyframe.height={self.height}, keyframe.width={self.width}; give both, or neither")


def run(config: "DictConfig") -> None:
    """Makes what the config of `sample` asks for; each process makes its share, and none waits for another.

    Raises:
        UserError: bad input; nothing is written then, or only whole files before it.
    """
    # First of all: a process that fails before it would leave the others waiting for it here.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    try:
        requests = read_requests(
            config.prompt, config.motion_prompt, config.prompts, config.image, config.seed, config.num_videos_per_prompt
        )
        for image in {request.image for request in requests if request.image is not None}:
            open_image(image)
        stage1, memory = instantiate(config.keyframe), instantiate(config.memory)
        make_folder(config.output_dir)
        quieten_libraries()
        sampler = Sampler(config, requests, stage1, memory, state.device, progress=state.is_main_process)
        mine = requests[state.process_index :: state.num_processes]
        sampler.make_keyframes(mine)
        sampler.make_videos(mine)
    finally:
        state.destroy_process_group()


class Sampler:
    """Makes key frames and videos one at a time, so that a video has the same bits whatever was asked for beside it.

    What stands is not made again: its provenance says what is asked for now, with the same weights, and all files that belong to it are
    there. Versions of code and libraries and names of models are recorded, not compared.

    Args:
        config: of `sample`.
        requests: all that may be asked for.
        stage1, memory: the objects of its nodes `keyframe` and `memory`.
        device: to compute on.
        progress: show bars.

    Raises:
        UserError: a video model that cannot be opened, or that does not make what is asked for.
    """

    def __init__(
        self,
        config: "DictConfig",
        requests: Sequence[Request],
        stage1: Stage1,
        memory: MemorySettings,
        device: torch.device,
        progress: bool = True,
    ):
        from omegaconf import OmegaConf

        self.config, self.stage1, self.memory, self.device, self.progress = config, stage1, memory, device, progress
        self.folder = Path(config.output_dir)
        self.run_record = {"config": OmegaConf.to_container(config, resolve=True), "versions": describe_code()}
        # Opened here for its checks and hashes, before anything long starts, and again when stage 1 has left the memory.
        video = self._open_video()
        asked = {key: config[key] for key in ("height", "width", "num_frames", "fps", "num_segments", "window_overlap")}
        _, self.height, self.width, num_frames, fps = video.check("any", **asked)
        for motion_prompt in {request.motion_prompt for request in requests}:
            video.check_motion_prompt(motion_prompt)
        found = {"height": self.height, "width": self.width, "num_frames": num_frames, "fps": fps}
        self.arguments: dict[str, Any] = {**asked, **found, **{key: config[key] for key in _PASSED_ON}}
        windows = Windows(num_frames, video.config["num_frames"], config.window_overlap)
        self.video_record = {
            **self.arguments,
            "windows": [[window.start, window.stop] for window in windows.slices],
            "frames_of_all_clips": config.num_segments * (num_frames - 1) + 1,
            "video_crf": config.video_crf,
            "memory": asdict(memory),
            **describe(video, config.num_inference_steps),
        }

    def make_keyframes(self, requests: Sequence[Request]) -> None:
        """Writes the key frames that are missing. The model that draws them leaves the memory again.

        Raises:
            UserError: an image, or a text-to-image model, that does not serve.
        """
        for request in requests:
            if request.image is not None:
                source = KeyframePipeline(request.image, self.stage1.resize_mode)
                (keyframe,) = source([request.prompt], self.height, self.width)
                record = {"id": request.id, **keyframe.provenance}
                if not self._keyframe_stands(request, record):
                    self._write_keyframe(request, keyframe.image, record)
        if drawn := [request for request in requests if request.image is None]:
            self._draw_keyframes(drawn)

    def make_videos(self, requests: Sequence[Request]) -> None:
        """Writes the videos that are missing, from the key frames in the folder, and says of each where it is.

        Raises:
            UserError: pixels that are no numbers.
        """
        video: ImageToVideoPipeline | None = None
        for request in self._bar(requests, "videos", "video"):
            record = {
                "id": request.id,
                "prompt": request.prompt,
                "motion_prompt": request.motion_prompt,
                "seed": request.numbers[0],
                "generator": list(request.numbers),
                **self.video_record,
                "keyframe": read_record(self._path(request, KEYFRAME_RECORD), needs_files=True),
            }
            path = self._path(request, FILES["video"])
            if self._stands(request, RECORD, record) is not None:
                tqdm.write(f"{path} stands")
                continue
            if video is None:
                video = self._open_video()
                apply(video, self.memory, self.device)
                video.set_progress_bar_config(desc="video", unit="step", leave=False, disable=not self.progress)
            output = video(
                request.prompt,
                open_image(self._path(request, FILES["keyframe"])),
                request.motion_prompt,
                generator=[generator(*request.numbers)],
                output_type="np",
                **self.arguments,
            )
            if not np.isfinite(output.frames).all():
                raise UserError(
                    f"'{request.id}' has pixels that are no numbers, made in {self.memory.torch_dtype}; "
                    "use memory.torch_dtype=bfloat16 or float32, and see that the weights are whole"
                )
            self._write_video(request, np.rint(output.frames[0] * 255).astype(np.uint8), record)
            tqdm.write(str(path))

    def _open_video(self) -> ImageToVideoPipeline:
        return load_pipeline(self.config.pipeline, self.config.scheduler, self.memory.dtype)

    def _draw_keyframes(self, requests: Sequence[Request]) -> None:
        chosen = self.stage1
        memory = replace(self.memory, torch_dtype=chosen.torch_dtype or self.memory.torch_dtype)
        source = load_keyframe_pipeline(
            self.config.pipeline, chosen.pretrained_model_name_or_path, chosen.revision, chosen.variant, memory.dtype
        )
        source.resize_mode = chosen.resize_mode
        arguments = self._drawing_arguments(source)
        shared = {
            **source.describe(**arguments),
            "weights_sha256": hash_networks(source.networks),
            "memory": asdict(memory),
        }
        apply(source.source, memory, self.device)
        source.set_progress_bar_config(desc="key frame", unit="step", leave=False, disable=not self.progress)
        for request in self._bar(requests, "key frames", "image"):
            numbers = (*request.numbers, _DRAWING)
            record = {
                "id": request.id,
                "prompt": request.prompt,
                "generator": list(numbers),
                **shared,
                "size": {"height": self.height, "width": self.width},
                "resize_mode": chosen.resize_mode,
            }
            if not self._keyframe_stands(request, record):
                (keyframe,) = source([request.prompt], self.height, self.width, [generator(*numbers)], **arguments)
                self._write_keyframe(request, keyframe.image, {**record, **keyframe.provenance})
        source.unload()

    def _drawing_arguments(self, source: KeyframePipeline) -> dict[str, Any]:
        """What stage 1 is called with: its own settings, and for those left open what stage 2 is called with, if it knows such an argument."""
        chosen = self.stage1
        own = {"num_inference_steps": chosen.num_inference_steps, "guidance_scale": chosen.guidance_scale}
        own |= {"negative_prompt": None, "draw_height": chosen.height, "draw_width": chosen.width}
        open_to = [key for key in _SHARED if own[key] is None and source.takes(key)]
        return own | {key: None if self.config[key] == "" else self.config[key] for key in open_to}

    def _keyframe_stands(self, request: Request, record: Mapping[str, Any]) -> bool:
        found = self._stands(request, KEYFRAME_RECORD, record)
        if found is None:
            return False
        try:
            return found["sha256_of_pixels"] == hash_array(open_image(self._path(request, FILES["keyframe"])))
        except UserError:  # damaged since
            return False

    def _stands(self, request: Request, ending: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
        wanted = {key: value for key, value in record.items() if key not in _ORIGIN}
        return read_record(self._path(request, ending), wanted, needs_files=True)

    def _write_keyframe(self, request: Request, image: Image.Image, record: Mapping[str, Any]) -> None:
        # A provenance must never stand beside files of another run: it goes first and comes last.
        for ending in (RECORD, KEYFRAME_RECORD):
            self._path(request, ending).unlink(missing_ok=True)
        path = self._path(request, FILES["keyframe"])
        with atomic_path(path) as temporary:
            image.save(temporary)
        files = {"files": {"keyframe": path.name}}
        write_json(self._path(request, KEYFRAME_RECORD), {**record, "versions": self.run_record["versions"], **files})

    def _write_video(self, request: Request, frames: np.ndarray, record: Mapping[str, Any]) -> None:
        self._path(request, RECORD).unlink(missing_ok=True)
        paths = {kind: self._path(request, ending) for kind, ending in FILES.items()}
        fps = self.arguments["fps"]
        write_video(paths["video"], frames, fps, crf=self.config.video_crf)
        write_gif(paths["gif"], frames, fps)
        write_contact_sheet(paths["contact_sheet"], frames, [request.prompt])
        files = {"files": {kind: path.name for kind, path in paths.items()}}
        write_json(self._path(request, RECORD), {**record, **self.run_record, **files})

    def _path(self, request: Request, ending: str) -> Path:
        return self.folder / f"{request.id}{ending}"

    def _bar(self, requests: Sequence[Request], what: str, unit: str) -> Iterable[Request]:
        return tqdm(requests, what, unit=unit, disable=not self.progress or len(requests) == 1)


def describe(video: ImageToVideoPipeline, num_inference_steps: int) -> dict[str, Any]:
    """What the provenance of a video says of the model, of the VAE that encodes its key frame, and of the schedule.

    Raises:
        UserError: the scheduler cannot make so many steps.
    """
    scheduler = video.scheduler
    set_timesteps(scheduler, num_inference_steps)
    weights = hash_networks(video.components)
    return {
        "source": video.config.get("_name_or_path"),
        "pipeline": {key: video.config.get(key) for key in _DESCRIBED},
        "keyframe_encoder": {
            "class": type(video.vae).__name__,
            "scaling_factor": video.vae.config["scaling_factor"],
            "sha256": weights["vae"],
        },
        "schedule": {
            "class": type(scheduler).__name__,
            "settings": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "timesteps": [float(t) for t in scheduler.timesteps],
        },
        "weights_sha256": weights,
    }


def quieten_libraries() -> None:
    """Turns off the notices and loading bars of diffusers and transformers, which say nothing to who makes a video."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
