"""The two-stage sampler of the command `sample` and of all protocols: first all key frames, then all videos, resumably."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from microcinema.config.sampling import KeyframeSettings, MemorySettings, SamplingSettings
from microcinema.data.images import open_image
from microcinema.pipelines.encoders import unread_texts
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import Keyframe, KeyframePipeline, check_flagged
from microcinema.pipelines.keyframe_places import split_keyframes
from microcinema.pipelines.loading import is_embedded
from microcinema.pipelines.lora import Lora, fuse_loras
from microcinema.pipelines.memory import apply
from microcinema.pipelines.prompts import PromptItem, check_motion_prompt
from microcinema.pipelines.redraw import inpainting_arguments, inpainting_pipeline, open_masked, redraw, redrawn
from microcinema.pipelines.sample_folder import SampleFolder, to_uint8
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline
from microcinema.pipelines.text_to_video import animate, draw_keyframes, keyframe_arguments, make_item_keyframe
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_networks

StepFunction = Callable[[str, int, int, Callable[[int], np.ndarray] | None], None]
"""Called after every step with the stage, the number of steps that are done and of all, and in stage 2 with a function of a number: so
many frames of the clip as it now stands, uint8 (n, h, w, 3)."""
_MODEL = ("noise_prior", "noise_prior_strength", "noise_prior_gamma", "keyframe_position", "training_schedule")


class Sampler:
    """Makes the samples that a folder does not hold yet. Only one of the two models is in memory at a time.

    A sample depends on neither the other samples nor the number of processes; on the batch size only by rounding.

    Args:
        pipeline: the video model: an embedded model, a folder or a hub repository.
        settings, keyframe: of stage 2, and of stage 1.
        memory: of both stages.
        batch_size: videos made at once, and key frames drawn at once but on a CPU, which gains nothing by it.
        progress: show bars.
        keyframes: images of all videos by their places in a clip, None for the key frame of each; None: that alone, at the model's own place.
        lora: LoRAs of the video model, as `Lora.of` reads them, and of stage 1 unless `keyframe.lora` names others.
        on_step: called after every step of both stages, see `StepFunction`.

    Attributes:
        keyframe_index: frame of the videos that the key frame is.

    Raises:
        UserError: a video model that cannot be loaded, or settings or key frames that do not work with it.
    """

    def __init__(
        self,
        pipeline: str,
        settings: SamplingSettings,
        keyframe: KeyframeSettings,
        memory: MemorySettings,
        device: torch.device | str,
        batch_size: int = 1,
        progress: bool = True,
        keyframes: Mapping[int, Path | None] | None = None,
        lora: Sequence[str] = (),
        on_step: StepFunction | None = None,
    ):
        self.pipeline, self.keyframe, self.memory, self.device = pipeline, keyframe, memory, device
        self.batch_size, self.progress, self.on_step = batch_size, progress, on_step
        self.draws_batches = torch.device(device).type != "cpu"
        self.lora = [Lora.of(text) for text in lora]
        self._keyframe_lora = [Lora.of(text) for text in (lora if keyframe.lora is None else keyframe.lora)]
        self.keyframe_memory = replace(memory, torch_dtype=keyframe.torch_dtype or memory.torch_dtype)
        # Opened for its checks and hashes before anything long starts; it waits in host memory, see `_load_stage1`.
        self._video: ImageToVideoPipeline | None = None
        self._weights: dict[str, str] = {}
        self._video = video = self._load_video()
        self.settings = video.resolve(settings)
        self.defaults = dict(video.config)
        self.uses_motion_caption, self._text_lengths = video.uses_motion_caption, video.text_lengths
        windows = video.windows(self.settings)
        self.keyframe_index = windows.keyframe_index(video.keyframe_position)
        self.image: Path | None = None  # of the key frame of all videos
        self.placed: dict[int, Keyframe | None] = {}
        if keyframes is not None:
            self.image, others = split_keyframes(keyframes, video.main_keyframe(keyframes, self.settings))
            mode, size = keyframe.resize_mode, (self.settings.height or 0, self.settings.width or 0)
            self.placed = {p: file and KeyframePipeline(file, mode)([""], *size)[0] for p, file in others.items()}
            self.keyframe_index = next(place for place, frame in self.placed.items() if frame is None)
        self.keyframe_index *= self.settings.interpolate
        self.video_record = {
            **asdict(self.settings),
            "fps": self.settings.interpolate * (self.settings.fps or 0),  # of the file
            "windows": [[window.start, window.stop] for window in windows.slices],
            "keyframe_index": self.keyframe_index,
            "frames_of_all_clips": self.settings.interpolate * self.settings.num_segments * (windows.frames - 1) + 1,
            "memory": asdict(memory),
            "lora": [lora.record for lora in self.lora],
            **_model_record(video, self.settings, self._weights),
        }
        if keyframes is not None:
            factor, placed = self.settings.interpolate, self.placed.items()
            self.video_record["keyframes"] = {
                str(factor * place): frame and frame.provenance for place, frame in placed
            }
        self._stage1: KeyframePipeline | None = None
        self._stage1_hashes: dict[str, str] = {}

    def run(
        self,
        items: Sequence[PromptItem],
        folder: SampleFolder,
        rank: int = 0,
        num_processes: int = 1,
        on_done: Callable[[PromptItem, bool], None] = lambda item, is_new: None,
        keyframes_only: bool = False,
    ) -> None:
        """Makes the share of this process: every `num_processes`-th batch. A process waits for no other.

        A batch with a missing video is made whole and the missing ones are written, so that an interruption changes no video.

        Args:
            on_done: called for every video, with whether it was made now.
            keyframes_only: only the key frames are made.

        Raises:
            UserError: bad images, motion prompts or text-to-image models, or pixels that are not finite.
        """
        for item in items:
            check_motion_prompt(item.motion_prompt, self.uses_motion_caption)
            if self.image is not None and item.image is not None:
                raise UserError(
                    "image is of no key frame, since all of keyframes have others; name a place without a file"
                )
        items = items if self.image is None else [replace(item, image=self.image) for item in items]
        for path in {path for item in items for path in (item.image, item.mask) if isinstance(path, Path)}:
            open_image(path)
        size = self.batch_size
        batches = [items[start : start + size] for start in range(0, len(items), size)[rank::num_processes]]
        self._make_keyframes(batches, folder)
        if not keyframes_only:
            self._make_videos(batches, folder, on_done)
            return
        for item in chain(*batches):
            on_done(item, True)

    def fingerprint(self) -> dict[str, Any]:
        """What all samples depend on beside their items, resolved. Loads stage 1, which `run` then uses."""
        source = self._load_stage1()
        stage1 = keyframe_arguments(source, PromptItem(""), self.defaults, self.settings, self.keyframe)
        hashes = {f"keyframe.{name}": sha256 for name, sha256 in self._stage1_hashes.items()}
        return {
            "pipeline": self.pipeline,
            **asdict(self.settings),
            "keyframe_index": self.keyframe_index,
            **{f"keyframe_{name}": stage1[name] for name in ("num_inference_steps", "guidance_scale")},
            "torch_dtype": self.memory.torch_dtype,
            "lora": self.video_record["lora"],
            "keyframe_lora": [lora.record for lora in self._keyframe_lora],
            "keyframe_model": self.keyframe.pretrained_model_name_or_path,
            "weights_sha256": self.video_record["weights_sha256"] | hashes,
        }

    def _load_video(self) -> ImageToVideoPipeline:
        if self._video is not None:
            return self._video
        video = load_pipeline(self.pipeline, torch_dtype=getattr(torch, self.memory.torch_dtype))
        # Before a LoRA is added to the weights, which leaves them with other rounding errors on each machine.
        self._weights = self._weights or hash_networks(video.components)
        fuse_loras(video, self.lora)
        return video

    def _load_stage1(self, masked: bool = False) -> KeyframePipeline:
        if self._stage1 is None:
            # One memory for both: the video model is opened again, unless it is a small one.
            if torch.device(self.device).type == "cpu" and not is_embedded(self.pipeline):
                self._video = None
            model = self.keyframe
            origin = model.pretrained_model_name_or_path, model.revision, model.variant
            self._stage1 = load_keyframe_pipeline(
                self.pipeline, *origin, getattr(torch, self.keyframe_memory.torch_dtype)
            )
            self._stage1.resize_mode = model.resize_mode
            if masked:
                self._stage1 = inpainting_pipeline(self._stage1)
            if self.on_step is not None:
                self._stage1.inputs["callback_on_step_end"] = self._count_step
            self._stage1_hashes = hash_networks(self._stage1.networks)
            self._keyframe_lora = fuse_loras(self._stage1.source, self._keyframe_lora, only_fitting=model.lora is None)
        return self._stage1

    def _make_keyframes(self, batches: Sequence[Sequence[PromptItem]], folder: SampleFolder) -> None:
        height, width = self.settings.height, self.settings.width
        assert height is not None and width is not None
        for item in chain(*batches):
            if not item.is_drawn:
                mode = self.keyframe.resize_mode
                source = KeyframePipeline(item.image, mode) if isinstance(item.image, Path) else None
                keyframe = make_item_keyframe(item, source, height, width)
                record = {"id": item.id, **keyframe.provenance}
                if not folder.keyframe_is_up_to_date(item, record):
                    folder.write_keyframe(item, keyframe.image, record)
        drawn = [[item for item in batch if item.is_drawn] for batch in batches]
        if any(drawn):
            self._draw_keyframes(drawn, folder, height, width)
        if self._stage1 is not None:
            self._stage1.unload()
            self._stage1 = None

    def _draw_keyframes(
        self, batches: Sequence[Sequence[PromptItem]], folder: SampleFolder, height: int, width: int
    ) -> None:
        masked = any(item.mask is not None for item in chain(*batches))  # and then all
        source, on_device, mode = self._load_stage1(masked), False, self.keyframe.resize_mode

        def arguments_of(item: PromptItem) -> dict[str, Any]:
            arguments = keyframe_arguments(source, item, self.defaults, self.settings, self.keyframe)
            return inpainting_arguments(source, height, width, arguments) if masked else arguments

        if masked or not self.draws_batches:
            batches = [[item] for item in chain(*batches)]
        calls = [(arguments, [*items]) for batch in batches for arguments, items in groupby(batch, arguments_of)]
        source.set_progress_bar_config(desc="key frame", unit="step", leave=False, disable=not self.progress)
        for arguments, items in self._bar(calls, "key frames", "batch" if self.draws_batches else "image"):
            common = {
                **source.provenance(**arguments),
                "weights_sha256": self._stage1_hashes,
                "lora": [lora.record for lora in self._keyframe_lora],
                "memory": asdict(self.keyframe_memory),
                "size": {"height": height, "width": width},
                "resize_mode": mode,
            }
            parts = [open_masked(item, height, width, mode) for item in items] if masked else []
            if masked:
                common |= redrawn(*parts[0])
            records = [
                {
                    "id": item.id,
                    "prompt": item.keyframe_prompt or item.prompt,
                    "generator": _generator_record(item),
                    **common,
                }
                for item in items
            ]
            is_new = [not folder.keyframe_is_up_to_date(*entry) for entry in zip(items, records, strict=True)]
            if not any(is_new):
                continue
            if not on_device:
                apply(source.source, self.keyframe_memory, self.device)
                on_device = True
            if masked:
                keyframes = [redraw(source, items[0], *parts[0], **arguments)]
            else:
                keyframes = draw_keyframes(items, source, height, width, **arguments)
            for item, record, keyframe, missing in zip(items, records, keyframes, is_new, strict=True):
                if missing:
                    # If it is not allowed at all, then before it is written.
                    check_flagged(keyframe.provenance, item.id, self.keyframe.on_flagged)
                    folder.write_keyframe(item, keyframe.image, {**record, **keyframe.provenance})

    def _make_videos(
        self, batches: Sequence[Sequence[PromptItem]], folder: SampleFolder, on_done: Callable[[PromptItem, bool], None]
    ) -> None:
        video: ImageToVideoPipeline | None = None
        for whole in self._bar(batches, "videos", "video" if self.batch_size == 1 else "batch"):
            batch = [item for item in whole if self._is_animated(item, folder)]
            records = [self._record(item, folder) for item in batch]
            is_new = [not folder.video_is_up_to_date(*entry) for entry in zip(batch, records, strict=True)]
            if any(is_new):
                if video is None:
                    video, self._video = self._load_video(), None  # which a second run opens anew
                    apply(video, self.memory, self.device)
                    video.set_progress_bar_config(desc="video", unit="step", leave=False, disable=not self.progress)
                images = [folder.open_keyframe(item) for item in batch]
                places = {place: frame and frame.image for place, frame in self.placed.items()} or None
                more: dict[str, Any] = {"output_type": "np", "keyframes": places}
                if self.on_step is not None:
                    more |= {"callback_on_step_end": self._count_step, "callback_on_step_end_tensor_inputs": ["z0"]}
                frames = animate(video, batch, images, self.settings, **more).frames
                for item, record, clip, missing in zip(batch, records, frames, is_new, strict=True):
                    if missing:
                        folder.write_video(item, to_uint8(clip, f"'{item.id}'"), record["fps"], record)
            for item, made in zip(batch, is_new, strict=True):
                on_done(item, made)

    def _count_step(self, pipeline: Any, step: int, t: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The callback of both stages, which changes nothing."""
        assert self.on_step is not None
        if (z0 := tensors.get("z0")) is None:
            self.on_step("key frame", step + 1, pipeline.num_timesteps, None)
        else:
            self.on_step("video", step + 1, pipeline.num_timesteps, partial(_preview, pipeline, z0[:1]))
        return {}

    def _is_animated(self, item: PromptItem, folder: SampleFolder) -> bool:
        return check_flagged(folder.record(item, of_keyframe=True) or {}, item.id, self.keyframe.on_flagged)

    def _record(self, item: PromptItem, folder: SampleFolder) -> dict[str, Any]:
        texts = {name: getattr(item, name) for name in ("id", "prompt", "motion_prompt", "negative_prompt")}
        truncated = unread_texts(self._text_lengths, texts | {"motion_prompt": item.motion_prompt or item.prompt})
        return {
            **texts,
            **({"truncated": truncated} if truncated else {}),
            "generator": _generator_record(item),
            **self.video_record,
            "video_crf": folder.crf,
            "keyframe": folder.record(item, of_keyframe=True),
        }

    def _bar(self, sequence: Sequence[Any], label: str, unit: str) -> Any:
        return tqdm(sequence, label, unit=unit, disable=not self.progress or len(sequence) == 1)


def _preview(pipeline: ImageToVideoPipeline, z0: torch.Tensor, count: int) -> np.ndarray:
    frames = z0[:, torch.linspace(0, z0.shape[1] - 1, count).round().long()]
    return to_uint8(pipeline.decode_latents(frames, 1)[0].float().add(1).div(2).permute(0, 2, 3, 1).cpu().numpy())


def _generator_record(item: PromptItem) -> dict[str, int]:
    return {name: getattr(item, name) for name in ("seed", "sample_index", "video_index")}


def _model_record(
    video: ImageToVideoPipeline, settings: SamplingSettings, weights: Mapping[str, str]
) -> dict[str, Any]:
    """The model, the VAE that encodes its key frame, and the schedule; a UserError if that cannot make so many steps."""
    scheduler = video.sampler(settings)
    return {
        "source": video.config.get("_name_or_path"),
        "pipeline": {key: video.config.get(key) for key in _MODEL},
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
