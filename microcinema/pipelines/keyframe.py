"""Stage 1: key frames from any text-to-image pipeline of diffusers, from an image file or from a folder of images."""

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import numpy as np
import torch
from accelerate.utils import release_memory
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, SchedulerMixin
from einops import rearrange
from PIL import Image, ImageOps

from microcinema.data.clip_reader import cover, resize
from microcinema.pipelines.loading import load_index, refuse_pickles, resolve_model_path
from microcinema.utils.errors import UserError, first_line
from microcinema.utils.hashing import hash_array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ResizeMode = Literal["crop", "stretch", "exact"]
"""How an image comes to the video's size: scaled to cover it and cropped at the centre, as training clips are; scaled in each
direction by itself; or not at all, so that an image of another size is an error."""
PixelImage = Image.Image | np.ndarray
"""A PIL image or a uint8 array (h, w, 3)."""


@dataclass(frozen=True)
class Keyframe:
    """An image at the video's size and where it comes from.

    Attributes:
        image: RGB.
        provenance: plain values: source, original size, how it came to the video's size, sha256 of its pixels.
    """

    image: Image.Image
    provenance: dict[str, Any]


class KeyframePipeline:
    """Makes or finds one key frame for every prompt.

    Its images reach stage 2 as pixels: whatever VAE drew them, the video model's own encodes them.

    Args:
        source: a text-to-image pipeline (it is frozen, and called for every prompt), an image file (the same for every prompt), or a
            folder of images (one for every prompt, in the order of their names).
        resize_mode: how its images come to the video's size, see `ResizeMode`.
        origin: where a pipeline was opened from, for the record.

    Raises:
        UserError: a path that holds neither, or an unknown `resize_mode`.
    """

    def __init__(
        self,
        source: DiffusionPipeline | str | os.PathLike[str],
        resize_mode: ResizeMode = "crop",
        origin: Mapping[str, str | None] | None = None,
    ):
        if resize_mode not in get_args(ResizeMode):
            raise UserError(f"resize_mode '{resize_mode}' is unknown; use one of {', '.join(get_args(ResizeMode))}")
        self.source: Any = source if isinstance(source, DiffusionPipeline) else Path(source)
        self.resize_mode: ResizeMode = resize_mode
        self.origin = dict(origin or {})
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
        for network in self.networks.values():
            network.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        resize_mode: ResizeMode = "crop",
    ) -> "KeyframePipeline":
        """Opens a saved text-to-image pipeline of any class that diffusers knows.

        Args:
            name: an embedded model, a folder or a hub repository.
            revision, variant: of a hub repository; which weight files, such as `fp16`.
            torch_dtype: of the weights in memory, whatever they are stored in.

        Raises:
            UserError: it cannot be opened, or does not make images from text.
        """
        path = resolve_model_path(name)
        index = load_index(path, revision)
        for part in index:
            refuse_pickles(Path(path, part))  # of a repository, only safetensors are fetched
        settings = {"revision": revision, "variant": variant, "use_safetensors": True, "torch_dtype": torch_dtype}
        # Such as Stable Diffusion 3 without its T5: diffusers wants to be told that what is not there shall not be there.
        settings |= {part: None for part, kind in index.items() if kind == [None, None]}
        try:
            with warnings.catch_warnings():
                # Releases of diffusers before 1.0 all take this name, and the later ones warn that there is another.
                warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
                try:
                    pipeline = AutoPipelineForText2Image.from_pretrained(path, **settings)
                except ValueError as error:
                    if "AutoPipeline can't find" not in str(error):
                        raise
                    _check_makes_images(path, index.get("_class_name"))
                    pipeline = DiffusionPipeline.from_pretrained(path, **settings)
        except UserError:
            raise
        except Exception as error:  # each library has its own for files that are missing or damaged
            raise UserError(
                f"cannot open the text-to-image pipeline '{path}' ({first_line(error)}); "
                "give a complete diffusers pipeline of safetensors"
            ) from error
        return cls(pipeline, resize_mode, {"source": os.fspath(name), "revision": revision, "variant": variant})

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks of the text-to-image pipeline, if there is one."""
        parts = self.source.components if isinstance(self.source, DiffusionPipeline) else {}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def takes(self, argument: str) -> bool:
        """Whether there is a text-to-image pipeline, and it has an argument of this name."""
        is_pipeline = isinstance(self.source, DiffusionPipeline)
        return is_pipeline and argument in inspect.signature(type(self.source).__call__).parameters

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of the bar over steps (tqdm's); a pipeline shows one."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.set_progress_bar_config(**settings)

    def to(self, device: torch.device | str) -> "KeyframePipeline":
        """Moves the text-to-image pipeline, if there is one."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.to(device)
        return self

    def unload(self) -> None:
        """Gives the text-to-image pipeline's memory back, for stage 2; the object cannot draw afterwards."""
        if isinstance(self.source, DiffusionPipeline):
            self.source = None
            release_memory()

    def __call__(
        self,
        prompt: Sequence[str],
        height: int,
        width: int,
        generator: Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        draw_height: int | None = None,
        draw_width: int | None = None,
    ) -> list[Keyframe]:
        """One key frame for every prompt, at the wanted size.

        Args:
            prompt: what shall be seen.
            height, width: of the video, pixels; an image of another size is brought to it as `resize_mode` says.
            generator: one for every prompt.
            draw_height, draw_width: the size at which a pipeline draws, pixels; both None: its own.
            the rest: passed to the pipeline; None leaves its own default.

        Raises:
            UserError: a file that is no image, a folder with another number of images than there are prompts, a size or another argument
                that the pipeline refuses, or one that has been unloaded.
        """
        if isinstance(self.source, Path):
            files = self.files or [self.source] * len(prompt)
            if len(files) != len(prompt):
                raise UserError(
                    f"folder '{self.source}' holds {len(files)} images for {len(prompt)} prompts; give one each"
                )
            return [
                make_keyframe(open_image(file), height, width, {"source": str(file)}, self.resize_mode)
                for file in files
            ]
        source = self.describe(num_inference_steps, guidance_scale, negative_prompt, draw_height, draw_width)
        # One at a time: a batch takes another path through the matrix products, and then the same prompt gives other bits.
        return [
            make_keyframe(
                self._draw(text, None if generator is None else generator[number], source["arguments"]),
                height,
                width,
                {**source, "prompt": text},
                self.resize_mode,
            )
            for number, text in enumerate(prompt)
        ]

    def describe(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        draw_height: int | None = None,
        draw_width: int | None = None,
    ) -> dict[str, Any]:
        """What the provenance of every key frame drawn with these arguments says of the pipeline.

        Raises:
            UserError: the pipeline has been unloaded, or does not know an argument, or only half of a size is given.
        """
        if not isinstance(self.source, DiffusionPipeline):
            raise UserError("the text-to-image pipeline has been unloaded; open it again to draw")
        if (draw_height is None) != (draw_width is None):  # diffusers would ignore the one that is given
            raise UserError(f"draw_height={draw_height}, draw_width={draw_width}; give both, or neither")
        name = type(self.source).__name__
        arguments = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "height": draw_height,
            "width": draw_width,
        }
        # Only what was asked for: not every pipeline knows a negative prompt, and each has its own good defaults.
        given = {name: value for name, value in arguments.items() if value is not None}
        if unknown := [argument for argument in given if not self.takes(argument)]:
            raise UserError(f"{name} takes no argument '{unknown[0]}'; leave it out, or take another stage 1")
        return {
            **{"source": self.source.config.get("_name_or_path"), **self.origin},
            "class": name,
            "schedulers": {
                part: {"class": type(found).__name__, "settings": _plain(found.config)}
                for part, found in self.source.components.items()
                if isinstance(found, SchedulerMixin)
            },
            "arguments": given,
        }

    def _draw(self, prompt: str, generator: torch.Generator | None, arguments: Mapping[str, Any]) -> Image.Image:
        assert isinstance(self.source, DiffusionPipeline)
        name = type(self.source).__name__
        try:
            images = getattr(self.source(prompt=prompt, generator=generator, **arguments), "images", None)
        except (ValueError, TypeError, RuntimeError) as error:  # what pipelines refuse a size or a value with
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its own settings"
            raise UserError(
                f"stage 1, {name}, does not draw '{prompt}' with {given} ({first_line(error)}); change these"
            ) from error
        if images is None:
            raise UserError(f"stage 1, {name}, makes no images; give a text-to-image pipeline")
        return images[0]


