"""Making the clips of a protocol, resumably: a clip that is on disk is not made again."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from microcinema.diffusion.randomness import generator
from microcinema.errors import UserError
from microcinema.evaluation.protocols import SpritesProtocol, Task
from microcinema.files import atomic_path, make_folder
from microcinema.pipelines.text_to_video import TextToVideoPipeline

IDENTITY_FILE = "identity.json"


@dataclass(frozen=True)
class Sample:
    """A generated clip, uncompressed: `frames` uint8 (f, h, w, 3) and the `keyframe` uint8 (h, w, 3) that they were made from."""

    frames: np.ndarray
    keyframe: np.ndarray


Maker = Callable[[Sequence[Task]], Sequence[Sample]]
"""Makes one sample for every task. A sample depends on its own task alone, not on the others in the batch."""


def sample_path(folder: str | os.PathLike[str], task: Task) -> Path:
    """Where a task's clip is stored."""
    return Path(folder) / f"{task.name}.npz"


def generate(
    tasks: Sequence[Task],
    make: Maker,
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    batch_size: int = 8,
    progress: bool = True,
) -> int:
    """Makes every clip that is not yet in the folder and returns how many that were.

    Args:
        identity: what the clips depend on beside their tasks (weights, seed, steps), as JSON; kept in the folder.
        batch_size: clips at once.
        progress: show a bar.

    Raises:
        UserError: the folder holds clips of another identity, or cannot be written.
    """
    folder = make_folder(folder)
    claim(folder, identity)
    missing = [task for task in tasks if not sample_path(folder, task).exists()]
    done = len(tasks) - len(missing)
    with tqdm(total=len(tasks), initial=done, desc="generate", unit="clip", disable=not progress or not missing) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for task, sample in zip(batch, make(batch), strict=True):
                with atomic_path(sample_path(folder, task)) as path:
                    np.savez_compressed(path, frames=sample.frames, keyframe=sample.keyframe)
            bar.update(len(batch))
    return len(missing)


def claim(folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
    """Marks a folder as holding clips of this identity.

    Raises:
        UserError: it already holds clips of another one (every difference is named), or cannot be written.
    """
    path = make_folder(folder) / IDENTITY_FILE
    new = json.loads(json.dumps(identity))
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"'{path}' is damaged; delete the folder or choose another output_dir") from None
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        changes = ", ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in differing)
        raise UserError(f"'{path.parent}' holds clips made otherwise ({changes}); choose another output_dir")


def load_sample(folder: str | os.PathLike[str], task: Task) -> Sample:
    """Reads a clip that `generate` stored.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = sample_path(folder, task)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Sample(arrays["frames"], arrays["keyframe"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"cannot read the clip '{path}' ({error}); delete it and evaluate again") from None


@dataclass(frozen=True)
class PipelineMaker:
    """Makes the clips of the Moving Sprites protocol with a text-to-video pipeline.

    Prompts of the part `image` get the first frame of the real clip, the others a key frame that stage 1 draws.
    """

    pipeline: TextToVideoPipeline
    protocol: SpritesProtocol
    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    keyframe_guidance_scale: float = 7.5
    image_guidance_scale: float = 1.0

    def __call__(self, tasks: Sequence[Task]) -> list[Sample]:
        """One sample for every task, in their order."""
        given = [task for task in tasks if task.part == "image"]
        samples = self._from_text([task for task in tasks if task.part != "image"]) | self._from_image(given)
        return [samples[task] for task in tasks]

    def _arguments(self, tasks: Sequence[Task]) -> dict[str, Any]:
        size = self.protocol.size
        return {
            "height": size,
            "width": size,
            "num_frames": self.protocol.num_frames,
            "fps": self.protocol.fps,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "generator": [generator(self.seed, *task.numbers) for task in tasks],
            "output_type": "np",
        }

    def _from_text(self, tasks: Sequence[Task]) -> dict[Task, Sample]:
        if not tasks:
            return {}
        arguments = self._arguments(tasks)
        drawn = self.pipeline.keyframe(
            [task.prompt for task in tasks],
            self.protocol.size,
            self.protocol.size,
            arguments["generator"],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.keyframe_guidance_scale,
        )
        return self._animate(tasks, [np.asarray(keyframe.image.convert("RGB")) for keyframe in drawn], arguments)

    def _from_image(self, tasks: Sequence[Task]) -> dict[Task, Sample]:
        if not tasks:
            return {}
        keyframes = [self.protocol.render(task.sprite).frames[0] for task in tasks]
        return self._animate(tasks, keyframes, self._arguments(tasks))

    def _animate(
        self, tasks: Sequence[Task], keyframes: Sequence[np.ndarray], arguments: dict[str, Any]
    ) -> dict[Task, Sample]:
        """Every model is told the same, in one caption or in two, and gets the same key frames."""
        video = self.pipeline.video
        if video.reads_motion:
            prompts, arguments["motion_prompt"] = (
                list(texts) for texts in zip(*(t.captions for t in tasks), strict=True)
            )
        else:
            prompts = [task.prompt for task in tasks]
        frames = video(prompts, list(keyframes), **arguments).frames
        return {t: Sample(_to_bytes(f), k) for t, f, k in zip(tasks, frames, keyframes, strict=True)}


def _to_bytes(frames: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] to uint8."""
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
