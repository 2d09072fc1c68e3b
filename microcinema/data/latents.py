"""Clips encoded once, kept in WebDataset shards with the fingerprint of everything that made them.

A folder of latents has

- `000000.tar`, ...: shard k holds rows `k * clips_per_shard` and on. A row is an item of the data set in a pass over it; its sample is a `.json` (captions,
  id, fps) and a `.safetensors` (`latents` and what else was kept, float16).
- `000000.npy`, ...: where in the shard each row lies (`PLACE`); written before the shard gets its name, so a shard that has its name is finished.
- `index.npy`: all of these in one, which readers map. It is written last.
- `fingerprint.json`: how the rows are laid out, and what decides their contents.
- `empty.safetensors`: tokens of the empty caption, which stand for dropped ones.
- `quarantine/`: clips that could not be read; of these the shards have no sample.
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
from microcinema.utils.errors import UserError
from microcinema.utils.fingerprint import FINGERPRINT

INDEX, EMPTY, QUARANTINE = "index.npy", "empty.safetensors", "quarantine"
PLACE = np.dtype([("json", "<u8"), ("json_size", "<u4"), ("tensors", "<u8"), ("tensors_size", "<u4")])
"""Offsets in a shard and sizes, in bytes, of the two members of a row; all zero: it has none."""
_OPEN = 64  # shards that a process holds open


@dataclass(frozen=True)
class Layout:
    """Which row is in which shard.

    Attributes:
        num_clips: of the data set.
        passes: over the data set; row `p * num_clips + i` is item i in pass p.
        clips_per_shard: rows of each shard but the last.
    """

    num_clips: int
    passes: int
    clips_per_shard: int

    @property
    def num_rows(self) -> int:
        return self.num_clips * self.passes

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.clips_per_shard)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        first = shard * self.clips_per_shard
        return range(first, min(first + self.clips_per_shard, self.num_rows))


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"{shard:06d}.tar"


def read_fingerprint(folder: Path) -> tuple[Layout, dict[str, Any]]:
    """How the rows of a folder of latents are laid out, and what made them.

    Raises:
        UserError: the folder holds no latents.
    """
    try:
        contents = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
        return Layout(**contents["layout"]), contents["parts"]
    except FileNotFoundError:
        raise UserError(
            f"'{folder}' holds no latents ({FINGERPRINT} is missing); make them with `microcinema prepare latents`, or set cached_latents=null"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{folder / FINGERPRINT}' is damaged ({error}); delete the folder, make it again") from None


class EncodedClips(ClipWrapper):
    """The clips of a data set with `latents` (f, c, h, w) in the place of `video`, and in the same order.

    An item also has what else was kept, of `text` (n, d), `motion_tokens` (k, e), `image_tokens` (p, e), `keyframe` uint8 (3, H, W), `flow`
    (f-1, 2, h, w) and `flow_valid` bool (f-1, h, w); all others are float16. A clip that could not be read when the latents were made cannot be
    read here.

    An item is read from its place in its shard, which costs its own bytes; worker processes share the index.

    Args:
        path: a folder that `microcinema prepare latents` wrote.
        dataset: the clips that were encoded, which give the order of training; their files may be gone.

    Attributes:
        parts: the fingerprint, to be compared with training's (training/fingerprint.py).
        empty_tokens: `text` (1, n, d) and `motion_tokens` (1, k, e) of the empty caption, if cached.

    Raises:
        UserError: no latents there, not all of them, or damaged ones; from an item, a clip that is not there or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], dataset: ClipSource) -> None:
        super().__init__(dataset)
        self.folder = Path(path)
        self.layout, self.parts = read_fingerprint(self.folder)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._places = self._map()
        self._check_shards()
        self._broken = {
            record["sample_index"]: record["reason"] for record in read_quarantine(self.folder / QUARANTINE)
        }
        file = self.folder / EMPTY
        self.empty_tokens = load_file(file) if file.is_file() else {}

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass over the data set read the clips of the next pass that was encoded; after the last comes the first."""
        self.epoch = epoch % self.layout.passes

    def check_processes(self, count: int) -> None:
        """Any number of processes can read any shard of latents."""

    def __len__(self) -> int:
        return self.layout.num_clips

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.epoch * len(self) + index
        place = self._places[row]
        if not place["tensors_size"]:
            reason = self._broken.get(row, "unknown")
            raise UserError(f"clip '{self.id(index)}' could not be read when the latents were made: {reason}")
        shard = row // self.layout.clips_per_shard
        start, between = int(place["json"]), int(place["tensors"] - place["json"])
        try:
            data = os.pread(self._open(shard), between + int(place["tensors_size"]), start)
            record = json.loads(data[: int(place["json_size"])])
            return {**load(data[between:]), **record, "index": index}
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"clip {row} of '{shard_path(self.folder, shard)}' is damaged ({error}); delete the shard and make it again"
            ) from None

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(shard_path(self.folder, shard), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _map(self) -> np.ndarray:
        try:
            places = np.load(self.folder / INDEX, mmap_mode="r")
        except FileNotFoundError:
            made = sum(shard_path(self.folder, shard).is_file() for shard in range(self.layout.num_shards))
            raise UserError(
                f"latents '{self.folder}' are not finished: {made} of {self.layout.num_shards} shards are; "
                "go on with the same `microcinema prepare latents`"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"'{self.folder / INDEX}' is damaged ({error}); make the latents again") from None
        if places.dtype != PLACE or len(places) != self.layout.num_rows:
            raise UserError(
                f"'{self.folder / INDEX}' names {len(places)} clips of {self.layout.num_rows}; make the latents again"
            )
        return places

    def _check_shards(self) -> None:
        for shard in range(self.layout.num_shards):
            rows, path = self.layout.rows(shard), shard_path(self.folder, shard)
            places = self._places[rows.start : rows.stop]
            whole = int((places["tensors"] + places["tensors_size"]).max())
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < whole:
                found = "missing" if size is None else f"cut off at {size} bytes of {whole}"
                raise UserError(
                    f"shard '{path}' is {found}; copy it again, or delete it and go on with `microcinema prepare latents`"
                )

    def __getstate__(self) -> dict[str, Any]:
        # Neither files nor mapped ones travel to another process; they are opened there.
        return {**self.__dict__, "_files": OrderedDict(), "_places": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._places = self._map()
