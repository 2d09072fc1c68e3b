"""The manifest of `microcinema prepare check`: measures and verdict of each clip, in a Parquet file that training reads."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from microcinema.utils.errors import UserError, user_errors

# One row per checked clip. Measures of a clip that could not be decoded are null.
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "file": pa.string(),
        "key": pa.string(),  # by which training finds the row, see `ClipSource.key`
        "decodable": pa.bool_(),
        "reason": pa.string(),  # why it could not be decoded
        "num_frames": pa.int32(),
        "fps": pa.float32(),
        "width": pa.int32(),
        "height": pa.int32(),
        "duration": pa.float32(),  # seconds
        "motion": pa.float32(),  # mean absolute difference of neighboring frames, levels of 255
        "static": pa.bool_(),
        "cut": pa.float32(),  # seconds from the first frame to the strongest cut; null: none
        "watermark": pa.float32(),  # correlation of its persistent edges with those that many clips share, -1 to 1
        "hashes": pa.list_(pa.uint64()),  # of its first, middle and last frame
        "duplicate_of": pa.string(),  # id of the first clip with the same content; null: none
        "accepted": pa.bool_(),
        "rejected_for": pa.string(),  # all reasons, separated by commas
    }
)


class Manifest:
    """A manifest of the clips in a data set; a UserError if the Parquet file cannot be read, or is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        columns = ["key", "accepted", "num_frames", "fps", "width", "height", "duration", "watermark"]
        advice = "make one with `microcinema prepare check`"
        with user_errors(f"manifest '{self.path}' cannot be read ({{reason}}); {advice}"):
            self.table = pyarrow.parquet.read_table(self.path, columns=columns)
        missing = [name for name in columns if name not in self.table.column_names]
        if missing:
            raise UserError(f"'{self.path}' is no manifest, it lacks {', '.join(missing)}; make one with prepare check")

    def find(self, keys: pa.ChunkedArray) -> np.ndarray:
        """The manifest's row of each key, -1 where it has none; a UserError if it has none at all."""
        manifest_keys = self.table.column("key").cast(pa.large_string()).combine_chunks()
        rows = pc.fill_null(pc.index_in(keys.cast(pa.large_string()), value_set=manifest_keys), -1)
        if pc.max(rows).as_py() == -1:
            raise UserError(f"manifest '{self.path}' names no clip of this data; make one of it with prepare check")
        return rows.to_numpy().astype(np.int64)

    def column(self, name: str) -> np.ndarray:
        """A column; missing numbers are NaN, missing booleans False."""
        values = self.table.column(name)
        if pa.types.is_boolean(values.type):
            return pc.fill_null(values, False).to_numpy()
        return values.cast(pa.float64()).to_numpy()
