"""From a video or picture file to the pixels of one training clip."""

from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F

from microcinema.data import video_reader
from microcinema.data.decoder_process import DecoderProcess
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import UserError

POSITIONS = {"first": 0.0, "center": 0.5}
RESIZE = "bicubic, antialiased, centre crop"


class ClipReader:
    """Reads clips of one transform.

    Args:
        num_frames, fps, resolution, decoder, clip_position, seed, multiple_of: as in `ClipDataset`.
        watermark: arguments of `Watermark`; None: none.
        timeout: seconds for a clip, after which its decoder, in a process of its own, is killed; None: decode here, without end if need be.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        num_frames: int,
        fps: float | None,
        resolution: int | tuple[int, int],
        decoder: str,
        clip_position: str,
        seed: int,
        multiple_of: int,
        watermark: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> None:
        sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(sides) != 2:
            raise UserError(f"resolution={list(sides)}; give one number for a square, or [height, width]")
        if num_frames < 1 or (fps is not None and not fps > 0):
            raise UserError(f"num_frames={num_frames}, fps={fps}; give at least 1 frame, and a positive rate or null")
        if decoder not in video_reader.DECODERS:
            raise UserError(f"decoder='{decoder}' is not known; choose one of {', '.join(video_reader.DECODERS)}")
        if clip_position not in ("random", *POSITIONS):
            raise UserError(
                f"clip_position='{clip_position}' is not known; choose one of random, {', '.join(POSITIONS)}"
            )
        self.num_frames, self.fps, self.multiple_of = num_frames, fps, multiple_of
        self.size = self.checked_size(*sides)
        self.decoder, self.clip_position, self.seed = decoder, clip_position, seed
        self.watermark = Watermark(**watermark) if watermark else None
        self.decoder_process = DecoderProcess(timeout) if timeout is not None else None

    def checked_size(self, height: int, width: int) -> tuple[int, int]:
        """A size that the networks take.

        Raises:
            UserError: it does not divide.
        """
        if min(height, width) < 1 or height % self.multiple_of or width % self.multiple_of:
            raise UserError(
                f"resolution={height}x{width} (height x width) does not divide by {self.multiple_of}; "
                f"choose multiples of {self.multiple_of}"
            )
        return height, width

    @property
    def transform(self) -> dict[str, Any]:
        """What decides a clip and its captions, beside its file; the decoder does not."""
        height, width = self.size
        mark = self.watermark
        return {
            "num_frames": self.num_frames,
            "fps": self.fps,
            "height": height,
            "width": width,
            "clip_position": self.clip_position,
            "seed": self.seed if self.clip_position == "random" else None,
            "resize": RESIZE,
            "watermark": [mark.action, *mark.box, mark.tag if mark.action == "tag" else ""] if mark else None,
        }

    def read(
        self,
        source: video_reader.Source,
        epoch: int,
        index: int,
        shape: tuple[int, int, int] | None = None,
        marked: bool = True,
    ) -> tuple[torch.Tensor, float]:
        """The clip of a file: float32 (f, 3, h, w) in [-1, 1], and its frames per second.

        Args:
            epoch, index: what a random place of the clip depends on, beside the seed.
            shape: (f, h, w) if other than the reader's own.
            marked: whether it bears the watermark.

        Raises:
            UserError: a file that is missing, damaged, too short, or took too long.
        """
        num_frames, *size = shape or (self.num_frames, *self.size)
        if video_reader.is_image(source):
            if num_frames > 1:
                raise UserError(f"'{source}' is a picture, not a clip of {num_frames} frames; set num_frames=1 for it")
            if self.fps is None:
                raise UserError(f"'{source}' is a picture, which has no frame rate of its own; set fps")
            frames, fps = self._call("read_image", source), self.fps
        else:
            if self.clip_position == "random":
                position = float(np.random.default_rng([self.seed, epoch, index]).random())
            else:
                position = POSITIONS[self.clip_position]
            frames = self._call("read_clip", source, num_frames, self.fps, position=position, decoder=self.decoder)
            fps = self.fps if self.fps is not None else self._call("probe", source).fps
        if self.watermark and marked:
            frames = self.watermark.pixels(frames, (size[0], size[1]))
        return resize_and_crop(frames, (size[0], size[1])).float() / 127.5 - 1, float(fps)

    def caption(self, text: str, marked: bool = True) -> str:
        """What the model is told of a clip."""
        return self.watermark.caption(text) if self.watermark and marked else text

    def _call(self, function: str, source: video_reader.Source, *arguments: Any, **more: Any) -> Any:
        call = self.decoder_process or (lambda name, *a, **k: getattr(video_reader, name)(*a, **k))
        return call(function, source, *arguments, **more)


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
