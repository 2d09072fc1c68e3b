"""A folder of samples: key frames and videos, each with a JSON record of everything that it depends on."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from microcinema.data.images import open_image
from microcinema.data.video_writer import write_contact_sheet, write_gif, write_video
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.fingerprint import read_record
from microcinema.utils.hashing import hash_array
from microcinema.utils.provenance import describe_code

Format = Literal["video", "gif", "contact_sheet", "frames"]
_SUFFIXES: dict[Format, str] = {"video": ".mp4", "gif": ".gif", "contact_sheet": ".png", "frames": ".npz"}
_KEYFRAME, _KEYFRAME_RECORD, _RECORD = "_keyframe.png", "_keyframe.json", ".json"
_ORIGIN = ("source", "revision", "variant")  # where weights or an image came from; their hashes are compared instead


@dataclass(frozen=True)
class Sample:
    """A generated clip, uncompressed: `frames` uint8 (f, h, w, 3) and its `keyframe` uint8 (h, w, 3)."""

    frames: np.ndarray
    keyframe: np.ndarray


def to_uint8(frames: np.ndarray, name: str = "the video") -> np.ndarray:
    """Pixels in [0, 1] as uint8, rounded to nearest; a UserError if they are not finite."""
    if not np.isfinite(frames).all():
        raise UserError(f"{name} has pixels that are not finite; use torch_dtype=float32, and check the weights")
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


class SampleFolder:
    """Writes samples, and says which are up to date: their record has the expected entries, and all their files exist.

    Versions of code and libraries and names of models are recorded, but not compared.

    Args:
        formats: of the videos: `video` (H.264), `gif`, `contact_sheet`, `frames` (uncompressed, for measurements).
        crf: of H.264, 0 (lossless) to 51.
        run_record: further entries of the records of videos that are not compared.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        formats: Sequence[Format],
        crf: int = 18,
        run_record: Mapping[str, Any] | None = None,
    ):
        self.folder = make_folder(folder)
        self.formats, self.crf = tuple(formats), crf
        self.versions = {"versions": describe_code()}
        self.run_record = {**(run_record or {}), **self.versions}

    def path(self, item: PromptItem, of_keyframe: bool = False) -> Path:
        """The first file of an item's video, or its key frame."""
        return self._path(item, _KEYFRAME if of_keyframe else _SUFFIXES[self.formats[0]])

    def keyframe_is_up_to_date(self, item: PromptItem, record: Mapping[str, Any]) -> bool:
        """Whether the key frame with this record exists, with its pixels."""
        actual = self._matching(item, _KEYFRAME_RECORD, record)
        try:
            return actual is not None and actual["sha256_of_pixels"] == hash_array(self.open_keyframe(item))
        except UserError:
            return False

    def video_is_up_to_date(self, item: PromptItem, record: Mapping[str, Any]) -> bool:
        """Whether all files of the video with this record exist, and it has all formats."""
        actual = self._matching(item, _RECORD, record)
        return actual is not None and actual["files"].keys() >= set(self.formats)

    def record(self, item: PromptItem, of_keyframe: bool = False) -> dict[str, Any] | None:
        """The record of a video, or of its key frame; None if there is none."""
        return self._matching(item, _KEYFRAME_RECORD if of_keyframe else _RECORD, {})

    def open_keyframe(self, item: PromptItem) -> Image.Image:
        """The key frame; a UserError if it is missing or damaged."""
        return open_image(self._path(item, _KEYFRAME))

    def write_keyframe(self, item: PromptItem, image: Image.Image, record: Mapping[str, Any]) -> None:
        """Writes a key frame and its record; the records of earlier files are deleted first, so that none describes others."""
        for suffix in (_RECORD, _KEYFRAME_RECORD):
            self._path(item, suffix).unlink(missing_ok=True)
        path = self._path(item, _KEYFRAME)
        with atomic_path(path) as temporary:
            image.save(temporary)
        write_json(self._path(item, _KEYFRAME_RECORD), {**record, **self.versions, "files": {"keyframe": path.name}})

    def write_video(self, item: PromptItem, frames: np.ndarray, fps: float, record: Mapping[str, Any]) -> None:
        """Writes uint8 frames (f, h, w, 3) in all formats, and their record, whose `keyframe_index` and `keyframes` a contact sheet marks."""
        self._path(item, _RECORD).unlink(missing_ok=True)
        paths = {name: self._path(item, _SUFFIXES[name]) for name in self.formats}
        for name, path in paths.items():
            if name == "video":
                write_video(path, frames, fps, crf=self.crf)
            elif name == "gif":
                write_gif(path, frames, fps)
            elif name == "contact_sheet":
                places = [*record.get("keyframes", {}), record.get("keyframe_index", -1)]
                write_contact_sheet(path, frames, [item.prompt], keyframes=[[int(place) for place in places]])
            else:
                with atomic_path(path) as temporary:
                    np.savez_compressed(temporary, frames=frames)
        files = {name: path.name for name, path in paths.items()} | {"keyframe": self._path(item, _KEYFRAME).name}
        write_json(self._path(item, _RECORD), {**record, **self.run_record, "files": files})

    def load(self, item_id: str) -> Sample:
        """The clip of an item's id, of the format `frames`; a UserError if it is missing or damaged."""
        path = self.folder / f"{item_id}{_SUFFIXES['frames']}"
        with user_errors(f"cannot read the clip '{path}' ({{reason}}); delete it and run again"):
            with np.load(path, allow_pickle=False) as arrays:
                return Sample(arrays["frames"], np.array(open_image(self.folder / f"{item_id}{_KEYFRAME}")))

    def _path(self, item: PromptItem, suffix: str) -> Path:
        return self.folder / f"{item.id}{suffix}"

    def _matching(self, item: PromptItem, suffix: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
        expected = {key: value for key, value in record.items() if key not in _ORIGIN}
        return read_record(self._path(item, suffix), expected, needs_files=True)
