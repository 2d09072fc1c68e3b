"""A folder of videos or pictures with a list of any format, as a data set of clips."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.config import types
from microcinema.data.buckets import Buckets
from microcinema.data.clip_reader import ClipReader
from microcinema.data.manifest import Manifest
from microcinema.data.metadata import read_rows
from microcinema.data.ordering import Ordering
from microcinema.data.source import ClipSource, spread
from microcinema.data.video_reader import VIDEOS
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import MachineError, UserError
from microcinema.utils.hashing import hash_array, hash_json

LAYOUTS = ("videos/{page_dir}/{id}", "{page_dir}/{id}", "{id}", "videos/{id}")
_MAX_ROOT_TESTS = 10_000  # rows, spread over the list, of which at least one must have a file
_MAX_FILE_SIZES = 1000  # in the fingerprint of a list: ten million sizes take a file server an hour
_TEXTS = ("caption", "description", "motion")


class ClipDataset(ClipSource):
    """Clips of `num_frames` frames, resized and center-cropped, with captions; `dataset[i]` depends on (seed, epoch, i) alone.

    A row of the list names its file, relative to `root`, or a WebVid id, whose file is searched in the usual layouts: `videos/{page_dir}/{id}.mp4`,
    `{page_dir}/{id}.mp4`, `{id}.mp4`, `videos/{id}.mp4`, and then with other suffixes of videos. Captions of the key frame (`description`) and of
    the motion default to the caption.

    Args:
        metadata: path of the list: .csv, .tsv, .jsonl or .parquet (data/text_table.py).
        root: folder of the files; None: only cached latents are available.
        num_frames: 1 for pictures and for single frames of videos.
        fps: frames per second of a clip; None takes each file's own rate.
        resolution: size of the square, or (height, width).
        decoder: "pyav" or "decord".
        clip_position: "random", from the seed, "first" or "center".
        multiple_of: divisor of height and width: the VAE's downsampling, times the UNet's for training.
        columns: names of the list's columns, by `id`, `file`, `page_dir`, `caption`, `description`, `motion`; default: WebVid's.
        watermark: arguments of data/watermark.py, applied to clips with a watermark; None: nothing is done.
        watermark_score: clips to which the manifest gives a lower score have no watermark; without a manifest all have one.
        timeout: seconds for a clip, after which its decoder is killed (data/decoder_process.py); None: no limit.
        manifest: of `microcinema prepare check`: clips that it rejects are skipped, clips that it does not contain are kept.
        buckets: shapes (num_frames, height, width), from which each clip gets the best by its size in the manifest; None: one shape for all.
        bucket_run: consecutive samples from one bucket, a multiple of the batch size.

    Raises:
        UserError: an unreadable list, a missing column, no file of the list under root, a value out of range; from `dataset[i]`, a video that
            is missing, damaged or too short, or took too long.
    """

    def __init__(
        self,
        metadata: types.AnyPath,
        root: types.AnyPath | None,
        num_frames: types.Size,
        fps: types.Fps | None,
        resolution: types.Resolution,
        decoder: types.Decoder = "pyav",
        clip_position: types.ClipPosition = "random",
        seed: types.Seed = 0,
        multiple_of: types.Size = 8,
        columns: Mapping[str, types.Name | None] | None = None,
        watermark: Watermark | None = None,
        watermark_score: types.Number = 0.5,
        timeout: types.Positive | None = None,
        manifest: types.AnyPath | None = None,
        buckets: types.Shapes | None = None,
        bucket_run: types.Count = 64,
    ) -> None:
        self.reader = ClipReader(
            num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout
        )
        self.clip_position = clip_position
        self.root = None if root is None else Path(root)
        self.rows = read_rows(metadata, columns)
        self.skipped: dict[str, int] = {}
        self.buckets: Buckets | None = None
        self.same_shape_run = bucket_run
        self._has_watermark: np.ndarray | None = None  # None: all clips
        if buckets is not None and manifest is None:
            raise UserError("buckets need the sizes of the clips; set manifest, made with `microcinema prepare check`")
        if manifest is not None:
            self._apply_manifest(Manifest(manifest), watermark_score, buckets)
        self._check_root(metadata)

    def _apply_manifest(
        self, manifest: Manifest, watermark_score: float, shapes: Sequence[tuple[int, int, int]] | None
    ) -> None:
        manifest_rows = manifest.find(self.rows.keys())
        listed = manifest_rows >= 0
        keep = ~listed | manifest.column("accepted")[manifest_rows]
        self.skipped["rejected by the manifest"] = int((~keep).sum())
        buckets = np.zeros(len(keep), dtype=np.int64)
        if shapes is not None:
            for shape in shapes:
                self.reader.check_size(*shape[1:])
            measures = [manifest.column(name)[manifest_rows] for name in ("height", "width", "num_frames", "duration")]
            buckets = np.where(listed, Buckets.assign(shapes, self.reader.fps, *measures), -1)
            self.skipped["fit no bucket"] = int((keep & (buckets < 0)).sum())
            keep &= buckets >= 0
        if not keep.any():
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise UserError(f"manifest '{manifest.path}' leaves no clip of {len(keep)} ({reasons}); relax the check")
        if not keep.all():
            self.rows = self.rows.take(np.flatnonzero(keep))
        if shapes is not None:
            self.buckets = Buckets(shapes, buckets[keep])
        score = np.where(listed, manifest.column("watermark")[manifest_rows], np.nan)[keep]
        self._has_watermark = ~(score < watermark_score)

    def _check_root(self, metadata: str | os.PathLike[str]) -> None:
        if self.root is None:
            return
        indices = spread(len(self), _MAX_ROOT_TESTS)
        if not any(self._find(self.rows[index]) for index in indices):
            paths = [str(path) for index in indices[:3] for path in self._candidates(self.rows[index])][:3]
            among = "" if len(indices) == len(self) else f" among {len(indices)} rows spread over it"
            tried = f"tried first: {', '.join(paths)}; check root"
            raise UserError(f"root '{self.root}' holds no video of '{metadata}'{among}; {tried}")

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        return self.buckets.orderings(key) if self.buckets else super().orderings(key)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip: `video` float32 (f, 3, h, w) in [-1, 1]; `caption`, `description`, `motion` str; `fps` float; `index` int; `id` str."""
        row, has_watermark = self.rows[index], self._has_watermark is None or bool(self._has_watermark[index])
        shape = self.buckets.shape(index) if self.buckets else None
        video, fps = self.reader.read(self._file(row), self.epoch, index, shape, has_watermark)
        captions = {name: self.reader.caption(row[name], has_watermark) for name in _TEXTS}
        return {"video": video, **captions, "fps": fps, "index": index, "id": row["id"]}

    def id(self, index: int) -> str:
        return self.rows[index]["id"]

    def key(self, index: int) -> str:
        row = self.rows[index]
        return row["file"] or row["id"]

    def captions(self, index: int) -> dict[str, str]:
        row = self.rows[index]
        return {name: row[name] for name in _TEXTS}

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ClipDataset", Sequence[int]]:
        small = copy.copy(self)
        small.rows, small._has_watermark, small.buckets = self.rows.take(indices), None, None
        return small, range(len(indices))

    def file(self, index: int) -> Path:
        return self._file(self.rows[index])

    def fingerprint(self) -> dict[str, Any]:
        """The transform, hashes of the list with its buckets and watermarks, and, if the files are here, the sizes of up to 1000 of them."""
        arrays = (self._has_watermark, self.buckets and self.buckets.assignment)
        content = [self.rows.digest(), *(None if array is None else hash_array(array) for array in arrays)]
        shapes = self.buckets.shapes if self.buckets else None
        fingerprint = {**self.reader.transform, "buckets": shapes, "list": hash_json(content)}
        if self.root is not None:
            paths = {index: self._find(self.rows[index]) for index in spread(len(self), _MAX_FILE_SIZES)}
            fingerprint["files"] = {index: path.stat().st_size for index, path in paths.items() if path is not None}
        return fingerprint

    def _file(self, row: dict[str, str]) -> Path:
        if self.root is None:
            raise UserError("the data set has no root; set data.root to the folder of the videos")
        path = self._find(row)
        if path is None:
            try:
                empty = not next(os.scandir(self.root), None)
            except OSError:
                empty = True
            if empty:
                raise MachineError(f"root '{self.root}' is gone or empty; mount its disk, and run the command again")
            paths = ", ".join(str(path) for path in self._candidates(row)[: len(LAYOUTS)])
            raise UserError(f"video '{row['id']}' is missing; tried {paths}; fetch it or take it off the list")
        return path

    def _find(self, row: dict[str, str]) -> Path | None:
        return next((path for path in self._candidates(row) if path.is_file()), None)

    def _candidates(self, row: dict[str, str]) -> list[Path]:
        if self.root is None:
            return []
        if row["file"]:
            return [self.root / row["file"]]
        layouts = LAYOUTS if row["page_dir"] else [layout for layout in LAYOUTS if "page_dir" not in layout]
        return [self.root / f"{layout.format(**row)}{suffix}" for suffix in VIDEOS for layout in layouts]