def make_keyframe(
    image: Image.Image, height: int, width: int, source: Mapping[str, Any], resize_mode: ResizeMode = "crop"
) -> Keyframe:
    """Brings an image to the video's size and records what was done.

    Raises:
        UserError: a size below one pixel, or an image of another size where `resize_mode` is `exact`.
    """
    if min(height, width) < 1:
        raise UserError(f"key frame of {height}x{width} pixels asked for; give a height and a width of at least 1")
    pixels = np.array(image.convert("RGB"))
    size, wanted = (pixels.shape[0], pixels.shape[1]), (height, width)
    if resize_mode == "exact" and size != wanted:
        raise UserError(
            f"the key frame has {size[0]}x{size[1]} pixels (height x width), the video {height}x{width}; "
            "give one of the video's size, or resize_mode=crop or stretch"
        )
    scaled, (top, left) = (wanted, (0, 0)) if resize_mode == "stretch" else cover(size, wanted)
    frame = resize(rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w"), scaled)[0]
    fitted = rearrange(frame[:, top : top + height, left : left + width], "c h w -> h w c").contiguous().numpy()
    provenance = {
        **source,
        "original_size": _size(*size),
        "size": _size(height, width),
        "resize_mode": resize_mode,
        "scaled": None if scaled == size else {"method": "bicubic, antialiased", **_size(*scaled)},
        "cropped": None if scaled == wanted else {"top": top, "left": left, **_size(height, width)},
        "sha256_of_pixels": hash_array(fitted),
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an image that can be read"
        raise UserError(f"cannot open image '{path}' ({reason}); give a PNG or JPEG file") from None


def as_pil(image: PixelImage) -> Image.Image:
    """The key frame as a PIL image.

    Raises:
        UserError: an array of another dtype or shape, or no image at all.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"a key frame is {kind}; give a PIL image or a uint8 array (height, width, 3)")
    return Image.fromarray(image)


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size as pixels `b 3 H W` in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(pixels.float() / 127.5 - 1, "b h w c -> b c h w")


def _check_makes_images(path: str, name: str | None) -> None:
    """Refuses a class that the automatic one does not know and that is not of its kind either, before its weights are read."""
    kind = getattr(diffusers, name or "", None)
    if kind is None:
        raise UserError(
            f"'{path}' holds a {name}, which diffusers {diffusers.__version__} does not know; "
            "give a text-to-image pipeline, or update diffusers"
        )
    takes = inspect.signature(kind.__call__).parameters
    if not {"prompt", "height"} <= set(takes) or {"image", "num_frames"} & set(takes):
        raise UserError(f"'{path}' holds a {name}, which does not make images from text; give a text-to-image pipeline")


def _size(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
