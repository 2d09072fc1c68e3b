"""A folder of videos, or of pictures, with a list of any format, as a data set of clips."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microcinema.data.buckets import Buckets
from microcinema.data.clip_reader import ClipReader
from microcinema.data.manifest import Manifest
from microcinema.data.metadata import read_rows
from microcinema.data.ordering import Ordering
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_array, hash_json

LAYOUTS = ("videos/{page_dir}/{id}.mp4", "{page_dir}/{id}.mp4", "{id}.mp4", "videos/{id}.mp4")
_TRIES = 10_000  # rows, spread over the list, of which one has to be there
_MEASURED = 1000  # files whose sizes tell a list from one of other files


class ClipDataset(ClipSource):
    """Clips of `num_frames` frames, resized, cropped in the centre, with captions; `dataset[i]` depends on (seed, epoch, i) alone.

    A row of the list names its file, relative to `root`, or WebVid's id, whose file is searched in the layouts in use:
    `videos/{page_dir}/{id}.mp4`, `{page_dir}/{id}.mp4`, `{id}.mp4`, `videos/{id}.mp4`. Captions for the key frame (`description`) and for the
    motion default to the caption. PyTorch's default collate function batches the items.

    Args:
        metadata: path of the list: .csv, .tsv, .jsonl or .parquet (data/metadata.py).
        root: folder of the files; None: they are not here, as where a model trains from latents alone.
        num_frames: frames of a clip; 1 for pictures, and for single frames of videos.
        fps: frames per second of a clip, picked by time; None takes each file's own rate.
        resolution: size of the square, or (height, width).
        decoder: "pyav" or "decord".
        clip_position: which part of the video: "random", "first" or "center".
        seed: of the random choice.
        multiple_of: what height and width must divide by: the VAE's downsampling, times the UNet's for training.
        columns: names of the list's columns, by `id`, `file`, `page_dir`, `caption`, `description`, `motion`; default: WebVid's.
        watermark: arguments of data/watermark.py; None: nothing is done. With a manifest, clips whose score is under `watermark_score` are
            taken to bear none.
        watermark_score: see there.
        timeout: seconds for a clip, after which its decoder is ended (data/isolated.py); None: no limit.
        manifest: of `microcinema prepare check`: clips that it rejects are left out, clips that it does not know are kept.
        buckets: shapes (num_frames, height, width), of which each clip takes the one that suits it best, by what the manifest says of it; None: all
            clips have the one shape above.
        bucket_run: numbers in a row that share a bucket: a multiple of the batch size.

    Raises:
        UserError: an unreadable list, a column that is missing, no file of the list under root, a value out of range; and from
            `dataset[i]`, a video that is missing, damaged or too short, or that took too long.
    """

    def __init__(
        self,
        metadata: str | os.PathLike[str],
        root: str | os.PathLike[str] | None,
        num_frames: int,
        fps: float | None,
        resolution: int | tuple[int, int],
        decoder: str = "pyav",
        clip_position: str = "random",
        seed: int = 0,
        multiple_of: int = 8,
        columns: Mapping[str, str | None] | None = None,
        watermark: Mapping[str, Any] | None = None,
        watermark_score: float = 0.5,
        timeout: float | None = None,
        manifest: str | os.PathLike[str] | None = None,
        buckets: Sequence[tuple[int, int, int]] | None = None,
        bucket_run: int = 64,
    ) -> None:
        self.reader = ClipReader(
            num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout
        )
        self.clip_position, self.seed = clip_position, seed
        self.root = None if root is None else Path(root)
        self.rows = read_rows(metadata, columns)
        self.skipped: dict[str, int] = {}
        self._marked: np.ndarray | None = None
        self.buckets: Buckets | None = None
        self.same_shape_run = bucket_run
        if buckets is not None and manifest is None:
            raise UserError("buckets need the sizes of the clips; set manifest, made with `microcinema prepare check`")
        if manifest is not None:
            self._use(Manifest(manifest), watermark_score, buckets, bucket_run)
        self._check_root(metadata)

    def _use(
        self, manifest: Manifest, watermark_score: float, shapes: Sequence[tuple[int, int, int]] | None, bucket_run: int
    ) -> None:
        """Leaves out what the manifest rejects, and sorts the rest into buckets."""
        place = manifest.find(self.rows.ids())
        known = place >= 0
        keep = ~known | manifest.column("accepted")[place]
        self.skipped["rejected by the manifest"] = int((~keep).sum())
        choice = np.zeros(len(place), dtype=np.int64)
        if shapes is not None:
            for shape in shapes:
                self.reader.checked_size(*shape[1:])
            measures = [manifest.column(name)[place] for name in ("height", "width", "num_frames", "duration")]
            choice = np.where(known, Buckets.choose(shapes, self.reader.fps, *measures), -1)
            self.skipped["of no bucket"] = int((keep & (choice < 0)).sum())
            keep &= choice >= 0
        if not keep.any():
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise UserError(f"manifest '{manifest.path}' leaves no clip of {len(place)} ({why}); relax the check")
        if not keep.all():
            self.rows = self.rows.take(np.flatnonzero(keep))
        if shapes is not None:
            self.buckets = Buckets(shapes, choice[keep], bucket_run)
        score = np.where(known, manifest.column("watermark")[place], np.nan)[keep]
        self._marked = ~(score < watermark_score)

    def _check_root(self, listing: str | os.PathLike[str]) -> None:
        if self.root is None:
            return
        spread = np.linspace(0, len(self.rows) - 1, min(len(self.rows), _TRIES)).astype(int)
        if not any(path.is_file() for index in spread.tolist() for path in self._candidates(self.rows[index])):
            tried = [str(path) for index in spread[:3].tolist() for path in self._candidates(self.rows[index])][:3]
            among = "" if len(spread) == len(self.rows) else f" among {len(spread)} rows spread over it"
            raise UserError(
                f"root '{self.root}' holds no video of '{listing}'{among}; tried first: {', '.join(tried)}; check root"
            )

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        """One for each bucket, or one of all clips."""
        return self.buckets.orderings(key) if self.buckets else super().orderings(key)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one clip.

        Returns:
            `video` float32 (f, 3, h, w) in [-1, 1]; `caption`, `description`, `motion` str; `fps` float; `index` int; `id` str.
        """
        row, marked = self.rows[index], self._marked is None or bool(self._marked[index])
        shape = self.buckets.shape(index) if self.buckets else None
        video, fps = self.reader.read(self._found(row), self.epoch, index, shape, marked)
        captions = {name: self.reader.caption(row[name], marked) for name in ("caption", "description", "motion")}
        return {"video": video, **captions, "fps": fps, "index": index, "id": row["id"]}

    def id(self, index: int) -> str:
        """The name of a row in messages, quarantine and manifest."""
        return self.rows[index]["id"]

    def captions(self, index: int) -> dict[str, str]:
        """`caption`, `description` and `motion` of a row."""
        row = self.rows[index]
        return {name: row[name] for name in ("caption", "description", "motion")}

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ClipDataset", Sequence[int]]:
        """A data set that holds these clips, small enough to be sent to another process, and their numbers in it."""
        small = copy.copy(self)
        small.rows, small._marked, small.buckets = self.rows.take(indices), None, None
        return small, range(len(indices))

    def file(self, index: int) -> Path:
        """The file of a row.

        Raises:
            UserError: it is in none of the places where it may be.
        """
        return self._found(self.rows[index])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the clips, where there are no buckets."""
        return self.reader.size

    def fingerprint(self) -> dict[str, Any]:
        """What decides the items: the transform, a sha256 of the list and of what is known of its clips, and of the sizes of files, where they are here.

        Of a long list 1000 files, spread over it, are measured: asking a file server for ten million sizes takes an hour.
        """
        shapes = self.buckets.shapes if self.buckets else None
        arrays = (self._marked, self.buckets and self.buckets.choice)
        content = [self.rows.digest(), *(None if array is None else hash_array(array) for array in arrays)]
        parts = {**self.reader.transform, "buckets": shapes, "list": hash_json(content)}
        if self.root is not None:
            spread = np.linspace(0, len(self) - 1, min(len(self), _MEASURED)).astype(int).tolist()
            found = [self._find(self.rows[index]) for index in spread]
            parts["files"] = hash_json([None if path is None else path.stat().st_size for path in found])
        return parts

    def _found(self, row: dict[str, str]) -> Path:
        if self.root is None:
            raise UserError("the data set has no root; set data.root to the folder of the videos")
        path = self._find(row)
        if path is None:
            tried = ", ".join(str(path) for path in self._candidates(row))
            raise UserError(f"video '{row['id']}' is missing; tried {tried}; fetch it or take it off the list")
        return path

    def _find(self, row: dict[str, str]) -> Path | None:
        return next((path for path in self._candidates(row) if path.is_file()), None)

    def _candidates(self, row: dict[str, str]) -> list[Path]:
        if self.root is None:
            return []
        if row["file"]:
            return [self.root / row["file"]]
        layouts = LAYOUTS if row["page_dir"] else [layout for layout in LAYOUTS if "page_dir" not in layout]
        return [self.root / layout.format(**row) for layout in layouts]
