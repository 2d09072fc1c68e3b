"""Videos of fixed prompts during training: made by all processes together, written to files, sent to the tracker."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.video_writer import write_contact_sheet, write_gif, write_video
from microcinema.diffusion.rng import generator
from microcinema.evaluation import video_metrics
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline

INFERENCE_STEPS = 25
FIGURES = ("keyframe_psnr", "keyframe_ssim", "motion_magnitude")
"""Of each video: its reference frame against the key frame (dB, at most 60, and structural similarity), pixels of optical flow a frame."""


class Validation:
    """The same prompts, key frames and starting noise every time, so that only the model differs between steps.

    The prompts are dealt out over the processes; so are their key frames, which are drawn here, once.

    Args:
        accelerator: of the run.
        keyframes: draws an image for a prompt; not needed afterwards.
        prompts: what to make videos of.
        height, width: of the videos, pixels.
        output_dir: folder of the run.
        seed: prompt i is drawn and animated with generator(seed, i).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        keyframes: KeyframePipeline,
        prompts: Sequence[str],
        height: int,
        width: int,
        output_dir: str | Path,
        seed: int = 0,
    ) -> None:
        self.prompts = list(prompts)
        self.folder = Path(output_dir) / "validation"
        self.seed = seed
        mine = range(accelerator.process_index, len(self.prompts), accelerator.num_processes)
        keyframes.to(accelerator.device)
        self.images: dict[int, Image.Image] = {}
        for i in tqdm(mine, "key frames of validation", disable=not accelerator.is_main_process):
            (drawn,) = keyframes([self.prompts[i]], height, width, [generator(seed, i)], INFERENCE_STEPS)
            self.images[i] = drawn.image

    def __call__(self, accelerator: Accelerator, pipeline: ImageToVideoPipeline, step: int) -> None:
        """Writes `validation/step-{step}/{i}.mp4` and `.gif` and one contact sheet, and logs them with their means of `FIGURES`.

        Every process must call it.
        """
        pipeline.set_progress_bar_config(disable=True)
        made = []
        for i, image in tqdm(self.images.items(), "validation", leave=False, disable=not accelerator.is_main_process):
            with accelerator.autocast():
                result = pipeline(
                    self.prompts[i],
                    image,
                    num_inference_steps=INFERENCE_STEPS,
                    generator=[generator(self.seed, i)],
                    output_type="np",
                )
            frames = np.rint(result.frames[0] * 255).astype(np.uint8)
            reference = frames[keyframe_index(pipeline.keyframe_position, len(frames))]
            fidelity = video_metrics.image_fidelity(reference, np.asarray(result.keyframes[0]))
            made.append((i, frames, (*fidelity, _motion(frames))))
        made = sorted(gather_object(made), key=lambda entry: entry[0])
        if accelerator.is_main_process:
            clips = [frames for _, frames, _ in made]
            self._write(clips, pipeline.config["fps"], self.folder / f"step-{step}")
            self._log(accelerator, clips, step)
        means = np.mean([figures for *_, figures in made], axis=0)
        accelerator.log({f"validation/{name}": float(mean) for name, mean in zip(FIGURES, means, strict=True)}, step)

    def _write(self, clips: list[np.ndarray], fps: float, folder: Path) -> None:
        for i, frames in enumerate(clips):
            write_video(folder / f"{i}.mp4", frames, fps)
            write_gif(folder / f"{i}.gif", frames, fps)
        write_contact_sheet(folder / "contact_sheet.png", clips, self.prompts)

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
                    f"validation/{i}": wandb.Video(str(file), caption=prompt, format="gif")
                    for i, (file, prompt) in enumerate(zip(files, self.prompts, strict=True))
                }
                tracker.log(videos, step=step)


def _motion(frames: np.ndarray) -> float:
    """Motion magnitude; a single frame has none."""
    return video_metrics.motion_magnitude(video_metrics.clip_flow(frames)) if len(frames) > 1 else 0.0


def gif_summary(tag: str, gif: bytes, shape: tuple[int, ...]) -> Any:
    """A TensorBoard summary of an animated image, which TensorBoard plays as it stands.

    SummaryWriter.add_video would want moviepy to make the same.

    Args:
        shape: of the clip, (f, h, w, 3).
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=shape[1], width=shape[2], colorspace=3, encoded_image_string=gif)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
