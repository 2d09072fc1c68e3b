"""Stage 1: key frames from any text-to-image pipeline of diffusers, an image file, or a folder of images."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import torch
from accelerate.utils import release_memory
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, SchedulerMixin
from einops import rearrange
from PIL import Image
from transformers import PreTrainedTokenizerBase

from microcinema.config.sampling import OnFlagged, ResizeMode
from microcinema.data.clip_reader import cover, resize
from microcinema.data.images import SUFFIXES, open_image, to_rgb
from microcinema.pipelines.encoders import unread_texts
from microcinema.pipelines.loading import load_index, refuse_pickles, resolve_model_path, resolve_snapshot
from microcinema.pipelines.single_file import check_is_of_libraries, is_single_file, open_single_file
from microcinema.utils.errors import UserError, check_choice, user_errors
from microcinema.utils.files import list_files
from microcinema.utils.hashing import hash_array
from microcinema.utils.logging import warn_once

PixelImage = Image.Image | np.ndarray | torch.Tensor
"""A PIL image, an array (h, w, 3) or a tensor (3, h, w); numbers are uint8, or floats in [0, 1] as pipelines return them."""


@dataclass(frozen=True)
class Keyframe:
    """An image at the video's size."""

    image: Image.Image  # RGB
    provenance: dict[str, Any]  # JSON values: source, original size, how it was resized, sha256 of its pixels


