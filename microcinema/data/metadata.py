"""The list of a data set: CSV, TSV, JSONL or Parquet with any column names, in memory as Arrow columns.

Arrow keeps a column as one block of bytes: ten million rows take about as much memory as their text, are read in seconds, and are shared by the
forked workers of a data loader (a list of dictionaries would take ten times as much, and every worker would copy it).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microcinema.data.text_table import FORMATS, read_texts
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_chunks

KEYS = ("id", "file", "page_dir", "caption", "description", "motion")
WEBVID = {"id": "videoid", "caption": "name"}


class Rows(Sequence[dict[str, str]]):
    """The rows of a list: `id`, `file` (empty where the list names none), `page_dir`, `caption`, `description`, `motion`.

    Empty or missing `description` (caption of the key frame) and `motion` are replaced by the caption.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, str]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = {name: self.table.column(name)[index].as_py() for name in self.table.column_names}
        return {
            "page_dir": "",
            "file": "",
            **row,
            "id": row.get("id") or row["file"],
            "description": row.get("description") or row["caption"],
            "motion": row.get("motion") or row["caption"],
        }

    def keys(self) -> pa.ChunkedArray:
        """What names the video of each row, however often an id occurs: `file`, or `id` where the list names no file."""
        columns = [self.table.column(name) for name in ("file", "id") if name in self.table.column_names]
        return pc.if_else(pc.equal(columns[0], ""), columns[-1], columns[0])

    def digest(self) -> str:
        """sha256 of the contents of the rows; it does not depend on how Arrow divides them into chunks."""
        return hash_chunks(self._chunks())

    def _chunks(self) -> Iterator[str | np.ndarray | memoryview]:
        for name in self.table.column_names:
            column = self.table.column(name)
            yield f"{name} {len(column)} "
            yield pc.binary_length(column).to_numpy().astype("<i8")
            for chunk in filter(len, column.chunks):
                _, offsets, characters = chunk.buffers()
                ends = np.frombuffer(offsets, "<i8")
                yield memoryview(characters or b"")[ends[chunk.offset] : ends[chunk.offset + len(chunk)]]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        return Rows(self.table.take(pa.array(indices, pa.int64())))


def read_rows(path: str | os.PathLike[str], columns: Mapping[str, str | None] | None = None) -> Rows:
    """Reads a list with `read_texts`.

    Args:
        path: .csv, .tsv, .jsonl (one object per line) or .parquet; .csv and .tsv name their columns in the first line.
        columns: names of the columns for `id`, `file`, `page_dir`, `caption`, `description` and `motion`; None or omitted: the column of the same
            name, if it exists. `caption` and one of `id` and `file` are required. Default: WebVid's `videoid` and `name`.

    Raises:
        UserError: a file that cannot be read, has no rows, lacks a column, or a row that names no video.
    """
    columns = WEBVID if columns is None else columns
    unknown = sorted(set(columns) - set(KEYS))
    if unknown:
        raise UserError(f"columns has no '{unknown[0]}'; choose from {', '.join(KEYS)}")
    names = {key: columns.get(key) or key for key in KEYS}
    table, available = read_texts(path, names.values())
    required = {name for key, name in names.items() if key == "caption" or columns.get(key)}
    missing = [name for name in names.values() if name in required and name not in available]
    if names["id"] not in available and names["file"] not in available and not missing:
        missing = ["id or file"]
    if missing:
        is_table = FORMATS[Path(path).suffix.lower()]  # with a delimiter
        advice = "the first line must name the columns" if is_table else "name them in columns"
        fault = f"lacks column {' and '.join(missing)} (it has: {', '.join(available) or 'none'})"
        raise UserError(f"list '{path}' {fault}; {advice}")
    names = {key: name for key, name in names.items() if name in available}
    rows = Rows(pa.table([table.column(name) for name in names.values()], names=list(names)))
    if len(rows) == 0:
        raise UserError(f"list '{path}' has no rows; give one with at least one video")
    nameless = pc.index(rows.keys(), "").as_py()
    if nameless >= 0:
        raise UserError(f"row {nameless + 1} of list '{path}' has neither an id nor a file; name its video")
    return rows
