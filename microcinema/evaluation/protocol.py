"""Zero-shot protocols on UCF-101 and MSR-VTT: which texts are asked for, which real clips they are measured against, and how."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from microcinema.config.types import ClipPosition, Count, Fps, Name, Seed, Size
from microcinema.data.clip_reader import RESIZE
from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.video_reader import read_clip
from microcinema.evaluation.msrvtt import chosen_caption, msrvtt_videos
from microcinema.evaluation.ucf101 import class_prompt, ucf101_videos
from microcinema.evaluation.videos import Caption, Video, folder_videos
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_json

_DRAW_PROMPTS, _DRAW_REAL = 0, 1  # streams of the seed


@dataclass(frozen=True)
class ZeroShotProtocol:
    """What is asked for and what it is measured against; every choice that changes the number is here.

    Args:
        dataset: `ucf101`, `msrvtt`, or `folder`: the real clips are any folder of videos, and nothing is asked for.
        prompts: of UCF-101's classes, `raw`, `split` or `descriptive`; of MSR-VTT, `caption`; of a folder, `none`.
        sample_split: the videos whose classes or captions are asked for.
        selection: `all`, each of these videos once; `draw`, `num_samples` of them (again and again only if there are fewer);
            `per_class`, `num_samples` of each class; `every_caption`, each caption of each video.
        num_samples: number of clips, or of clips a class; None: as many as there are.
        real_split: the real clips; None: none, and no measure that compares sets.
        num_real: how many, drawn by the seed if there are more; None: all.
        fps: frames a second of a real clip, picked by time; None: its own frames, every `stride`-th. The model is asked for the same.
        stride: of the frames of a real clip, where `fps` is None.
        clip_position: which part of a real video.
        keyframe: None: the model draws its key frames. Else they are frames of real clips, which are those of the videos that are asked for:
            `own`, at the model's own place in a clip; `first`, `center` or an index, a place that the model must have.
        height, width: of the frames that detectors see; clips are scaled to cover it (antialiased) and cropped in the centre.
        ddof: 1: covariances divided by n - 1; 0: by n.
        seed: of every draw here. That of the model is another.

    Raises:
        UserError: choices that exclude each other.
    """

    name: Name
    dataset: Literal["ucf101", "msrvtt", "folder"]
    prompts: Literal["raw", "split", "descriptive", "caption", "none"]
    sample_split: Literal["all", "train", "test"]
    selection: Literal["all", "draw", "per_class", "every_caption"]
    num_samples: Count | None
    real_split: Literal["all", "train", "test"] | None
    num_real: Count | None
    num_frames: Size
    fps: Fps | None
    stride: Size
    clip_position: ClipPosition
    keyframe: Literal["own", "first", "center"] | Annotated[int, Field(ge=0)] | None
    height: Size
    width: Size
    ddof: Literal[0, 1]
    seed: Seed
    version: int = field(default=2, init=False)
    resize: str = field(default=RESIZE, init=False)

    def __post_init__(self) -> None:
        known = {"ucf101": ("raw", "split", "descriptive"), "msrvtt": ("caption",), "folder": ("none",)}[self.dataset]
        if self.prompts not in known:
            raise UserError(f"prompts={self.prompts} are not of {self.dataset}; choose one of {', '.join(known)}")
        if self.selection == "per_class" and self.dataset != "ucf101":
            raise UserError(f"selection=per_class needs classes, which {self.dataset} has not; use all or draw")
        if self.selection == "every_caption" and self.dataset != "msrvtt":
            raise UserError(f"selection=every_caption needs captions, which {self.dataset} has not; use all or draw")
        if self.selection in ("draw", "per_class") and self.num_samples is None:
            raise UserError(f"selection={self.selection} needs num_samples; give a number")
        if self.fps is not None and self.stride != 1:
            raise UserError(f"stride={self.stride} counts a video's own frames; set fps=null, or leave stride at 1")
        if self.keyframe not in (None, "own"):
            keyframe_index(self.keyframe, self.num_frames)
        if self.keyframe is not None and (self.selection not in ("all", "draw") or self.dataset == "folder"):
            raise UserError(f"keyframe={self.keyframe} is of the videos that are asked for; use selection=all or draw")

    def videos(self, root: str | os.PathLike[str], split: str) -> list[Video]:
        """A part of the data set on disk; a UserError if it is not there, or has another layout."""
        if self.dataset == "folder":
            return folder_videos(root)
        return {"ucf101": ucf101_videos, "msrvtt": msrvtt_videos}[self.dataset](root, split)

    def sample_videos(self, root: str | os.PathLike[str]) -> list[Video]:
        """The video whose class or caption each clip, or with `every_caption` each group of clips, is asked for with."""
        videos = self.videos(root, self.sample_split)
        number = self.num_samples or 0  # given with `draw` and `per_class`
        if self.selection == "draw":
            generator = np.random.default_rng([self.seed, _DRAW_PROMPTS])
            picks = generator.choice(len(videos), number, replace=len(videos) < number)
            videos = [videos[pick] for pick in picks]
        elif self.selection == "per_class":
            firsts = {video.label: video for video in reversed(videos)}
            videos = [replace(firsts[label], name=label) for label in sorted(firsts) for _ in range(number)]
        return videos

    def samples(self, root: str | os.PathLike[str]) -> list[PromptItem]:
        """All clips to make; the source of each is its video, with the number of the caption where all are asked for, or its class."""
        texts = [(video.name, caption) for video in self.sample_videos(root) for caption in self._texts(video)]
        sources = [f"{name}/{text.id}" if self.selection == "every_caption" else name for name, text in texts]
        return [
            PromptItem(text.text, f"{i:05d}", sample_index=i, source=source)
            for i, ((_, text), source) in enumerate(zip(texts, sources, strict=True))
        ]

    def _texts(self, video: Video) -> Sequence[Caption]:
        if self.dataset == "ucf101":
            assert self.prompts in ("raw", "split", "descriptive")
            return [Caption(video.label, class_prompt(video.label, self.prompts))]
        return video.captions if self.selection == "every_caption" else [chosen_caption(video)]

    def real(self, root: str | os.PathLike[str]) -> list[Video]:
        """The real videos that are asked for, whether they are there or not."""
        if self.keyframe is not None:
            return list({video.name: video for video in self.sample_videos(root)}.values())
        videos = [] if self.real_split is None else self.videos(root, self.real_split)
        if self.num_real is None or len(videos) <= self.num_real:
            return videos
        picks = np.random.default_rng([self.seed, _DRAW_REAL]).choice(len(videos), self.num_real, replace=False)
        return [videos[pick] for pick in sorted(picks)]

    def read(self, video: Video, number: int) -> np.ndarray:
        """The clip uint8 (f, h, w, 3) of a real video, of which `number` is the place among all that are asked for."""
        frames = self.num_frames if self.fps is not None else (self.num_frames - 1) * self.stride + 1
        return read_clip(video.path, frames, self.fps, position=self.position(number))[:: self.stride]

    def position(self, index: int) -> float:
        """Where in a real video its clip lies: 0 at the beginning, 1 as late as possible. Of `random`, by the video's own number."""
        if self.clip_position == "random":
            return float(np.random.default_rng([self.seed, _DRAW_REAL, index]).random())
        return {"first": 0.0, "center": 0.5}[self.clip_position]

    def identifier(
        self, samples: Sequence[PromptItem], real: Sequence[Video], detectors: Mapping[str, Mapping[str, Any]]
    ) -> str:
        """Equal for two measurements if and only if the same was measured: name, version, and a hash of all settings, of prompts and sources of
        the generated clips, names of the real videos, and detectors with their weights."""
        clips = [manifest_entry(sample) for sample in samples], [video.name for video in real]
        content = [asdict(self), *clips, detectors]
        return f"{self.name}-{self.version}-{hash_json(content)[:12]}"


def manifest_entry(item: PromptItem) -> dict[str, Any]:
    """A sample in the manifest of a protocol; `source` is its video, caption or class in the data set."""
    return {"index": item.sample_index, "prompt": item.prompt, "source": item.source}


def check_count(count: int, expected: int | None, what: str, allow_fewer: bool, detail: str = "") -> list[str]:
    """A line for the report if there are fewer than the protocol asks for; a UserError if there are more, or if there are fewer and that is
    not allowed or leaves fewer than two."""
    if expected is None or count == expected:
        return []
    if count > expected:
        raise UserError(f"{count} {what}, and the protocol asks for {expected}; use selection=draw, or correct it")
    if not allow_fewer or count < 2:
        advice = "complete them, or set evaluation.allow_fewer=true"
        raise UserError(f"{count} of {expected} {what} that the protocol asks for{detail}; {advice}")
    return [f"{count} of {expected} {what}"]
