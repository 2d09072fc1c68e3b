"""Videos of fixed prompts during training: shared among all processes, written to files, logged to the tracker."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from microcinema.config.sampling import KeyframeSettings, SamplingSettings
from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.video_writer import write_contact_sheet, write_gif, write_video
from microcinema.evaluation import video_metrics
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.pipelines.text_to_video import animate, keyframe_arguments, make_item_keyframe

FIGURES = ("keyframe_psnr", "keyframe_ssim", "motion_magnitude")
"""Of each video: PSNR (dB, at most 60) and SSIM of its reference frame to the key frame, and optical flow in pixels per frame."""


class Validation:
    """The same prompts, key frames and initial noise every time, so that only the model differs between steps.

    With the weights of a step, the command `sample` makes the same videos of these prompts and this seed.

    Args:
        accelerator: each process has a share of the prompts, and draws their key frames here, once.
        pipeline: its own defaults are used for both stages.
        keyframes: not needed afterwards.
        seed: prompt i is sample i of this seed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: ImageToVideoPipeline,
        keyframes: KeyframePipeline,
        prompts: Sequence[str],
        output_dir: str | Path,
        seed: int = 0,
    ) -> None:
        self.items = [PromptItem(prompt, seed=seed, sample_index=index) for index, prompt in enumerate(prompts)]
        self.folder = Path(output_dir) / "validation"
        share = range(accelerator.process_index, len(self.items), accelerator.num_processes)
        keyframes.to(accelerator.device)
        settings = pipeline.resolve(SamplingSettings())
        assert settings.height is not None and settings.width is not None
        self.images: dict[int, Image.Image] = {}
        for i in tqdm(share, "key frames of validation", disable=not accelerator.is_main_process):
            arguments = keyframe_arguments(keyframes, self.items[i], pipeline.config, settings, KeyframeSettings())
            keyframe = make_item_keyframe(self.items[i], keyframes, settings.height, settings.width, **arguments)
            self.images[i] = keyframe.image

    def __call__(self, accelerator: Accelerator, pipeline: ImageToVideoPipeline, step: int) -> None:
        """Writes `validation/step-{step}/{i}.mp4`, `.gif` and a contact sheet; logs them with means of `FIGURES`. Collective."""
        pipeline.set_progress_bar_config(disable=True)
        results = []
        for i, image in tqdm(self.images.items(), "validation", leave=False, disable=not accelerator.is_main_process):
            with accelerator.autocast():
                output = animate(pipeline, [self.items[i]], [image], SamplingSettings(), output_type="np")
            frames = to_uint8(output.frames[0], f"the validation video of '{self.items[i].prompt}'")
            index = keyframe_index(pipeline.keyframe_position, len(frames))
            fidelity = video_metrics.image_fidelity(frames[index], np.asarray(output.keyframes[0]))
            flow = video_metrics.clip_flow(frames) if len(frames) > 1 else np.zeros(1)  # a single frame does not move
            results.append((i, frames, index, (*fidelity, video_metrics.motion_magnitude(flow))))
        results = sorted(gather_object(results), key=lambda entry: entry[0])
        if accelerator.is_main_process:
            clips, indices = [frames for _, frames, *_ in results], [index for *_, index, _ in results]
            self._write(clips, indices, pipeline.config["fps"], self.folder / f"step-{step}")
            self._log(accelerator, clips, step)
        means = np.mean([figures for *_, figures in results], axis=0)
        accelerator.log({f"validation/{name}": float(mean) for name, mean in zip(FIGURES, means, strict=True)}, step)

    def _write(self, clips: list[np.ndarray], keyframes: list[int], fps: float, folder: Path) -> None:
        for i, frames in enumerate(clips):
            write_video(folder / f"{i}.mp4", frames, fps)
            write_gif(folder / f"{i}.gif", frames, fps)
        prompts = [item.prompt for item in self.items]
        write_contact_sheet(folder / "contact_sheet.png", clips, prompts, keyframes=keyframes)

    def _log(self, accelerator: Accelerator, clips: list[np.ndarray], step: int) -> None:
        files = [self.folder / f"step-{step}" / f"{i}.gif" for i in range(len(clips))]
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                writer = tracker.writer._get_file_writer()
                for i, (file, frames) in enumerate(zip(files, clips, strict=True)):
                    writer.add_summary(gif_summary(f"validation/{i}", file.read_bytes(), frames.shape), step)
            elif tracker.name == "wandb":
                import wandb

                videos = {
                    f"validation/{i}": wandb.Video(str(file), caption=item.prompt, format="gif")
                    for i, (file, item) in enumerate(zip(files, self.items, strict=True))
                }
                tracker.log(videos, step=step)


def gif_summary(tag: str, gif: bytes, shape: tuple[int, ...]) -> Any:
    """A TensorBoard summary of an animated image (f, h, w, 3); SummaryWriter.add_video would need moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=shape[1], width=shape[2], colorspace=3, encoded_image_string=gif)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