class KeyframePipeline:
    """Provides one key frame for every prompt.

    Its images reach stage 2 as pixels, and the VAE of the video model encodes them, whatever VAE they were decoded with.

    Args:
        source: a text-to-image pipeline (frozen, called for every prompt), an image file (the same for every prompt), or a folder of
            images (one for every prompt, in natural order: 2.png before 10.png).
        origin: name, revision and variant of a pipeline, for the provenance.

    Attributes:
        inputs: arguments of the pipeline that no provenance names, such as a callback; those that it takes are given to it.

    Raises:
        UserError: the path has no images, or `resize_mode` is unknown.
    """

    def __init__(
        self,
        source: DiffusionPipeline | str | os.PathLike[str],
        resize_mode: ResizeMode = "crop",
        origin: Mapping[str, str | None] | None = None,
    ):
        check_choice("resize_mode", resize_mode, get_args(ResizeMode))
        self.source: Any = source if isinstance(source, DiffusionPipeline) else Path(source)
        self.resize_mode: ResizeMode = resize_mode
        self.origin = dict(origin or {})
        self.inputs: dict[str, Any] = {}
        self.files: list[Path] = []
        if isinstance(self.source, Path):
            if not self.source.exists():
                raise UserError(f"key frame '{self.source}' does not exist; give an image file or a folder of images")
            if self.source.is_dir():
                self.files = list_files(self.source, SUFFIXES)
                if not self.files:
                    raise UserError(f"folder '{self.source}' has no images ({', '.join(SUFFIXES)}); give another")
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
        """Opens a saved text-to-image pipeline of any class that diffusers knows; the arguments are those of `load_base`. A UserError if it
        cannot be opened, or is not a text-to-image pipeline."""
        origin = {"source": os.fspath(name), "revision": revision, "variant": variant}
        pipeline = open_pipeline(name, revision, variant, torch_dtype, "text-to-image", _load_text_to_image)
        return cls(pipeline, resize_mode, origin)

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
        """Settings (tqdm's) of the progress bar that a pipeline shows over its steps."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.set_progress_bar_config(**settings)

    def to(self, device: torch.device | str) -> "KeyframePipeline":
        """Moves the text-to-image pipeline, if there is one."""
        if isinstance(self.source, DiffusionPipeline):
            self.source.to(device)
        return self

    def unload(self) -> None:
        """Frees the memory of the text-to-image pipeline for stage 2; it cannot be called afterwards."""
        if isinstance(self.source, DiffusionPipeline):
            self.source = None
            release_memory()

    def __call__(
        self,
        prompt: Sequence[str],
        height: int,
        width: int,
        generator: Sequence[torch.Generator] | None = None,
        draw_height: int | None = None,
        draw_width: int | None = None,
        batch_size: int = 1,
        **arguments: Any,
    ) -> list[Keyframe]:
        """One key frame for every prompt, at the video's size.

        Args:
            height, width: of the video, in pixels.
            generator: one for every prompt.
            draw_height, draw_width: size in pixels at which the pipeline draws; both None: its own.
            batch_size: drawn at once: in a batch, rounding differs, and depends on the other prompts.
            arguments: of the pipeline, such as `num_inference_steps`; None: its own default.

        Raises:
            UserError: a file is not an image, a folder has not one image per prompt, the pipeline refuses an argument, or it has
                been unloaded; it draws pixels that are not finite. An image that its safety checker flags has `flagged` in its
                provenance, see `check_flagged`.
        """
        if isinstance(self.source, Path):
            files = self.files or [self.source] * len(prompt)
            if len(files) != len(prompt):
                raise UserError(f"'{self.source}' holds {len(files)} images for {len(prompt)} prompts; give one each")
            images = [(open_image(file), {"source": str(file)}) for file in files]
        else:
            source = self.provenance(draw_height, draw_width, **arguments)
            generators: Sequence[torch.Generator | None] = generator or [None] * len(prompt)
            images = []
            for start in range(0, len(prompt), batch_size):
                batch = slice(start, start + batch_size)
                drawn = self._draw(prompt[batch], generators[batch], source["arguments"])
                images += [(image, {**source, **remarks}) for image, remarks in drawn]
        return [make_keyframe(image, height, width, entries, self.resize_mode) for image, entries in images]

    def provenance(
        self, draw_height: int | None = None, draw_width: int | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Provenance of the key frames that the pipeline draws with these arguments of a call, apart from prompt and image."""
        if not isinstance(self.source, DiffusionPipeline):
            raise UserError("the text-to-image pipeline has been unloaded; open it again to draw")
        if (draw_height is None) != (draw_width is None):  # diffusers would ignore the other one
            raise UserError(f"draw_height={draw_height}, draw_width={draw_width}; give both, or neither")
        name = type(self.source).__name__
        arguments |= {"height": draw_height, "width": draw_width}
        arguments = {argument: value for argument, value in arguments.items() if value is not None}
        if unknown := [argument for argument in arguments if not self.takes(argument)]:
            raise UserError(f"{name} takes no argument '{unknown[0]}'; leave it out, or use another model")
        return {
            **{"source": self.source.config.get("_name_or_path"), **self.origin},
            "class": name,
            "schedulers": {
                key: {"class": type(part).__name__, "settings": {k: v for k, v in part.config.items() if k[0] != "_"}}
                for key, part in self.source.components.items()
                if isinstance(part, SchedulerMixin)
            },
            "arguments": arguments,
        }

    def _draw(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator | None], arguments: Mapping[str, Any]
    ) -> list[tuple[Image.Image, dict[str, str]]]:
        """Images, with what their provenance has to say: the prompt, its end if that is `truncated`, and `flagged`."""
        assert isinstance(self.source, DiffusionPipeline)
        name, one = type(self.source).__name__, len(prompts) == 1
        inputs = {key: value for key, value in self.inputs.items() if self.takes(key)}
        rng: Any = generators[0] if None in generators or one else list(generators)
        if not one and "negative_prompt" in arguments:  # some pipelines want as many
            arguments = {**arguments, "negative_prompt": [arguments["negative_prompt"]] * len(prompts)}
        settings = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its own settings"
        fault = f"stage 1, {name}, cannot draw {', '.join(map(repr, prompts))} with {settings} ({{reason}})"
        with user_errors(f"{fault}; change these settings", ValueError, TypeError, RuntimeError):
            with _check_decoders(self.networks.values()):
                output = self.source(prompt=prompts[0] if one else list(prompts), generator=rng, **inputs, **arguments)
        images = getattr(output, "images", None)
        if images is None:
            raise UserError(f"stage 1, {name}, returns no images; give a text-to-image pipeline")
        flags = getattr(output, "nsfw_content_detected", None) or getattr(output, "nsfw_detected", None)
        longest = inspect.signature(type(self.source).__call__).parameters.get("max_sequence_length")
        lengths = {
            key: (part, part.model_max_length if longest is None or "CLIP" in type(part).__name__ else longest.default)
            for key, part in self.source.components.items()
            if isinstance(part, PreTrainedTokenizerBase)
        }
        remarks: list[dict[str, str]] = []
        for prompt, flag in zip(prompts, flags or [False] * len(prompts), strict=True):
            remarks.append({"prompt": prompt, **({"flagged": "by the safety checker"} if flag else {})})
            ends = unread_texts(lengths, dict.fromkeys(lengths, prompt))
            if lengths and ends.keys() == lengths.keys():  # otherwise one of several encoders reads all
                remarks[-1]["truncated"] = min(ends.values(), key=len)
                warn_once(f"stage 1 reads '{prompt}' without its end '{remarks[-1]['truncated']}'")
        return list(zip(images, remarks, strict=True))


