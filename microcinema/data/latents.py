"""Cached latents: clips encoded once, in WebDataset shards with the fingerprint of everything that their contents depend on.

A folder of latents holds

- `000000.tar`, ...: shard k has the rows from `k * clips_per_shard` on. A row is an item of the data set in one epoch; its sample is a `.json`
  (captions, id, fps) and a `.safetensors` (`latents` and the other cached tensors, float16).
- `000000.npy`, ...: the location of each row in the shard (`LOCATION`); written before the shard gets its name, so a shard with its name is complete.
- `index.npy`: all locations in one file, which readers map into memory. It is written last.
- `000000.motion.npy`, ..., `motion.npy`: the motion score of each row (data/motion_score.py), where a model asked for them.
- `fingerprint.json`: the layout of the rows, and what their contents depend on.
- `empty.safetensors`: encoder outputs of the empty caption, which replace those of dropped captions.
- `quarantine/`: clips that could not be read; the shards have no sample of these.
"""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from microcinema.data.quarantine import read_quarantine
from microcinema.data.source import ClipSource, ClipWrapper
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.fingerprint import FINGERPRINT

INDEX, EMPTY, QUARANTINE, SCORES = "index.npy", "empty.safetensors", "quarantine", "motion.npy"
LOCATION = np.dtype([("json", "<u8"), ("json_size", "<u4"), ("tensors", "<u8"), ("tensors_size", "<u4")])
"""Byte offsets in a shard and sizes of the two files of a row; all zero: the clip is broken."""
_MAX_OPEN_SHARDS = 64  # by one process


@dataclass(frozen=True)
class Layout:
    """The distribution of rows over shards."""

    num_clips: int
    epochs_cached: int  # row `e * num_clips + i` is item i in epoch e
    clips_per_shard: int  # rows of each shard except the last

    @property
    def num_rows(self) -> int:
        return self.num_clips * self.epochs_cached

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.clips_per_shard)

    def rows(self, shard: int) -> range:
        first = shard * self.clips_per_shard
        return range(first, min(first + self.clips_per_shard, self.num_rows))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.tar"


def read_fingerprint(folder: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout of a folder of latents, and what each cached tensor depends on; a UserError if it holds none."""
    file = folder / FINGERPRINT
    if not file.is_file():
        advice = "make them with `microcinema prepare latents`, or set cached_latents=null"
        raise UserError(f"'{folder}' holds no latents ({FINGERPRINT} is missing); {advice}")
    with user_errors(f"'{file}' is damaged ({{reason}}); delete the folder, make it again"):
        record = json.loads(file.read_text(encoding="utf-8"))
        return Layout(**record["layout"]), record["contents"]


class EncodedClips(ClipWrapper):
    """The clips of a data set with cached `latents` (f, c, h, w) in place of `video`, in the same order.

    Items also have those of `text` (n, d), `motion_tokens` (k, e), `image_tokens` (p, e), `keyframe` uint8 (3, H, W), `flow` (f-1, 2, h, w) and
    `flow_valid` bool (f-1, h, w) that were cached; all others are float16. Where scores were, they have `motion_score`. Reading an item costs
    its own bytes alone.

    Args:
        path: a folder that `microcinema prepare latents` wrote.
        dataset: the clips that were encoded, which give the order of training; their files may be gone.

    Attributes:
        contents: what each cached tensor depends on, to be compared with the run (training/cached_latents_check.py).
        empty_tokens: `text` (1, n, d) and `motion_tokens` (1, k, e) of the empty caption, if cached.

    Raises:
        UserError: no latents there, incomplete or damaged ones; from an item, a clip that is broken or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], dataset: ClipSource) -> None:
        super().__init__(dataset)
        self.folder = Path(path)
        self.layout, self.contents = read_fingerprint(self.folder)
        self._files: OrderedDict[int, int] = OrderedDict()  # file descriptors of open shards
        self._locations, self.motion_scores = self._map_index()
        self._check_shards()
        records = read_quarantine(self.folder / QUARANTINE)
        self._broken = {record["sample_index"]: record["reason"] for record in records}
        file = self.folder / EMPTY
        self.empty_tokens = load_file(file) if file.is_file() else {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch % self.layout.epochs_cached

    def check_processes(self, count: int) -> None:
        """Any number of processes can read any shard of latents."""

    def __len__(self) -> int:
        return self.layout.num_clips

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.epoch * len(self) + index
        location = self._locations[row]
        if not location["tensors_size"]:
            reason = self._broken.get(row, "unknown")
            raise UserError(f"clip '{self.id(index)}' could not be read when the latents were made: {reason}")
        shard = row // self.layout.clips_per_shard
        start, tensors_start = int(location["json"]), int(location["tensors"] - location["json"])
        fault = f"clip {row} of '{shard_path(self.folder, shard)}' is damaged ({{reason}})"
        with user_errors(f"{fault}; make the shard again", ValueError, SafetensorError):  # a fault of the disk passes
            data = os.pread(self._open(shard), tensors_start + int(location["tensors_size"]), start)
            record = json.loads(data[: int(location["json_size"])])
            score = {} if self.motion_scores is None else {"motion_score": float(self.motion_scores[row])}
            return {**load(data[tensors_start:]), **record, **score, "index": index}

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(shard_path(self.folder, shard), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _map_index(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The locations, and the motion scores, if there are any."""
        index, rows, scores = self.folder / INDEX, self.layout.num_rows, None
        if not index.is_file():
            finished = sum(shard_path(self.folder, shard).is_file() for shard in range(self.layout.num_shards))
            state = f"incomplete: {finished} of {self.layout.num_shards} shards are finished"
            raise UserError(f"latents '{self.folder}' are {state}; continue `microcinema prepare latents`")
        with user_errors(f"'{index}' is damaged ({{reason}}); make the latents again"):
            locations = np.load(index, mmap_mode="r")
            if (self.folder / SCORES).is_file():
                scores = np.load(self.folder / SCORES, mmap_mode="r")
        if locations.dtype != LOCATION or len(locations) != rows or (scores is not None and scores.shape != (rows,)):
            names = f"{len(locations)} clips of {rows}, or other scores"
            raise UserError(f"'{index}' names {names}; make the latents again")
        return locations, scores

    def _check_shards(self) -> None:
        for shard in range(self.layout.num_shards):
            rows, path = self.layout.rows(shard), shard_path(self.folder, shard)
            locations = self._locations[rows.start : rows.stop]
            expected_size = int((locations["tensors"] + locations["tensors_size"]).max())
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < expected_size:
                problem = "missing" if size is None else f"cut off at {size} bytes of {expected_size}"
                advice = "copy it again, or delete it and continue `microcinema prepare latents`"
                raise UserError(f"shard '{path}' is {problem}; {advice}")

    def __getstate__(self) -> dict[str, Any]:
        # Open and mapped files do not travel to another process; they are opened there.
        return {**self.__dict__, "_files": OrderedDict(), "_locations": None, "motion_scores": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._locations, self.motion_scores = self._map_index()
