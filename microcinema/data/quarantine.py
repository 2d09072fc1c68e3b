"""Broken clips: retried, recorded in a quarantine, replaced by clips that the seed determines, and counted.

Seed and sample index determine the replacement of a broken clip (data/ordering.py). A recorded clip is not tried again under the same sample
index, so that a resumed run makes the same replacements even if the failure was temporary, as on a busy file server.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path

MAX_REPLACEMENTS = 20  # tried for one sample; if all are broken, the data are
FEW = 4  # broken clips of which the console says nothing, and that stop no run unless its limit is zero
_FIRST_PAUSE = 0.1  # seconds before the first retry, doubled before each further one


class Quarantine:
    """The files `rank-*.jsonl` in a folder, one line per broken clip: sample_index, index, id, reason, tries, time.

    Each process has its own file, to which its workers append whole lines by single writes, so processes and workers do not interfere, even on a
    network file system. A clip counts as broken after `retries` further tries. A damaged quarantine file in the folder is a UserError.
    """

    def __init__(self, folder: str | os.PathLike[str], retries: int = 1, rank: int = 0) -> None:
        self.folder, self.retries = Path(folder), retries
        self.path = self.folder / f"rank-{rank:05d}.jsonl"
        if self.path.is_file():  # a killed process may have left a part of a line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.reason = "recorded by an earlier run"
        self._recorded = {(record["sample_index"], record["index"]) for record in read_quarantine(self.folder)}

    def read(
        self, dataset: ClipSource, sample_index: int, index: int, replacement: Callable[[int], int]
    ) -> tuple[dict[str, Any], int]:
        """`dataset[index]`, or the first of the replacements 1, 2, ... that can be read; and the number of broken clips before it; a
        UserError if all replacements are broken as well."""
        for attempt in range(1 + MAX_REPLACEMENTS):
            index = replacement(attempt) if attempt else index
            item = self.try_read(dataset, sample_index, index)
            if item is not None:
                return item, attempt
        fault = f"clip {sample_index} and {MAX_REPLACEMENTS} replacements are broken (last: {self.reason})"
        raise UserError(f"{fault}; see '{self.folder}', check the data")

    def try_read(self, dataset: ClipSource, sample_index: int, index: int) -> dict[str, Any] | None:
        """`dataset[index]`, or None if it cannot be read or is recorded under this sample index; `reason` then says why.

        Faults of the machine, which are no UserError, pass, and are not recorded.
        """
        if (sample_index, index) in self._recorded:
            return None
        for retry in range(1 + self.retries):
            try:
                return dataset[index]
            except UserError as error:
                self.reason = str(error)
                if retry < self.retries:
                    time.sleep(_FIRST_PAUSE * 2**retry)
        self._record(dataset, sample_index, index)
        return None

    def _record(self, dataset: ClipSource, sample_index: int, index: int) -> None:
        record = {"sample_index": sample_index, "index": index, "id": dataset.id(index), "reason": self.reason}
        record |= {"tries": 1 + self.retries, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            file.write(_line(record))
        self._recorded.add((sample_index, index))


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def forget_records(folder: str | os.PathLike[str], forget: Callable[[int], bool]) -> None:
    """Removes the records of some sample indices, so that their clips are tried again. By one process, before any other writes."""
    records = read_quarantine(folder)
    kept = [record for record in records if not forget(record["sample_index"])]
    if len(kept) < len(records):
        paths = sorted(Path(folder).glob("rank-*.jsonl"))
        with atomic_path(paths[0]) as temporary:
            temporary.write_bytes(b"".join(map(_line, kept)))
        for path in paths[1:]:
            path.unlink()


def read_quarantine(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of all processes; none if the folder does not exist; a UserError for a damaged line."""
    records = []
    for path in sorted(Path(folder).glob("rank-*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            with user_errors(f"line {number} of '{path}' is no record of a broken clip; delete the line"):
                record = json.loads(line)
                records.append({**record, **{key: int(record[key]) for key in ("sample_index", "index")}})
    return records


class ErrorRate:
    """Counts broken clips among those that a process reads, in `total` and among the last `window`; stops the run if there are too many.

    Args:
        max_error_rate: accepted fraction of broken clips among `window` clips, which holds from the first clip on.
        quarantine: folder that the console names once there are more than a few, and then at every doubling; None: it stays silent.
        window: at most all clips that are read.
    """

    def __init__(self, max_error_rate: float, quarantine: Path | None = None, window: int = 1000) -> None:
        self.max_error_rate, self.quarantine = max_error_rate, quarantine
        self.limit = max(FEW, max_error_rate * window) if max_error_rate else 0
        self.total, self._told = 0, FEW
        self._recent: deque[bool] = deque(maxlen=window)  # whether each clip was broken

    @property
    def exceeded(self) -> bool:
        """Whether more clips than the limit are broken."""
        return sum(self._recent) > self.limit

    def watch(self, batches: Iterable[dict[str, Any]], replaced: bool = True) -> Iterator[dict[str, Any]]:
        """The same batches; counts their clips and the `broken` ones, which those replace or, if not `replaced`, are themselves."""
        for batch in batches:
            for broken in batch["broken"].tolist():
                self.count(broken, 1 if replaced else 1 - broken)
            yield batch

    def count(self, broken: int, sound: int) -> None:
        """Adds clips; a UserError if more than the limit of the last `window` are broken."""
        self.total += broken
        self._recent.extend([True] * broken + [False] * sound)
        if self.exceeded:
            share = f"{sum(self._recent)} of the last {len(self._recent)} clips are broken"
            allowed = f"more than max_error_rate={self.max_error_rate:g} allows of {self._recent.maxlen}"
            raise UserError(
                f"{share}, {allowed}; see the quarantine, and exclude them with `microcinema prepare check`"
            )
        if self.quarantine is not None and self.total > self._told:
            self._told = 2 * self.total
            tqdm.write(f"{self.total} broken clips so far; '{self.quarantine}' names them", file=sys.stderr)
