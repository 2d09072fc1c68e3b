"""A folder of video files with a WebVid-style CSV, as a data set of clips."""

import csv
import os
from pathlib import Path
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from microcinema.data import video_io
from microcinema.errors import UserError

POSITIONS = {"first": 0.0, "center": 0.5}


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of `num_frames` frames, resized, cropped in the centre, with captions; `dataset[i]` depends on (seed, epoch, i) alone.

    The CSV's columns are read by name, all as strings: `videoid` and `name` (the caption) must be there, `page_dir` may be; `description`
    (for the key frame) and `motion` default to `name`; others are ignored. A video is `root/videos/{page_dir}/{videoid}.mp4` or
    `root/{videoid}.mp4`, whichever is there. PyTorch's default collate function batches the items.

    Args:
        csv: path of the list.
        root: folder of the videos.
        num_frames: frames of a clip.
        fps: frames per second of a clip, picked by time; None takes each file's own rate.
        resolution: size of the square, or (height, width).
        decoder: "pyav" or "decord".
        clip: which part of the video: "random", "first" or "center".
        seed: of the random choice.
        multiple_of: what height and width must divide by: the VAE's downsampling, times the UNet's for training.

    Raises:
        UserError: an unreadable list, a column that is missing, no video of the list under root, a value out of range; and from
            `dataset[i]`, a video that is missing, damaged or too short.
    """

    def __init__(
        self,
        csv: str | os.PathLike[str],
        root: str | os.PathLike[str],
        num_frames: int,
        fps: float | None,
        resolution: int | tuple[int, int],
        decoder: str = "pyav",
        clip: str = "random",
        seed: int = 0,
        multiple_of: int = 8,
    ) -> None:
        sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(sides) != 2:
            raise UserError(f"resolution={list(sides)}; give one number for a square, or [height, width]")
        height, width = sides
        if num_frames < 1 or (fps is not None and not fps > 0):
            raise UserError(f"num_frames={num_frames}, fps={fps}; give at least 1 frame, and a positive rate or null")
        if min(height, width) < 1 or height % multiple_of or width % multiple_of:
            raise UserError(
                f"resolution={height}x{width} (height x width) does not divide by {multiple_of}; choose multiples of {multiple_of}"
            )
        if decoder not in video_io.DECODERS:
            raise UserError(f"decoder='{decoder}' is not known; choose one of {', '.join(video_io.DECODERS)}")
        if clip not in ("random", *POSITIONS):
            raise UserError(f"clip='{clip}' is not known; choose one of random, {', '.join(POSITIONS)}")
        self.root, self.num_frames, self.fps, self.size = Path(root), num_frames, fps, (height, width)
        self.decoder, self.clip, self.seed = decoder, clip, seed
        self._epoch = 0
        self.rows = _read_rows(Path(csv))
        if not any(path.is_file() for row in self.rows for path in self._candidates(row)):
            tried = [str(path) for row in self.rows[:3] for path in self._candidates(row)][:3]
            raise UserError(
                f"root '{self.root}' holds no video of '{csv}'; tried first: {', '.join(tried)}; check root"
            )

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass choose other random parts of the videos; call it before iterating (a worker process keeps the epoch of its start)."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one clip.

        Returns:
            `video` float32 (f, 3, h, w) in [-1, 1]; `caption`, `description`, `motion` str; `fps` float; `index` int; `id` str.
        """
        row, path = self.rows[index], self.path(index)
        if self.clip == "random":
            position = float(np.random.default_rng([self.seed, self._epoch, index]).random())
        else:
            position = POSITIONS[self.clip]
        frames = video_io.read_clip(path, self.num_frames, self.fps, position=position, decoder=self.decoder)
        fps = self.fps if self.fps is not None else video_io.probe(path).fps
        return {
            "video": resize_and_crop(frames, self.size).float() / 127.5 - 1,
            "caption": row["name"],
            "description": row["description"],
            "motion": row["motion"],
            "fps": float(fps),
            "index": index,
            "id": row["videoid"],
        }

    def path(self, index: int) -> Path:
        """The video file of a row.

        Raises:
            UserError: it is in none of the places where it may be.
        """
        candidates = self._candidates(self.rows[index])
        for path in candidates:
            if path.is_file():
                return path
        tried = ", ".join(str(path) for path in candidates)
        raise UserError(
            f"video '{self.rows[index]['videoid']}' is missing; tried {tried}; fetch it or take it off the list"
        )

    @property
    def transform(self) -> dict[str, Any]:
        """What decides the pixels of a clip, beside its file; the decoder does not."""
        height, width = self.size
        return {
            "num_frames": self.num_frames,
            "fps": self.fps,
            "height": height,
            "width": width,
            "clip": self.clip,
            "resize": RESIZE,
        }

    def _candidates(self, row: dict[str, str]) -> list[Path]:
        flat = self.root / f"{row['videoid']}.mp4"
        return [self.root / "videos" / row["page_dir"] / flat.name, flat] if row["page_dir"] else [flat]


RESIZE = "bicubic, antialiased, centre crop"


def cover(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the centre crop lies: the size to which a frame of `size` is scaled so that it just covers `wanted`, and the crop's corner.

    Args:
        size, wanted: (height, width).

    Returns:
        (height, width) of the scaled frame, and (top, left) of the crop in it.
    """
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    scaled = (max(wanted[0], round(size[0] * scale)), max(wanted[1], round(size[1] * scale)))
    return scaled, ((scaled[0] - wanted[0]) // 2, (scaled[1] - wanted[1]) // 2)


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames (f, 3, h, w), uint8, at the size (height, width), by PyTorch's antialiased bicubic interpolation, as Pillow does it."""
    if tuple(frames.shape[2:]) == size:
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)


def resize_and_crop(frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Scales frames to just cover a size, then crops the centre.

    Args:
        frames: uint8 (f, h, w, 3).
        size: (height, width) wanted.

    Returns:
        uint8 (f, 3, height, width); frames that already have the size are not changed.
    """
    video = torch.from_numpy(einops.rearrange(np.ascontiguousarray(frames), "f h w c -> f c h w"))
    scaled, (top, left) = cover((video.shape[2], video.shape[3]), size)
    return resize(video, scaled)[:, :, top : top + size[0], left : left + size[1]].contiguous()


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            missing = [name for name in ("videoid", "name") if name not in columns]
            if missing:
                found = ", ".join(columns) or "none"
                raise UserError(
                    f"list '{path}' lacks column {' and '.join(missing)} (it has: {found}); the first line must name the columns"
                )
            rows = [
                {
                    "videoid": row["videoid"],
                    "name": row["name"],
                    "page_dir": row.get("page_dir") or "",
                    "description": row.get("description") or row["name"],
                    "motion": row.get("motion") or row["name"],
                }
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"list '{path}' cannot be read ({error}); give a CSV file in UTF-8") from None
    if not rows:
        raise UserError(f"list '{path}' has no rows; give a CSV file with at least one video")
    return rows
