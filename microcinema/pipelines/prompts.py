"""Prompts to sample: one prompt, or a file of prompts, as one item per video."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microcinema.data.text_table import FORMATS, read_texts
from microcinema.diffusion.rng import Purpose, sample_generator
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.utils.errors import UserError

COLUMNS = ("prompt", "motion_prompt", "keyframe_prompt", "id", "seed", "image")


@dataclass(frozen=True)
class PromptItem:
    """One video to make: by the command `sample`, the Python API or a protocol.

    Attributes:
        prompt: content of the video, and its motion if `motion_prompt` is None.
        id: stem of its files, unique in a run.
        motion_prompt: the motion, for a model with a motion encoder; None: the prompt.
        keyframe_prompt: for stage 1; None: the prompt.
        negative_prompt: replaces the text where guidance drops it, in both stages.
        seed, sample_index, video_index: of its random generators, see `sample_generator`.
        image: the key frame, as a file or uint8 array (h, w, 3); None: stage 1 draws it.
        mask: file of a picture of the image's size; stage 1 draws its white part anew.
        source: the video, caption or class of a protocol's data set.
        rng: draws key frame and video, one after the other, in the place of new generators; None: new ones.
    """

    prompt: str
    id: str = ""
    motion_prompt: str | None = None
    keyframe_prompt: str | None = None
    negative_prompt: str = ""
    seed: int = 0
    sample_index: int = 0
    video_index: int = 0
    image: Path | np.ndarray | None = field(default=None, compare=False)
    mask: Path | None = None
    source: str = ""
    rng: torch.Generator | None = field(default=None, compare=False)

    @property
    def is_drawn(self) -> bool:
        """Whether stage 1 draws its key frame, or a part of it."""
        return self.image is None or self.mask is not None

    def generator(self, purpose: Purpose) -> torch.Generator:
        """`rng`, or a new generator, at the beginning of its stream."""
        return self.rng or sample_generator(self.seed, self.sample_index, self.video_index, purpose)


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompts as a list; no prompt or an empty one is a UserError."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
        raise UserError("the prompt is empty; describe the content and motion of the video")
    return prompts


def check_generators(generator: Any, videos: int) -> list[torch.Generator]:
    """A generator for each video, of one for all or a sequence of one each; another type or number is a UserError."""
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * videos
    if len(generators) != videos:
        raise UserError(f"{len(generators)} generators for {videos} videos; give one each, or one for all")
    if wrong := [entry for entry in generators if not isinstance(entry, torch.Generator)]:
        raise UserError(f"generator is {wrong[0]!r}; give a torch.Generator, or a list of one per video")
    return generators


def check_motion_prompt(motion_prompt: object, uses_motion_caption: bool) -> None:
    """Refuses, with a UserError, a motion prompt that the model would ignore."""
    if motion_prompt is not None and not uses_motion_caption:
        raise UserError("this model has no motion encoder for motion_prompt; describe the motion in the prompt")


def read_prompt_items(
    prompt: str | None,
    motion_prompt: str | None,
    prompts: str | None,
    image: str | None,
    seed: int,
    num_videos_per_prompt: int,
    negative_prompt: str = "",
    mask: str | None = None,
) -> list[PromptItem]:
    """One item per video of a prompt, or of each line of a file.

    Line n of a file is sample n of the seed; a line with its own seed is sample 0 of that seed, as if it were run alone.

    Args:
        prompts: a list (data/text_table.py) with the column `prompt` and optionally the other `COLUMNS` (`image` relative to the
            file), or a text file with one prompt per line.
        image: file of every video's key frame, or a folder with one image per prompt, in natural order (2.png before 10.png).
        mask: of all images, see `PromptItem`.

    Raises:
        UserError: not one of `prompt` and `prompts`, an empty prompt, a mask without an image, a file that cannot be read, or a bad column, seed or id.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('give one of prompt="..." and prompts=file.csv')
    rows = [{"prompt": prompt or ""}] if prompts is None else _read_rows(prompts)
    common = PromptItem("", motion_prompt=motion_prompt or None, negative_prompt=negative_prompt, seed=seed)
    images, items = KeyframePipeline(image).files if image else [], []
    if images and len(images) != len(rows):
        raise UserError(f"folder '{image}' holds {len(images)} images for {len(rows)} prompts; give one each")
    paths: Sequence[Path | None] = images or [Path(image) if image else None] * len(rows)
    for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
        item = _parse_row(row, replace(common, sample_index=index, image=path), prompts)
        for video in range(num_videos_per_prompt):
            suffix = f"-{video}" if num_videos_per_prompt > 1 else ""
            items.append(replace(item, id=item.id + suffix, video_index=video))
    if mask is not None:
        if missing := [item.id for item in items if item.image is None]:
            raise UserError(f"mask says what to draw anew of an image, and '{missing[0]}' has none; give image as well")
        items = [replace(item, mask=Path(mask)) for item in items]
    ids = [item.id for item in items]
    if duplicates := sorted({name for name in ids if ids.count(name) > 1}):
        raise UserError(f"prompts file '{prompts}': id '{duplicates[0]}' occurs twice; ids must be unique")
    return items


