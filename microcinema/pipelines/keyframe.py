"""Stage 1: key frames from any text-to-image pipeline of diffusers, from an image file or from a folder of images."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from microcinema.data.clips import RESIZE, resize_and_crop
from microcinema.errors import UserError
from microcinema.pipelines.base import freeze, locate

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Keyframe:
    """An image at the video's size and where it comes from.

    Attributes:
        image: RGB.
        provenance: plain values: source, original size, how it was resized, sha256 of its pixels.
    """

    image: Image.Image
    provenance: dict[str, Any]


class KeyframePipeline:
    """Makes or finds one key frame for every prompt.

    Args:
        source: a text-to-image pipeline (it is frozen, made float32 and called for every prompt), an image file (the same for every prompt), or
            a folder of images (one for every prompt, in the order of their names).

    Raises:
        UserError: a path that holds neither.
    """

    def __init__(self, source: DiffusionPipeline | str | os.PathLike[str]):
        self.source = source if isinstance(source, DiffusionPipeline) else Path(source)
        self.files: list[Path] = []
        if isinstance(self.source, Path):
            if not self.source.exists():
                raise UserError(f"key frame '{self.source}' does not exist; give an image file or a folder of images")
            if self.source.is_dir():
                self.files = sorted(file for file in self.source.iterdir() if file.suffix.lower() in SUFFIXES)
                if not self.files:
                    raise UserError(
                        f"folder '{self.source}' holds no images; give one with files {', '.join(SUFFIXES)}"
                    )
            return
        for component in self.source.components.values():
            if isinstance(component, torch.nn.Module):
                freeze(component)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> "KeyframePipeline":
        """Opens a saved text-to-image pipeline: an embedded model, a folder or a hub repository.

        Raises:
            UserError: it cannot be opened.
        """
        path = locate(name)
        try:
            pipeline = DiffusionPipeline.from_pretrained(path)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"cannot open the text-to-image pipeline '{path}' ({reason}); give a diffusers folder"
            ) from error
        return cls(pipeline)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of the bar over steps (tqdm's); a pipeline shows one."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.set_progress_bar_config(**settings)

    def to(self, device: torch.device | str) -> "KeyframePipeline":
        """Moves the text-to-image pipeline, if there is one."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.to(device)
        return self

    def __call__(
        self,
        prompt: Sequence[str],
        height: int,
        width: int,
        generator: Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> list[Keyframe]:
        """One key frame for every prompt, at the wanted size.

        Args:
            prompt: what shall be seen.
            height, width: of the video, pixels. A pipeline draws at its own size, and its image is then resized and cropped.
            generator: one for every prompt.
            the rest: passed to the pipeline; None leaves its own default.

        Raises:
            UserError: a file that is no image, or a folder with another number of images than there are prompts.
        """
        if isinstance(self.source, DiffusionPipeline):
            images, sources = self._draw(prompt, generator, num_inference_steps, guidance_scale, negative_prompt)
        else:
            files = self.files or [self.source] * len(prompt)
            if len(files) != len(prompt):
                raise UserError(
                    f"folder '{self.source}' holds {len(files)} images for {len(prompt)} prompts; give one each"
                )
            images, sources = [open_image(file) for file in files], [{"source": str(file)} for file in files]
        return [make_keyframe(image, height, width, source) for image, source in zip(images, sources, strict=True)]

    def _draw(
        self, prompt: Sequence[str], generator: Sequence[torch.Generator] | None, *arguments: Any
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        assert isinstance(self.source, DiffusionPipeline)
        names = ("num_inference_steps", "guidance_scale", "negative_prompt")
        # Only what was asked for: not every pipeline knows a negative prompt, and each has its own good defaults.
        given = {name: value for name, value in zip(names, arguments, strict=True) if value is not None}
        # One at a time: a batch takes another path through the matrix products, and then the same prompt gives other bits.
        images = []
        for number, text in enumerate(prompt):
            random = None if generator is None else generator[number]
            images.append(self.source(text, generator=random, **given).images[0])
        source = {
            "source": type(self.source).__name__,
            "model": self.source.config.get("_name_or_path"),
            "scheduler": type(self.source.scheduler).__name__,
            **given,
        }
        return images, [{**source, "prompt": text} for text in prompt]


def make_keyframe(image: Image.Image, height: int, width: int, source: dict[str, Any]) -> Keyframe:
    """Brings an image to the video's size, as training clips are brought to it, and records what was done.

    Raises:
        UserError: a size below one pixel.
    """
    if min(height, width) < 1:
        raise UserError(f"key frame of {height}x{width} pixels asked for; give a height and a width of at least 1")
    pixels = np.array(image.convert("RGB"))
    fitted = resize_and_crop(pixels[None], (height, width))[0].permute(1, 2, 0).contiguous().numpy()
    provenance = {
        **source,
        "original_size": {"height": pixels.shape[0], "width": pixels.shape[1]},
        "size": {"height": height, "width": width},
        "resize": None if fitted.shape == pixels.shape else RESIZE,
        "sha256_of_pixels": hashlib.sha256(fitted.tobytes()).hexdigest(),
    }
    return Keyframe(Image.fromarray(fitted), provenance)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image file as RGB, turned as its EXIF data says.

    Raises:
        UserError: there is no such file, or it is not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an image that can be read"
        raise UserError(f"cannot open image '{path}' ({reason}); give a PNG or JPEG file") from None
