"""WebDataset shards, local or by URL, as a data set of clips: tar files in which the members of a sample follow each other and share a name.

A clip is decoded where it lies in its tar file; nothing is unpacked. Shards that are named by a URL are fetched by the webdataset library when they are
first needed, into a cache that forgets the oldest. The order is `ShardOrder` (data/numbering.py): a few shards at a time, each worker
of each process its own, and any number found without reading what comes before it.
"""

import glob
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from webdataset.cache import FileCache
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from microcinema.data.clip_reader import ClipReader
from microcinema.data.manifest import Manifest
from microcinema.data.ordering import Ordering, ShardOrder
from microcinema.data.source import ClipSource
from microcinema.data.video_reader import IMAGES, TarMember
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.hashing import hash_array, hash_chunks, hash_json

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_OPEN = 32  # shards whose contents a worker remembers

Sample = dict[str, TarMember]
"""The members of a sample by their extension, such as `mp4`, `json`, `txt`."""


class ShardDataset(ClipSource):
    """Clips in WebDataset shards, with the items of `ClipDataset`.

    A sample is a video (or picture), and its captions: keys of its `.json` member, or its `.txt` member as the caption.

    Args:
        shards: a path or URL with braces (`clips/{00000..00099}.tar`), a pattern of local files (`clips/*.tar`), or several of these.
        num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout, manifest: as in `ClipDataset`.
        columns: keys in the `.json` member for `caption`, `description` and `motion`; default: these names.
        lanes: shards read side by side, by all processes together. Where it is a multiple of the global batch times the loader's workers, each
            worker reads shards that no other one reads.
        index: JSON file of the samples in each shard, {"shardlist": [{"url": ..., "nsamples": ...}]}; written if it is not there, for which
            every shard has to be read once. None: local shards are counted at every start.
        cache_dir: folder for shards fetched from URLs.
        cache_size: bytes that these may take, more than the shards read side by side.

    Raises:
        UserError: no shards, one that cannot be read, an index of other shards; from `dataset[i]`, a sample that is broken.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        num_frames: int,
        fps: float | None,
        resolution: int | tuple[int, int],
        decoder: str = "pyav",
        clip_position: str = "random",
        seed: int = 0,
        multiple_of: int = 8,
        columns: Mapping[str, str] | None = None,
        watermark: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        manifest: str | os.PathLike[str] | None = None,
        lanes: int = 64,
        index: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] = "runs/shards",
        cache_size: float = 1e11,
    ) -> None:
        self.reader = ClipReader(
            num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout
        )
        self.clip_position, self.seed = clip_position, seed
        self.columns = {name: name for name in ("caption", "description", "motion")} | dict(columns or {})
        self.urls = expand(shards)
        if lanes < 1:
            raise UserError(f"lanes={lanes}; read at least 1 shard at a time")
        self.lanes = min(lanes, len(self.urls))
        self._cache = FileCache(str(cache_dir), url_to_name=_cache_name, cache_size=int(cache_size))
        self._contents: OrderedDict[int, list[Sample]] = OrderedDict()
        counts = self._counts(Path(index) if index is not None else None)
        if counts.sum() == 0:
            raise UserError(f"the {len(self.urls)} shards from '{self.urls[0]}' on hold no sample; check shards")
        self._kept: list[np.ndarray] | None = None
        self.skipped: dict[str, int] = {}
        if manifest is not None:
            self._use(Manifest(manifest), counts)
        self.counts = counts if self._kept is None else np.array([len(kept) for kept in self._kept])
        self._starts = np.cumsum(self.counts) - self.counts

    def check_processes(self, count: int) -> None:
        """Refuses a run of more processes than shards, of which some would have none to read.

        Raises:
            UserError: as said.
        """
        if count > len(self.urls):
            raise UserError(
                f"{count} processes and {len(self.urls)} shards; use at most as many processes, or make smaller shards"
            )

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        """The one order, a few shards at a time."""
        return [(ShardOrder(self.counts, self.lanes, key), len(self))]

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one clip; the keys of `ClipDataset`."""
        captions = self.captions(index)
        video, fps = self.reader.read(self.file(index), self.epoch, index)
        captions = {name: self.reader.caption(text) for name, text in captions.items()}
        return {"video": video, **captions, "fps": fps, "index": index, "id": self.id(index)}

    def id(self, index: int) -> str:
        """Shard and number within it: known without opening the shard."""
        shard, number = self._place(index)
        return _identity(self.urls[shard], number)

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ShardDataset", Sequence[int] | np.ndarray]:
        """A data set that holds these clips, small enough to be sent to another process, and their numbers in it."""
        return self, indices

    def file(self, index: int) -> TarMember:
        """Where the video, or picture, of a sample lies.

        Raises:
            UserError: the shard cannot be read, or the sample has none.
        """
        sample = self._sample(index)
        for member in sample.values():
            if member.name.lower().endswith((*VIDEOS, *IMAGES)):
                return member
        have = ", ".join(member.name for member in sample.values())
        raise UserError(f"sample '{self.id(index)}' has no video (it has: {have}); take it out of its shard")

    def captions(self, index: int) -> dict[str, str]:
        """`caption`, `description` and `motion` of a sample.

        Raises:
            UserError: it has no caption.
        """
        sample = self._sample(index)
        record: Any = {}
        if "json" in sample:
            try:
                record = json.loads(sample["json"].read())
            except ValueError as error:
                raise UserError(f"'{sample['json']}' is no JSON ({error}); take it out of its shard") from None
        caption = record.get(self.columns["caption"]) if isinstance(record, dict) else None
        if not caption and "txt" in sample:
            caption = sample["txt"].read().decode("utf-8", errors="replace").strip()
        if not caption:
            keys = ", ".join(record) if isinstance(record, dict) and record else "no keys"
            raise UserError(
                f"sample '{self.id(index)}' has neither .txt nor '{self.columns['caption']}' in .json ({keys}); set columns"
            )
        return {
            "caption": str(caption),
            "description": str(record.get(self.columns["description"]) or caption),
            "motion": str(record.get(self.columns["motion"]) or caption),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What decides the items: the transform, a sha256 of the list, and one of the shards' sizes, if they are local and here."""
        names = [[url.rsplit("/", 1)[-1], int(count)] for url, count in zip(self.urls, self.counts, strict=True)]
        content = [names, dict(self.columns), [hash_array(kept) for kept in self._kept or ()]]
        parts = {**self.reader.transform, "list": hash_json(content)}
        if all(_is_local(url) and Path(url).is_file() for url in self.urls):
            parts["files"] = hash_json([Path(url).stat().st_size for url in self.urls])
        return parts

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        number = index - int(self._starts[shard])
        return shard, number if self._kept is None else int(self._kept[shard][number])

    def _sample(self, index: int) -> Sample:
        shard, number = self._place(index)
        if shard not in self._contents:
            if len(self._contents) >= _OPEN:
                self._contents.popitem(last=False)
            self._contents[shard] = self._members(shard)
        self._contents.move_to_end(shard)
        contents = self._contents[shard]
        if number >= len(contents):
            raise UserError(
                f"shard '{self.urls[shard]}' holds {len(contents)} samples, fewer than its index says; delete the index"
            )
        return contents[number]

    def _members(self, shard: int) -> list[Sample]:
        """All samples of a shard, from the headers of its tar file."""
        url = self.urls[shard]
        try:
            return read_members(url if _is_local(url) else self._cache.get_file(url))
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"shard '{url}' cannot be read ({error}); fetch it again, uncompressed, or take it off the list"
            ) from None

    def _counts(self, index: Path | None) -> np.ndarray:
        if index is not None and index.is_file():
            try:
                listed = {entry["url"]: int(entry["nsamples"]) for entry in json.loads(index.read_text())["shardlist"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"index '{index}' cannot be read ({error}); delete it to have it made anew") from None
            missing = [url for url in self.urls if url not in listed]
            if missing:
                raise UserError(f"index '{index}' does not name shard '{missing[0]}'; delete it to have it made anew")
            return np.array([listed[url] for url in self.urls])
        with ThreadPoolExecutor(8) as threads:  # what takes time is the disk, or the network
            counts = list(threads.map(lambda shard: len(self._members(shard)), range(len(self.urls))))
        if index is not None:
            entries = [{"url": url, "nsamples": count} for url, count in zip(self.urls, counts, strict=True)]
            with atomic_path(index) as temporary:
                temporary.write_text(json.dumps({"shardlist": entries}, indent=1))
        return np.array(counts)

    def _use(self, manifest: Manifest, counts: np.ndarray) -> None:
        ids = [_identity(url, n) for url, count in zip(self.urls, counts, strict=True) for n in range(count)]
        place = manifest.find(pa.chunked_array([pa.array(ids)]))
        keep = (place < 0) | manifest.column("accepted")[place]
        self.skipped["rejected by the manifest"] = int((~keep).sum())
        if not keep.any():
            raise UserError(f"manifest '{manifest.path}' leaves no clip of {len(keep)}; relax the check")
        self._kept = [np.flatnonzero(part) for part in np.split(keep, np.cumsum(counts)[:-1])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": OrderedDict()}


def read_members(path: str) -> list[Sample]:
    """The samples of a tar file in their order, from its headers alone.

    Raises:
        OSError, ValueError, tarfile.TarError: it cannot be read, or is compressed: there are no places to read at.
    """
    samples: list[Sample] = []
    last = None
    with tarfile.open(path, "r:") as tar:
        for entry in tar:
            key, extension = base_plus_ext(entry.name)
            if not entry.isreg() or not extension:
                continue
            if key != last:
                samples.append({})
                last = key
            samples[-1][extension.lower()] = TarMember(path, entry.name, entry.offset_data, entry.size)
    return samples


def expand(shards: str | Sequence[str]) -> list[str]:
    """The shards that patterns name, as webdataset expands braces; `*` finds local files.

    Raises:
        UserError: none.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    urls = [url for pattern in patterns for url in expand_urls(str(pattern))]
    urls = [url.removeprefix("file://") if url.startswith("file://") else url for url in urls]
    found = [path for url in urls for path in (sorted(glob.glob(url)) if _is_local(url) and "*" in url else [url])]
    if not found:
        raise UserError(f"shards {patterns} name no shard; give paths or URLs of .tar files")
    return found


def _is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def _cache_name(url: str) -> str:
    """The file's own name says little: shards of several folders share it."""
    return f"{hash_chunks([url])[:16]}-{url.rsplit('/', 1)[-1][-64:]}"


def _identity(url: str, number: int) -> str:
    return f"{Path(url).stem}#{number:05d}"