def check_flagged(provenance: Mapping[str, Any], name: str, on_flagged: OnFlagged) -> bool:
    """Whether a video is made of a key frame with this provenance; one that is flagged is told, or refused with a UserError."""
    if flagged := provenance.get("flagged"):
        fault = f"the key frame of '{name}' was flagged {flagged} of stage 1"
        if on_flagged == "error":
            raise UserError(f"{fault}; change prompt or seed, or set keyframe.on_flagged=skip or keep")
        warn_once(f"{fault}; keyframe.on_flagged={on_flagged}")
    return not (flagged and on_flagged == "skip")


@contextmanager
def _check_decoders(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within it a VAE that decodes to numbers that are not finite raises a UserError; it may be the video pipeline's as well."""
    decoders = [getattr(network, "decoder", None) for network in networks]
    hooks = [part.register_forward_hook(_check_finite) for part in decoders if isinstance(part, torch.nn.Module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_finite(decoder: torch.nn.Module, inputs: Any, pixels: Any) -> None:
    if isinstance(pixels, torch.Tensor) and not pixels.isfinite().all():
        raise UserError(
            "stage 1 draws pixels that are not finite; use keyframe.torch_dtype=float32, and check the weights"
        )


def make_keyframe(
    image: Image.Image, height: int, width: int, source: Mapping[str, Any], resize_mode: ResizeMode = "crop"
) -> Keyframe:
    """The image at the video's size, with its provenance, which begins with `source`. A UserError for a size below one pixel, or an image of
    another size if `resize_mode` is `exact`."""
    if min(height, width) < 1:
        raise UserError(f"the key frame's size is {height}x{width}; give a height and a width of at least 1")
    image = to_rgb(image)
    pixels = np.array(image)
    size, target = (pixels.shape[0], pixels.shape[1]), (height, width)
    if resize_mode == "exact" and size != target:
        sizes = f"the key frame has {size[0]}x{size[1]} pixels (height x width), the video {height}x{width}"
        raise UserError(f"{sizes}; give one of the video's size, or resize_mode=crop or stretch")
    scaled, (top, left) = (target, (0, 0)) if resize_mode == "stretch" else cover(size, target)
    frame = resize(rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w"), scaled)[0]
    cropped = rearrange(frame[:, top : top + height, left : left + width], "c h w -> h w c").contiguous().numpy()
    provenance = {
        **source,
        **image.info["conversions"],
        "original_size": _size(*size),
        "size": _size(height, width),
        "resize_mode": resize_mode,
        "scaled": None if scaled == size else {"method": "bicubic, antialiased", **_size(*scaled)},
        "cropped": None if scaled == target else {"top": top, "left": left, **_size(height, width)},
        "sha256_of_pixels": hash_array(cropped),
    }
    return Keyframe(Image.fromarray(cropped), provenance)


def as_pil(image: PixelImage) -> Image.Image:
    """The key frame as a PIL image; numbers of another dtype, shape or range are a UserError."""
    if isinstance(image, Image.Image):
        return image
    pixels: Any = image
    if isinstance(image, torch.Tensor):
        pixels = (image.double() if image.is_floating_point() else image).cpu().numpy()
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
    is_array = isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    if is_array and pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if not is_array or pixels.dtype != np.uint8:
        kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(image).__name__
        layouts = "an array (height, width, 3) or a tensor (3, height, width)"
        raise UserError(f"a key frame is {kind}; give a PIL image, or {layouts}, as uint8 or as floats from 0 to 1")
    return Image.fromarray(pixels)


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size as pixels `b 3 H W` in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return rearrange(pixels.float() / 127.5 - 1, "b h w c -> b c h w")


def open_pipeline(
    name: str | os.PathLike[str],
    revision: str | None,
    variant: str | None,
    torch_dtype: torch.dtype,
    kind: str,
    load: Callable[[str, Mapping[str, Any], Mapping[str, Any]], DiffusionPipeline],
) -> DiffusionPipeline:
    """A pipeline of diffusers, by `load(path, index, settings)` with the settings of `from_pretrained`, or of a single file.

    `kind` is what it is called in messages. A UserError if it cannot be opened.
    """
    path = resolve_model_path(name)
    index = load_index(path, revision)
    for part, cls in index.items():
        refuse_pickles(Path(path, part))  # from a hub repository only safetensors are downloaded
        check_is_of_libraries(path, part, cls)
    if is_single_file(name):
        return open_single_file(name, resolve_snapshot(name, (), revision), torch_dtype)
    settings = {"revision": revision, "variant": variant, "use_safetensors": True, "torch_dtype": torch_dtype}
    # diffusers needs an explicit None for a component that the pipeline was saved without, such as the T5 of Stable Diffusion 3.
    settings |= {part: None for part, cls in index.items() if cls == [None, None]}
    fault = f"cannot open the {kind} pipeline '{path}' ({{reason}})"
    with user_errors(f"{fault}; give a complete diffusers pipeline of safetensors"):
        with warnings.catch_warnings():
            # All releases of diffusers before 1.0 accept `torch_dtype`, and later ones warn of it; the other is theirs to the hub.
            warnings.filterwarnings("ignore", message=".*(torch_dtype|local_dir_use_symlinks).*")
            return load(path, index, settings)


def _load_text_to_image(path: str, index: Mapping[str, Any], settings: Mapping[str, Any]) -> DiffusionPipeline:
    try:
        return AutoPipelineForText2Image.from_pretrained(path, **settings)
    except ValueError as error:
        if "AutoPipeline can't find" not in str(error):
            raise
    _check_is_text_to_image(path, index.get("_class_name"))
    return DiffusionPipeline.from_pretrained(path, **settings)


def _check_is_text_to_image(path: str, name: str | None) -> None:
    """Refuses, by its class and before its weights are read, a pipeline that does not make images from text."""
    cls = getattr(diffusers, name or "", None)
    if cls is None:
        fault = f"'{path}' holds a {name}, which diffusers {diffusers.__version__} does not know"
        raise UserError(f"{fault}; give a text-to-image pipeline, or update diffusers")
    arguments = set(inspect.signature(cls.__call__).parameters)
    if not {"prompt", "height"} <= arguments or {"image", "num_frames"} & arguments:
        raise UserError(f"'{path}' holds a {name}, which does not make images from text; give a text-to-image pipeline")


def _size(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}
