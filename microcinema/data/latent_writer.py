"""Writing a folder of latents: by any number of processes, a shard at a time, so that nothing is lost or done twice when it is broken off."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from webdataset import TarWriter

from microcinema.data.latents import (
    EMPTY,
    INDEX,
    PLACE,
    QUARANTINE,
    Layout,
    read_fingerprint,
    shard_path,
)
from microcinema.data.quarantine import ErrorRate, Quarantine
from microcinema.data.shards import read_members
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.fingerprint import FINGERPRINT, differences

TEXTS = ("id", "caption", "description", "motion")


def begin(folder: Path, layout: Layout, parts: Mapping[str, Any], empty: Mapping[str, torch.Tensor]) -> None:
    """Writes what is known before any clip is read, or checks that the folder was begun alike. By one process, before all others write.

    Raises:
        UserError: the folder holds something else, or latents that are others, or cannot be written.
    """
    if (folder / FINGERPRINT).is_file():
        there, held = read_fingerprint(folder)
        differ = differences({**asdict(layout), **parts}, {**asdict(there), **held}, common_only=True)
        differ += [f"{part} was{' not' * (part in parts)} kept" for part in sorted(set(held) ^ set(parts))]
        if differ:
            raise UserError(
                f"'{folder}' holds other latents ({', '.join(differ)}); delete it, or choose another folder"
            )
        for left in folder.glob(".*.partial*"):
            left.unlink()  # of a process that was killed
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' holds something other than latents; choose a new folder")
    make_folder(folder)
    if empty:
        with atomic_path(folder / EMPTY) as temporary:
            temporary.write_bytes(save({name: part.half().cpu().contiguous() for name, part in empty.items()}))
    write_json(folder / FINGERPRINT, {"layout": asdict(layout), "parts": parts})


def missing(folder: Path, layout: Layout, rank: int = 0, num_processes: int = 1) -> list[int]:
    """The shards that a process has to make: its share of all, less those that are finished."""
    return [shard for shard in range(rank, layout.num_shards, num_processes) if not shard_path(folder, shard).is_file()]


def read(
    dataset: ClipSource,
    folder: Path,
    layout: Layout,
    shards: list[int],
    retries: int,
    rank: int,
    num_workers: int,
    errors: ErrorRate,
) -> Iterator[dict[str, Any]]:
    """The clips of shards one after the other, as batches of one with `row` and `broken`; those that cannot be read go to quarantine.

    Args:
        retries, rank: as in `Quarantine`.
        num_workers: processes that decode.

    Raises:
        UserError: too many cannot be read.
    """
    rows = [row for shard in shards for row in layout.rows(shard)]
    source = _Rows(dataset, layout.num_clips, Quarantine(folder / QUARANTINE, retries, rank))
    for batch in DataLoader(source, batch_size=1, sampler=rows, num_workers=num_workers):
        broken = int(batch["broken"].item())
        errors.count(broken, 1 - broken)
        yield batch


def write(
    folder: Path,
    shard: int,
    layout: Layout,
    batches: Iterator[dict[str, Any]],
    encode: Callable[[dict[str, Any]], Mapping[str, torch.Tensor]],
) -> None:
    """Makes a shard of the next of `read`'s batches; it has its name when it is whole.

    Args:
        encode: what is kept of a batch of one clip, each (1, ...).

    Raises:
        UserError: tensors that do not fit float16, or a disk that is full; the shard is then not there.
    """
    rows = layout.rows(shard)
    path = shard_path(folder, shard)
    kept: list[int] = []
    try:
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as file, TarWriter(file, mtime=0) as tar:
                for row, batch in zip(rows, batches, strict=False):  # rows first: a batch of the next shard stays
                    if batch["broken"].item():
                        continue
                    tar.write({"__key__": f"{row:09d}", **_members(batch, encode(batch))})
                    kept.append(row - rows.start)
            places = np.zeros(len(rows), PLACE)
            for row, sample in zip(kept, read_members(str(temporary)), strict=True):
                record, tensors = sample["json"], sample["safetensors"]
                places[row] = (record.offset, record.size, tensors.offset, tensors.size)
            with atomic_path(path.with_suffix(".npy")) as index:
                np.save(index, places)
    except OSError as error:
        raise UserError(
            f"shard '{path}' cannot be written ({error.strerror or error}); make room, and go on with the same command: "
            "finished shards stand"
        ) from None


def finish(folder: Path, layout: Layout) -> int:
    """Writes the index of all shards, by which the folder is whole. By one process, after all others have written.

    Returns:
        Number of rows that are there.

    Raises:
        UserError: there is none, a shard is missing, or the index cannot be written.
    """
    left = missing(folder, layout)
    if left:
        raise UserError(
            f"{len(left)} of {layout.num_shards} shards are missing in '{folder}', the first is {left[0]}; "
            "let all processes write into one shared folder, and go on with the same command"
        )
    files = [shard_path(folder, shard).with_suffix(".npy") for shard in range(layout.num_shards)]
    places = np.concatenate([np.load(file) for file in files])
    count = int(np.count_nonzero(places["tensors_size"]))
    if count == 0:
        raise UserError(f"none of the {len(places)} clips could be read; see '{folder / QUARANTINE}' for why")
    try:
        with atomic_path(folder / INDEX) as temporary:
            np.save(temporary, places)
    except OSError as error:
        raise UserError(f"'{folder / INDEX}' cannot be written ({error.strerror}); make room, and go on") from None
    return count


class _Rows(Dataset[dict[str, Any]]):
    """The clips of a data set by row."""

    def __init__(self, dataset: ClipSource, num_clips: int, quarantine: Quarantine) -> None:
        self.dataset, self.num_clips, self.quarantine = dataset, num_clips, quarantine

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, index = divmod(row, self.num_clips)
        self.dataset.set_epoch(epoch)
        item = self.quarantine.try_read(self.dataset, row, index)
        return {**(item or {}), "row": row, "broken": int(item is None)}


def _members(batch: Mapping[str, Any], made: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    tensors = {}
    for name, part in made.items():
        one = part[0].half() if part.is_floating_point() else part[0]
        if not one.isfinite().all():
            raise UserError(f"{name} of clip '{batch['id'][0]}' do not fit float16; use sound encoders, in float32")
        tensors[name] = one.cpu().contiguous()
    record = {**{name: batch[name][0] for name in TEXTS}, "fps": batch["fps"].item()}
    return {"json": json.dumps(record, ensure_ascii=False).encode(), "safetensors": save(tensors)}
