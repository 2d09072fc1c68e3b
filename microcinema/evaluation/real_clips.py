"""The real clips of a protocol: those that exist, and key frames from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

from microcinema.config.schema import ZeroShotEvaluation
from microcinema.data.keyframe_index import keyframe_index
from microcinema.evaluation.protocol import ZeroShotProtocol, check_count
from microcinema.evaluation.videos import Video
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path


def select_clips(
    protocol: ZeroShotProtocol, settings: ZeroShotEvaluation
) -> tuple[list[PromptItem], list[tuple[int, Video]], list[str]]:
    """Samples to generate; real videos that exist, with their places among all that are asked for; and a line for each number that is smaller
    than the protocol's. A UserError if there is no such data set, if there are fewer videos than the protocol asks for and `allow_fewer` is
    false, or if one is left out that is not there."""
    samples: list[PromptItem] = []
    allow_fewer, shortfalls = settings.allow_fewer, []
    if protocol.dataset != "folder":
        samples = protocol.samples(settings.root)
        expected = protocol.num_samples if protocol.selection in ("all", "every_caption") else None
        shortfalls += check_count(len(samples), expected, "prompts", allow_fewer)
    videos = protocol.real(settings.root)
    skipped = _skipped_names(settings.skip_real, videos)
    asked = [(number, video) for number, video in enumerate(videos) if video.name not in skipped]
    if skipped:
        shortfalls.append(f"{len(skipped)} of {len(videos)} real videos are left out (evaluation.skip_real)")
    real = [(number, video) for number, video in asked if video.path.is_file()]
    missing = next((f"; first missing: '{video.path}'" for _, video in asked if not video.path.is_file()), "")
    expected = max(protocol.num_real or 0, len(videos)) - len(skipped)
    shortfalls += check_count(len(real), expected, "real videos", allow_fewer, missing)
    if protocol.keyframe is not None:
        there = {video.name for _, video in real}
        samples = [sample for sample in samples if sample.source in there]
    return samples, real, shortfalls


def _skipped_names(path: str | None, videos: list[Video]) -> set[str]:
    """The names in a list of real videos, one in each line, before the first tab."""
    if path is None:
        return set()
    with user_errors(f"evaluation.skip_real='{path}' cannot be read ({{reason}}); give a list of names"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    names = {line.split("\t")[0].strip() for line in lines} - {""}
    if unknown := sorted(names - {video.name for video in videos}):
        raise UserError(
            f"evaluation.skip_real names '{unknown[0]}', which is no real video of the protocol; correct it"
        )
    return names


@dataclass(frozen=True)
class RealKeyframes:
    """Key frames of samples: the frames `index` of the real clips of their videos. `real` has these by name, with their numbers."""

    protocol: ZeroShotProtocol
    real: Mapping[str, tuple[int, Video]]
    index: int

    @classmethod
    def of(
        cls, protocol: ZeroShotProtocol, real: Sequence[tuple[int, Video]], model_index: int | None
    ) -> "RealKeyframes | None":
        """Those of a protocol, if its key frames are real. `model_index`: the model's own place in a clip; None: of a folder of videos, the
        first. A UserError if the protocol's place is not the model's."""
        if protocol.keyframe is None:
            return None
        places = {video.name: (number, video) for number, video in real}
        if protocol.keyframe == "own":
            return cls(protocol, places, model_index or 0)
        index = keyframe_index(protocol.keyframe, protocol.num_frames)
        if model_index not in (None, index):
            fault = f"protocol.keyframe={protocol.keyframe} is frame {index}, and the model's is frame {model_index}"
            raise UserError(f"{fault}; use evaluation.protocol.keyframe=own")
        return cls(protocol, places, index)

    def __call__(self, sample: PromptItem) -> np.ndarray:
        """The key frame of a sample, uint8 (h, w, 3), as large as the video."""
        number, video = self.real[sample.source]
        return self.protocol.read(video, number)[self.index]

    def add(self, samples: Sequence[PromptItem], folder: Path, state: PartialState) -> list[PromptItem]:
        """The samples with their key frames as files in a folder, which all processes together write."""
        paths = [folder / f"{sample.id}.png" for sample in samples]
        for sample, path in list(zip(samples, paths, strict=True))[state.process_index :: state.num_processes]:
            if not path.exists():
                with atomic_path(path) as temporary:
                    Image.fromarray(self(sample)).save(temporary)
        state.wait_for_everyone()
        return [replace(sample, image=path) for sample, path in zip(samples, paths, strict=True)]
