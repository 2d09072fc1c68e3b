"""Making the clips of a protocol, resumably: a clip that is on disk is not made again."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from microcinema.diffusion.rng import generator
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.sprites.protocol import SpritesProtocol, Task
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import write_or_verify


@dataclass(frozen=True)
class Sample:
    """A generated clip, uncompressed: `frames` uint8 (f, h, w, 3) and the `keyframe` uint8 (h, w, 3) that they were made from."""

    frames: np.ndarray
    keyframe: np.ndarray


class Request(Protocol):
    """What a clip is made from: `Task` of Moving Sprites, `Prompt` of the zero-shot protocols."""

    @property
    def name(self) -> str:
        """A file name, unique in the protocol."""

    @property
    def prompt(self) -> str:
        """What a user would type."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the clip's random numbers depend on, beside the seed."""


R = TypeVar("R", bound=Request)
Maker = Callable[[Sequence[R]], Sequence[Sample]]
"""Makes one sample for every request. A sample depends on its own request alone, but for rounding, not on the others in the batch."""


@dataclass(frozen=True)
class Share:
    """Which of `count` batches a process makes: every `of`-th from `rank`, so that a batch is the same for any number of processes."""

    rank: int = 0
    of: int = 1

    def batches(self, count: int, batch_size: int) -> Iterator[range]:
        """The indices of each batch."""
        starts = range(0, count, batch_size)[self.rank :: self.of]
        return (range(start, min(start + batch_size, count)) for start in starts)


def sample_path(folder: str | os.PathLike[str], task: Request) -> Path:
    """Where a task's clip is stored."""
    return Path(folder) / f"{task.name}.npz"


_ALL = Share()


def generate(
    tasks: Sequence[R],
    make: Maker[R],
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    batch_size: int = 8,
    progress: bool = True,
    share: Share = _ALL,
) -> int:
    """Makes every clip that is not yet in the folder and returns how many that were.

    A batch with a clip missing is made whole and the missing clip kept: with the same batch size a clip has the same bits, whatever
    was interrupted, and whatever the number of processes.

    Args:
        identity: what the clips depend on beside their tasks (weights, seed, steps), as JSON; kept in the folder.
        batch_size: clips at once.
        progress: show a bar.
        share: of this process.

    Raises:
        UserError: the folder holds clips of another identity, or cannot be written.
    """
    folder = Path(folder)
    write_or_verify(folder, identity)
    batches = [[tasks[index] for index in indices] for indices in share.batches(len(tasks), batch_size)]
    missing = {task.name for batch in batches for task in batch if not sample_path(folder, task).exists()}
    total = sum(map(len, batches))
    hide = not progress or not missing
    with tqdm(total=total, initial=total - len(missing), desc="generate", unit="clip", disable=hide) as bar:
        for batch in batches:
            if missing.isdisjoint(task.name for task in batch):
                continue
            for task, sample in zip(batch, make(batch), strict=True):
                if task.name in missing:
                    with atomic_path(sample_path(folder, task)) as path:
                        np.savez_compressed(path, frames=sample.frames, keyframe=sample.keyframe)
                    bar.update()
    return len(missing)


def load_sample(folder: str | os.PathLike[str], task: Request) -> Sample:
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
class TextMaker:
    """Makes clips from their prompts alone, with both stages of a pipeline.

    Args:
        seed: with a request's own numbers, of its random numbers.
        arguments: of the pipeline, such as `height`, `num_frames`, `num_inference_steps`, `guidance_scale`.
        keyframe_arguments: of its first stage.
    """

    pipeline: TextToVideoPipeline
    seed: int
    arguments: Mapping[str, Any]
    keyframe_arguments: Mapping[str, Any]

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample for every request, in their order.

        Raises:
            UserError: pixels that are no numbers.
        """
        output = self.pipeline(
            [request.prompt for request in requests],
            keyframe_arguments=dict(self.keyframe_arguments),
            generator=[generator(self.seed, *request.numbers) for request in requests],
            output_type="np",
            **self.arguments,
        )
        keyframes = [np.asarray(keyframe.image.convert("RGB")) for keyframe in output.keyframes]
        return [Sample(_to_bytes(frames), k) for frames, k in zip(output.frames, keyframes, strict=True)]


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

    @property
    def _arguments(self) -> dict[str, Any]:
        size = self.protocol.size
        return {
            "height": size,
            "width": size,
            "num_frames": self.protocol.num_frames,
            "fps": self.protocol.fps,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
        }

    def _from_text(self, tasks: Sequence[Task]) -> dict[Task, Sample]:
        if not tasks:
            return {}
        with torch.no_grad():
            drawn = self.pipeline.keyframe(
                [task.prompt for task in tasks],
                self.protocol.size,
                self.protocol.size,
                generators := self._generators(tasks),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.keyframe_guidance_scale,
            )
        return self._animate(tasks, [np.asarray(keyframe.image.convert("RGB")) for keyframe in drawn], generators)

    def _from_image(self, tasks: Sequence[Task]) -> dict[Task, Sample]:
        if not tasks:
            return {}
        keyframes = [self.protocol.render(task.sprite).frames[0] for task in tasks]
        return self._animate(tasks, keyframes, self._generators(tasks))

    def _generators(self, tasks: Sequence[Task]) -> list[torch.Generator]:
        return [generator(self.seed, *task.numbers) for task in tasks]

    def _animate(
        self, tasks: Sequence[Task], keyframes: Sequence[np.ndarray], generators: list[torch.Generator]
    ) -> dict[Task, Sample]:
        """Every model is told the same, in one caption or in two, and gets the same key frames."""
        video = self.pipeline.video
        prompts, motions = [task.prompt for task in tasks], None
        if video.uses_motion_caption:
            prompts, motions = (list(texts) for texts in zip(*(task.captions for task in tasks), strict=True))
        output = video(prompts, list(keyframes), motions, generator=generators, output_type="np", **self._arguments)
        return {t: Sample(_to_bytes(f), k) for t, f, k in zip(tasks, output.frames, keyframes, strict=True)}


def _to_bytes(frames: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] to uint8."""
    if not np.isfinite(frames).all():
        raise UserError(
            "the pipeline made pixels that are no numbers; use another torch_dtype, and see that the weights are whole"
        )
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
