"""Reading the pixels of one training clip from a video or picture file."""

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F

from microcinema.config.instantiate import check_fields, convert
from microcinema.config.types import ClipPosition, Decoder, Fps, Resolution, Seed, Size
from microcinema.data import video_reader
from microcinema.data.decoder_process import DecoderProcess, decode
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import UserError

POSITIONS = {"first": 0.0, "center": 0.5}
RESIZE = "bicubic, antialiased, centre crop"  # part of fingerprints and protocol identifiers


@dataclass
class ClipReader:
    """Reads clips with one transform; `watermark` holds arguments of `Watermark`, the others are those of `ClipDataset`."""

    num_frames: Size
    fps: Fps | None
    resolution: Resolution
    decoder: Decoder
    clip_position: ClipPosition
    seed: Seed
    multiple_of: Size
    watermark: InitVar[Watermark | None] = None
    timeout: InitVar[float | None] = None

    def __post_init__(self, watermark: Watermark | None, timeout: float | None) -> None:
        check_fields(self)
        sides = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        self.size = (sides[0], sides[1])
        self.check_size(*self.size)
        self.mark = convert("watermark", watermark, Watermark | None)
        self.decode: Callable[..., Any] = decode if timeout is None else DecoderProcess(timeout)

    def check_size(self, height: int, width: int) -> None:
        """Raises a UserError if the size is not divisible by `multiple_of`."""
        if height % self.multiple_of or width % self.multiple_of:
            raise UserError(f"resolution={height}x{width} (height x width) does not divide by {self.multiple_of}")

    @property
    def transform(self) -> dict[str, Any]:
        """What a clip and its captions depend on beside its file; both decoders give the same."""
        mark, (height, width) = self.mark, self.size
        return {
            **{name: getattr(self, name) for name in ("num_frames", "fps", "clip_position")},
            **{"height": height, "width": width, "resize": RESIZE},
            "seed": self.seed if self.clip_position == "random" else None,
            "watermark": [mark.action, *mark.box, mark.tag if mark.action == "tag" else ""] if mark else None,
        }

    def read(
        self,
        source: video_reader.Source,
        epoch: int,
        index: int,
        shape: tuple[int, int, int] | None = None,
        has_watermark: bool = True,
    ) -> tuple[torch.Tensor, float]:
        """The clip of a file: uint8 (f, 3, h, w), and its frames per second.

        Args:
            epoch, index: on which a random position depends, beside the seed.
            shape: (f, h, w) if other than the reader's own.

        Raises:
            UserError: a file that is missing, damaged or too short, or took too long.
        """
        num_frames, height, width = shape or (self.num_frames, *self.size)
        if video_reader.is_image(source):
            if num_frames > 1:
                raise UserError(f"'{source}' is a picture, not a clip of {num_frames} frames; set num_frames=1 for it")
            if self.fps is None:
                raise UserError(f"'{source}' is a picture, which has no frame rate of its own; set fps")
            frames, fps = self.decode("read_image", source), self.fps
        else:
            if self.clip_position == "random":
                position = float(np.random.default_rng([self.seed, epoch, index]).random())
            else:
                position = POSITIONS[self.clip_position]
            frames = self.decode("read_clip", source, num_frames, self.fps, position=position, decoder=self.decoder)
            fps = self.fps if self.fps is not None else self.decode("probe", source).fps
        if self.mark and has_watermark:
            frames = self.mark.pixels(frames, (height, width))
        return resize_and_crop(frames, (height, width)), float(fps)

    def caption(self, text: str, has_watermark: bool = True) -> str:
        """The caption for the model, which may name the watermark."""
        return self.mark.caption(text) if self.mark and has_watermark else text


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Scaling and center crop from one (height, width) to another.

    Returns:
        (height, width) of the frame scaled so that it just covers the target, and (top, left) of the crop in it.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    scaled = (max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale)))
    return scaled, ((scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2)


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames (f, 3, h, w), uint8, at another (height, width), by PyTorch's antialiased bicubic interpolation, which equals Pillow's."""
    if tuple(frames.shape[2:]) == size:
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)


def resize_and_crop(frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Scales frames to just cover a (height, width) and crops the center: uint8 (f, h, w, 3) to (f, 3, height, width)."""
    video = torch.from_numpy(einops.rearrange(np.ascontiguousarray(frames), "f h w c -> f c h w"))
    scaled, (top, left) = cover((video.shape[2], video.shape[3]), size)
    return resize(video, scaled)[:, :, top : top + size[0], left : left + size[1]].contiguous()
