"""What to sample: a prompt, or a file of prompts, as one request for each video."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.utils.errors import UserError

COLUMNS = ("prompt", "motion_prompt", "id", "seed", "image")


@dataclass(frozen=True)
class Request:
    """One video to make.

    Attributes:
        id: stem of its files.
        numbers: of its generator: seed, place in the file of prompts, which of the videos of the prompt.
        image: file of the key frame; None: draw one.
    """

    id: str
    prompt: str
    motion_prompt: str | None
    numbers: tuple[int, int, int]
    image: Path | None


def read_requests(
    prompt: str | None,
    motion_prompt: str | None,
    prompts: str | None,
    image: str | None,
    seed: int,
    num_videos_per_prompt: int,
) -> list[Request]:
    """What to make: of one prompt, or of each line of a file.

    A file's line n is sample n of the seed; a line with a seed of its own is sample 0 of that one, as if it were run alone.

    Args:
        prompts: a CSV file with the column `prompt` and, if wanted, `motion_prompt`, `id`, `seed` and `image` (relative to the
            file), or a text file with one prompt in each line.
        image: file of every video's key frame, or a folder with one for each prompt, in the order of names.

    Raises:
        UserError: neither or both of `prompt` and `prompts`, an empty prompt, a file that cannot be read, an unknown column, a
            seed that is not a number, an id that is taken twice or is no file name.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('give one of prompt="..." and prompts=file.csv')
    rows = [{"prompt": prompt or "", "motion_prompt": motion_prompt or ""}] if prompts is None else _read_rows(prompts)
    images = _images(image, len(rows))
    requests = []
    for number, (row, given) in enumerate(zip(rows, images, strict=True)):
        where = f"prompts file '{prompts}', prompt {number + 1}" if prompts else "prompt"
        text = row["prompt"].strip()
        if not text:
            raise UserError(f"{where} is empty; say what is to be seen and how it moves")
        own_seed = row.get("seed", "").strip()
        if own_seed and not own_seed.isdecimal():
            raise UserError(f"{where}: seed '{own_seed}' is not a whole number >= 0")
        numbers = (int(own_seed), 0) if own_seed else (seed, number)
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "video"
        slug = slug if len(slug) <= 60 else slug[:60].rpartition("-")[0] or slug[:60]
        name = row.get("id", "").strip() or (f"{number:04d}-{slug}" if prompts else f"{slug}-seed{seed}")
        if not re.fullmatch(r"[\w][\w. +-]*", name):
            raise UserError(f"{where}: id '{name}' cannot be a file name; use letters, digits, '-', '_' and '.'")
        if name.endswith("_keyframe"):
            raise UserError(
                f"{where}: id '{name}' is kept for the key frame of another; choose one that ends otherwise"
            )
        own_image = row.get("image", "").strip()
        path = Path(prompts or "").parent / own_image if own_image else given
        motion = row.get("motion_prompt", "").strip() or motion_prompt or None
        for video in range(num_videos_per_prompt):
            suffix = f"-{video}" if num_videos_per_prompt > 1 else ""
            requests.append(Request(name + suffix, text, motion, (*numbers, video), path))
    names = [request.id for request in requests]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"prompts file '{prompts}': id '{twice[0]}' is there twice; every video needs its own")
    return requests


def _read_rows(path: str) -> list[dict[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read prompts file '{path}' ({reason}); give a CSV or text file") from None
    if Path(path).suffix.lower() != ".csv":
        rows = [{"prompt": line} for line in text.splitlines() if line.strip()]
    else:
        reader = csv.DictReader(text.splitlines(keepends=True), restval="")
        columns: Sequence[str] = reader.fieldnames or ()
        if "prompt" not in columns:
            raise UserError(f"prompts file '{path}' has no column 'prompt'; it has {', '.join(columns) or 'none'}")
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise UserError(f"prompts file '{path}': column '{unknown[0]}' is unknown; there are {', '.join(COLUMNS)}")
        rows = list(reader)
        if any(None in row for row in rows):
            raise UserError(f"prompts file '{path}': a line has more fields than the header; put quotes round commas")
    if not rows:
        raise UserError(f"prompts file '{path}' holds no prompts")
    return rows


def _images(image: str | None, count: int) -> Sequence[Path | None]:
    if image is None:
        return [None] * count
    source = KeyframePipeline(image)
    if source.files and len(source.files) != count:
        raise UserError(f"folder '{image}' holds {len(source.files)} images for {count} prompts; give one each")
    return source.files or [Path(image)] * count


def broadcast_to_prompts(name: str, value: Any, count: int) -> list[Any]:
    """One value for every prompt.

    Args:
        name: of the values, in the plural, for the message.
        value: one for all prompts, or a sequence with one for each; a string is one value.
        count: number of prompts.

    Raises:
        UserError: the sequence has another length.
    """
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if is_sequence else [value] * count
    if len(values) != count:
        raise UserError(f"{len(values)} {name} for {count} prompts; give one for each, or one for all")
    return values
