"""Broken clips in training: tried again, written down, replaced by a clip that the seed decides, and counted.

What takes the place of a broken clip is no accident: its number in the global order and the seed decide (data/numbering.py). So that
a run which is resumed does the same again even where a failure came and went, as on a busy file server, what was once written down for a number
stands: it is not tried again.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from microcinema.utils.errors import UserError

SUBSTITUTES = 20  # in a row for one number; more are no accident of the data
_PAUSE = 0.1  # seconds before the first try again; twice that before the next


class Quarantine:
    """The files `rank-*.jsonl` in a folder, one line for each broken clip: number, index, id, reason, tries, time.

    Each process of a run has its own file, to which its workers append whole lines by single writes, so neither workers nor processes get into
    each other's way, on a network file system either.

    Args:
        folder: made when the first clip breaks.
        retries: more tries of a clip before it counts as broken.
        rank: of this process.

    Raises:
        UserError: a file in the folder that is no quarantine.
    """

    def __init__(self, folder: str | os.PathLike[str], retries: int = 1, rank: int = 0) -> None:
        self.folder, self.retries = Path(folder), retries
        self.path = self.folder / f"rank-{rank:05d}.jsonl"
        _end_line(self.path)
        self.reason = "recorded by an earlier run"
        self._known = {(record["number"], record["index"]) for record in read_quarantine(self.folder)}

    def read(
        self, dataset: Any, number: int, index: int, substitute: Callable[[int], int]
    ) -> tuple[dict[str, Any], int]:
        """`dataset[index]`, or the first substitute that can be read; and how many could not.

        Args:
            number: of the clip in the global order.
            substitute: the item for the first, second, ... attempt after `index` itself.

        Raises:
            UserError: a long row of substitutes is broken as well.
        """
        for attempt in range(1 + SUBSTITUTES):
            index = substitute(attempt) if attempt else index
            item = self.attempt(dataset, number, index)
            if item is not None:
                return item, attempt
        raise UserError(
            f"clip {number} and {SUBSTITUTES} that should have stood in for it are broken (last: {self.reason}); "
            f"see '{self.folder}', check the data"
        )

    def attempt(self, dataset: Any, number: int, index: int) -> dict[str, Any] | None:
        """`dataset[index]`, or None if it cannot be read or was written down for this number before; `reason` then says why."""
        if (number, index) in self._known:
            return None
        try:
            return self._tried(dataset, index)
        except UserError as error:
            self.reason = str(error)
            self._record(dataset, number, index, self.reason)
            return None

    def _tried(self, dataset: Any, index: int) -> dict[str, Any]:
        for pause in range(self.retries):
            try:
                return dataset[index]
            except UserError:
                time.sleep(_PAUSE * 2**pause)
        return dataset[index]

    def _record(self, dataset: Any, number: int, index: int, reason: str) -> None:
        record = {
            "number": number,
            "index": index,
            "id": str(dataset.id(index)) if hasattr(dataset, "id") else None,
            "reason": reason,
            "tries": 1 + self.retries,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)
        self._known.add((number, index))


def read_quarantine(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a quarantine, of every process; of a folder that is not there, none.

    Raises:
        UserError: a line that is no record.
    """
    records = []
    for path in sorted(Path(folder).glob("rank-*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
                records.append({**record, "number": int(record["number"]), "index": int(record["index"])})
            except (ValueError, KeyError, TypeError):
                raise UserError(f"line {number} of '{path}' is no record of a broken clip; delete the line") from None
    return records


def _end_line(path: Path) -> None:
    """Takes off the part of a line that a killed process may have left."""
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


class ErrorRate:
    """Counts broken clips among those that a process reads, and stops the run when they are too many.

    Args:
        most: the share of broken clips among those read that is borne.
        window: clips, the last so many of which are judged.
        first: clips before which nothing is judged.

    Attributes:
        total: broken clips so far.
    """

    def __init__(self, most: float, window: int = 1000, first: int = 100) -> None:
        self.most, self.first = most, first
        self.total = 0
        self._recent: deque[bool] = deque(maxlen=window)

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, of clips and as many `broken` ones as each stands in for.

        Raises:
            UserError: as `count`.
        """
        for batch in batches:
            for broken in batch["broken"].tolist():
                self.count(broken, 1)
            yield batch

    def count(self, broken: int, sound: int) -> None:
        """Adds clips that were read.

        Raises:
            UserError: more than `most` of the last ones are broken.
        """
        self.total += broken
        self._recent.extend([True] * broken + [False] * sound)
        read, wrong = len(self._recent), sum(self._recent)
        if read >= self.first and wrong > self.most * read:
            raise UserError(
                f"{wrong} of the last {read} clips read are broken, more than max_error_rate={self.most:g}; "
                "see the quarantine for which and why, and take them off with `microcinema prepare check`"
            )
