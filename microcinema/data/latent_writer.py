"""Writing a folder of latents by any number of processes, one shard at a time, so that an interruption loses at most the current shards."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from webdataset import TarWriter

from microcinema.data.latents import EMPTY, INDEX, LOCATION, QUARANTINE, SCORES, Layout, read_fingerprint, shard_path
from microcinema.data.quarantine import ErrorRate, Quarantine, forget_records, read_quarantine
from microcinema.data.shards import read_members
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError
from microcinema.utils.files import LOCK, atomic_path, make_folder, sweep, write_json
from microcinema.utils.fingerprint import FINGERPRINT, differences

TEXTS = ("id", "caption", "description", "motion")
Encode = Callable[[dict[str, Any]], Mapping[str, torch.Tensor]]
"""From a batch of one clip to its cached tensors, each (1, ...)."""


def create_folder(
    folder: Path,
    layout: Layout,
    contents: Mapping[str, Any],
    empty_tokens: Mapping[str, torch.Tensor],
    with_scores: bool = False,
) -> None:
    """Writes the fingerprint and the empty caption, or verifies those of an earlier start. By one process, before all others write.

    Args:
        contents: what each cached tensor depends on.
        empty_tokens: encoder outputs of the empty caption, each (1, ...).
        with_scores: motion scores are written too; latents that lack only those get them, whatever else is cached with them.

    Raises:
        UserError: the folder holds something else or other latents, or cannot be written.
    """
    if (folder / FINGERPRINT).is_file():
        old_layout, old = read_fingerprint(folder)
        changes = differences({**asdict(layout), **contents}, {**asdict(old_layout), **old}, common_only=True)
        if not (with_scores and (folder / INDEX).is_file()):
            changes += [f"{name} was{' not' * (name in contents)} cached" for name in sorted(set(old) ^ set(contents))]
        if changes:
            fault = f"'{folder}' holds other latents ({', '.join(changes)})"
            raise UserError(f"{fault}; delete it, or choose another folder")
        sweep(folder)
        forget_records(folder / QUARANTINE, lambda row: not shard_path(folder, row // layout.clips_per_shard).is_file())
        return
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UserError(f"'{folder}' holds something other than latents; choose a new folder")
    make_folder(folder)
    if empty_tokens:
        with atomic_path(folder / EMPTY) as temporary:
            tensors = {name: tokens.half().cpu().contiguous() for name, tokens in empty_tokens.items()}
            temporary.write_bytes(save(tensors))
    write_json(folder / FINGERPRINT, {"layout": asdict(layout), "contents": contents})


def write_shards(
    folder: Path,
    layout: Layout,
    dataset: ClipSource,
    encode: Encode,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    clip_retries: int = 1,
    max_error_rate: float = 0.05,
) -> None:
    """Writes this process's share of the shards that are not finished; clips that cannot be read go to quarantine.

    A shard of which no clip can be read is left for the next start, unless all clips may be broken (`max_error_rate=1`); when too many
    are broken, so are those shards that have more than their share. What a disk did that failed for a while is made good then.

    Raises:
        UserError: too many broken clips, tensors that overflow float16.
        OSError: a full disk; finished shards are kept.
    """
    shards = _missing_shards(folder, layout, rank, num_processes)
    rows = [row for shard in shards for row in layout.rows(shard)]
    row_dataset = _RowDataset(dataset, layout.num_clips, Quarantine(folder / QUARANTINE, clip_retries, rank))
    loader = DataLoader(row_dataset, batch_size=1, sampler=rows, num_workers=num_workers)
    window = min(1000, len(rows))
    errors = ErrorRate(max_error_rate, folder / QUARANTINE if rank == 0 else None, window)
    batches = errors.watch(loader, replaced=False)
    doubtful: list[Path] = []
    with tqdm(total=len(rows), desc="encoding", unit="clip", disable=None if rank == 0 else True) as bar:
        for shard in shards:
            count = len(layout.rows(shard))
            try:
                num_broken = _write_shard(folder, shard, layout, batches, encode)
            except UserError:
                for path in doubtful if errors.exceeded else ():
                    path.unlink()
                raise
            if num_broken == count and max_error_rate < 1:
                shard_path(folder, shard).unlink()
            elif num_broken > max_error_rate * count:
                doubtful.append(shard_path(folder, shard))
            bar.update(count)


def write_scores(
    folder: Path, layout: Layout, dataset: ClipSource, rank: int = 0, num_processes: int = 1, num_workers: int = 0
) -> None:
    """Writes the motion scores of this process's shards that were made without; a UserError if a clip can no longer be read.

    Args:
        dataset: the same clips, as `MotionClips`.
    """
    shards = [shard for shard in range(rank, layout.num_shards, num_processes) if not _scores(folder, shard).is_file()]
    for shard in tqdm(shards, desc="motion scores", unit="shard", disable=None if shards and rank == 0 else True):
        sound = np.load(shard_path(folder, shard).with_suffix(".npy"))["tensors_size"] > 0
        rows = [row for row, is_sound in zip(layout.rows(shard), sound, strict=True) if is_sound]
        loader = DataLoader(
            _RowDataset(dataset, layout.num_clips), batch_size=None, sampler=rows, num_workers=num_workers
        )
        scores = np.full(len(sound), np.nan, np.float32)
        scores[sound] = [item["motion_score"] for item in loader]
        _save(_scores(folder, shard), scores)


def write_index(folder: Path, layout: Layout) -> int:
    """Writes the index, which completes the folder, and returns the number of sound rows. By one process, after all others have written. A
    UserError if all rows are broken, or a shard is missing."""
    if missing := _missing_shards(folder, layout):
        broken = {record["sample_index"] for record in read_quarantine(folder / QUARANTINE)}
        if empty := [shard for shard in missing if broken.issuperset(layout.rows(shard))]:
            state = f"no clip of {len(empty)} of {layout.num_shards} shards could be read, the first is {empty[0]}"
            advice = "mend the data and run the command again, or accept this with max_error_rate=1"
            raise UserError(f"{state}; see '{folder / QUARANTINE}', {advice}")
        state = f"{len(missing)} of {layout.num_shards} shards are missing in '{folder}', the first is {missing[0]}"
        raise UserError(f"{state}; let all processes write into one shared folder, and run the command again")
    files = [shard_path(folder, shard).with_suffix(".npy") for shard in range(layout.num_shards)]
    locations = np.concatenate([np.load(file) for file in files])
    count = int(np.count_nonzero(locations["tensors_size"]))
    if count == 0:
        raise UserError(f"none of the {len(locations)} clips could be read; see '{folder / QUARANTINE}'")
    scores = [_scores(folder, shard) for shard in range(layout.num_shards)]
    if all(file.is_file() for file in scores):
        _save(folder / SCORES, np.concatenate([np.load(file) for file in scores]))
    _save(folder / INDEX, locations)
    return count


def _scores(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(f".{SCORES}")


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array)


class _RowDataset(Dataset[dict[str, Any]]):
    """The clips of a data set by row; `broken` is 1 for those that cannot be read, if there is a quarantine for them."""

    def __init__(self, dataset: ClipSource, num_clips: int, quarantine: Quarantine | None = None) -> None:
        self.dataset, self.num_clips, self.quarantine = dataset, num_clips, quarantine

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, index = divmod(row, self.num_clips)
        self.dataset.set_epoch(epoch)
        if self.quarantine is None:
            return self.dataset[index]
        item = self.quarantine.try_read(self.dataset, row, index)
        return {**(item or {}), "broken": int(item is None)}


def _missing_shards(folder: Path, layout: Layout, rank: int = 0, num_processes: int = 1) -> list[int]:
    return [shard for shard in range(rank, layout.num_shards, num_processes) if not shard_path(folder, shard).is_file()]


def _write_shard(folder: Path, shard: int, layout: Layout, batches: Iterator[dict[str, Any]], encode: Encode) -> int:
    """Encodes the next batches into a shard, which gets its name when it is complete; returns the number of broken clips."""
    rows, path = layout.rows(shard), shard_path(folder, shard)
    positions: list[int] = []
    scores: list[float] = []
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file, TarWriter(file, mtime=0) as tar:
            # `zip` asks for positions first, and so leaves the next shard's first batch.
            for position, batch in zip(range(len(rows)), batches, strict=False):
                if not batch["broken"].item():
                    tar.write({"__key__": f"{rows[position]:09d}", **_members(batch, encode(batch))})
                    positions.append(position)
                    scores += batch.get("motion_score", torch.zeros(0)).tolist()
        locations = np.zeros(len(rows), LOCATION)
        for position, sample in zip(positions, read_members(str(temporary)), strict=True):
            record, tensors = sample["json"], sample["safetensors"]
            locations[position] = (record.offset, record.size, tensors.offset, tensors.size)
        _save(path.with_suffix(".npy"), locations)
        if scores:
            of_rows = np.full(len(rows), np.nan, np.float32)
            of_rows[positions] = scores
            _save(_scores(folder, shard), of_rows)
    return len(rows) - len(positions)


def _members(batch: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The files of a sample by extension."""
    half = {name: value[0].half() if value.is_floating_point() else value[0] for name, value in tensors.items()}
    for name, value in half.items():
        if not value.isfinite().all():
            raise UserError(f"{name} of clip '{batch['id'][0]}' overflow float16; use sound encoders, in float32")
    record = {**{name: batch[name][0] for name in TEXTS}, "fps": batch["fps"].item()}
    return {
        "json": json.dumps(record, ensure_ascii=False).encode(),
        "safetensors": save({name: value.cpu().contiguous() for name, value in half.items()}),
    }