def _parse_row(row: Mapping[str, str], default: PromptItem, file: str | None) -> PromptItem:
    where = f"prompts file '{file}', prompt {default.sample_index + 1}" if file else "prompt"
    cells = {key: value.strip() for key, value in row.items() if value.strip()}
    if "prompt" not in cells:
        raise UserError(f"{where} is empty; describe the content and motion of the video")
    if not cells.get("seed", "0").isdecimal():
        raise UserError(f"{where}: seed '{cells['seed']}' is not a whole number >= 0")
    item = replace(
        default,
        prompt=cells["prompt"],
        motion_prompt=cells.get("motion_prompt", default.motion_prompt),
        keyframe_prompt=cells.get("keyframe_prompt"),
    )
    slug = re.sub(r"[^a-z0-9]+", "-", item.prompt.lower()).strip("-") or "video"
    slug = slug if len(slug) <= 60 else slug[:60].rpartition("-")[0] or slug[:60]
    name = cells.get("id") or (f"{default.sample_index:04d}-{slug}" if file else f"{slug}-seed{default.seed}")
    if not re.fullmatch(r"[\w][\w. +-]*", name):
        raise UserError(f"{where}: id '{name}' cannot be a file name; use letters, digits, '-', '_' and '.'")
    if name.endswith("_keyframe"):
        raise UserError(f"{where}: id '{name}' is reserved for a key frame; choose one that ends otherwise")
    if "seed" in cells:
        item = replace(item, seed=int(cells["seed"]), sample_index=0)
    return replace(item, id=name, image=Path(file or "").parent / cells["image"] if "image" in cells else item.image)


def _read_rows(path: str) -> list[dict[str, str]]:
    if Path(path).suffix.lower() in FORMATS:
        table, columns = read_texts(path, COLUMNS)
        if "prompt" not in columns:
            raise UserError(f"prompts file '{path}' has no column 'prompt'; it has {', '.join(columns) or 'none'}")
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise UserError(f"prompts file '{path}': column '{unknown[0]}' is unknown; use {', '.join(COLUMNS)}")
        rows = table.to_pylist()
    else:
        rows = [{"prompt": line} for line in _read_lines(path) if line.strip()]
    if not rows:
        raise UserError(f"prompts file '{path}' holds no prompts")
    return rows


def _read_lines(path: str) -> list[str]:
    if Path(path).suffix.lower() not in ("", ".txt"):
        raise UserError(f"prompts file '{path}' is of no known format; give one of .txt, {', '.join(FORMATS)}")
    try:
        with open(path, encoding="utf-8-sig") as file:  # its lines end at \n, \r or both, and nowhere else
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read prompts file '{path}' ({reason}); give a CSV or text file") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        header = number == 1 and {cell.strip() for cell in re.split("[,;\t]", line)} <= set(COLUMNS)
        if header or "\0" in line or re.match(r'\{\s*"', line):
            what = f"line {number} of prompts file '{path}' is not a prompt ({line[:60]!r})"
            raise UserError(f"{what}; give one prompt per line, or name the file for what it is: {', '.join(FORMATS)}")
    return lines


def broadcast_to_prompts(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of `count` prompts.

    Args:
        name: of the values, in the plural, for the message.
        value: one for all prompts (such as a string), or a sequence with one for each.

    Raises:
        UserError: the sequence has another length.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise UserError(f"{len(values)} {name} for {count} prompts; give one for each, or one for all")
    return values
