"""WebDataset shards, local or by URL, as a data set of clips: tar files in which the files of a sample are adjacent and share a name.

A clip is decoded in place, from its bytes in the tar file. Shards named by a URL are downloaded by the webdataset library when first needed, into a
cache that drops the oldest. The order is `ShardOrder` (data/ordering.py): a few shards at a time, each worker of each process its own.
"""

import glob
import json
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

from microcinema.config import types
from microcinema.data.clip_reader import ClipReader
from microcinema.data.manifest import Manifest
from microcinema.data.ordering import Ordering, ShardOrder
from microcinema.data.source import ClipSource
from microcinema.data.video_reader import IMAGES, TarMember
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import UserError
from microcinema.utils.files import natural_key, write_json
from microcinema.utils.hashing import hash_array, hash_chunks, hash_json

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_MAX_LISTINGS = 32  # shards whose list of samples a worker keeps

Sample = dict[str, TarMember]
"""The files of a sample by their extension, such as `mp4`, `json`, `txt`."""


class ShardDataset(ClipSource):
    """Clips in WebDataset shards, with the items of `ClipDataset`.

    A sample is a video or picture and its captions: keys of its `.json` file, or its `.txt` file as the caption.

    Args:
        shards: a path or URL with braces (`clips/{00000..00099}.tar`), a pattern of local files (`clips/*.tar`), or several of these.
        num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout, manifest: as in `ClipDataset`.
        columns: keys in the `.json` file for `caption`, `description` and `motion`; default: these names.
        parallel_shards: shards that all processes together read side by side. If it is a multiple of the global batch size times the loader's
            workers, no two workers read the same shard.
        index: JSON file of the number of samples in each shard, {"shardlist": [{"url": ..., "nsamples": ...}]}; written if missing, for which
            every shard is read once. None: local shards are counted at every start.
        cache_dir: folder for downloaded shards.
        cache_size: bytes that they may take, more than the shards read side by side.

    Raises:
        UserError: no shards, one that cannot be read, an index of other shards; from `dataset[i]`, a broken sample.
    """

    def __init__(
        self,
        shards: types.PathText | Sequence[types.PathText],
        num_frames: types.Size,
        fps: types.Fps | None,
        resolution: types.Resolution,
        decoder: types.Decoder = "pyav",
        clip_position: types.ClipPosition = "random",
        seed: types.Seed = 0,
        multiple_of: types.Size = 8,
        columns: Mapping[str, types.Name] | None = None,
        watermark: Watermark | None = None,
        timeout: types.Positive | None = None,
        manifest: types.AnyPath | None = None,
        parallel_shards: types.Count = 64,
        index: types.AnyPath | None = None,
        cache_dir: types.AnyPath = "runs/shards",
        cache_size: types.Positive = 1e11,
    ) -> None:
        self.reader = ClipReader(
            num_frames, fps, resolution, decoder, clip_position, seed, multiple_of, watermark, timeout
        )
        self.columns = {name: name for name in ("caption", "description", "motion")} | dict(columns or {})
        self.urls = expand_shards(shards)
        self.parallel_shards = min(parallel_shards, len(self.urls))
        self._cache = FileCache(str(cache_dir), url_to_name=_cache_name, cache_size=int(cache_size))
        self._listings: OrderedDict[int, list[Sample]] = OrderedDict()
        self.counts = self._count_samples(Path(index) if index is not None else None)
        if self.counts.sum() == 0:
            raise UserError(f"the {len(self.urls)} shards from '{self.urls[0]}' on hold no sample; check shards")
        self._kept: list[np.ndarray] | None = None  # numbers of the samples of each shard that are not skipped
        self.skipped: dict[str, int] = {}
        if manifest is not None:
            self._apply_manifest(Manifest(manifest))
        self._starts = np.cumsum(self.counts) - self.counts

    def check_processes(self, count: int) -> None:
        if count > len(self.urls):
            advice = "use at most as many processes, or make smaller shards"
            raise UserError(f"{count} processes and {len(self.urls)} shards; {advice}")

    def orderings(self, key: Sequence[int]) -> list[tuple[Ordering, int]]:
        return [(ShardOrder(self.counts, self.parallel_shards, key), len(self))]

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        captions = {name: self.reader.caption(text) for name, text in self.captions(index).items()}
        video, fps = self.reader.read(self.file(index), self.epoch, index)
        return {"video": video, **captions, "fps": fps, "index": index, "id": self.id(index)}

    def id(self, index: int) -> str:
        shard, number = self._locate(index)
        return _sample_id(self.urls[shard], number)

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ShardDataset", Sequence[int] | np.ndarray]:
        return self, indices

    def file(self, index: int) -> TarMember:
        sample = self._sample(index)
        for member in sample.values():
            if member.name.lower().endswith((*VIDEOS, *IMAGES)):
                return member
        names = ", ".join(member.name for member in sample.values())
        raise UserError(f"sample '{self.id(index)}' has no video (it has: {names}); take it out of its shard")

    def captions(self, index: int) -> dict[str, str]:
        sample = self._sample(index)
        record: Any = {}
        if "json" in sample:
            try:
                record = json.loads(sample["json"].read())
            except ValueError as error:
                raise UserError(f"'{sample['json']}' is no JSON ({error}); take it out of its shard") from None
        record = record if isinstance(record, dict) else {}
        caption = record.get(self.columns["caption"])
        if not caption and "txt" in sample:
            caption = sample["txt"].read().decode("utf-8", errors="replace").strip()
        if not caption:
            keys = ", ".join(record) or "no keys"
            name = self.columns["caption"]
            raise UserError(f"sample '{self.id(index)}' has neither .txt nor '{name}' in .json ({keys}); set columns")
        others = {name: str(record.get(self.columns[name]) or caption) for name in ("description", "motion")}
        return {"caption": str(caption), **others}

    def fingerprint(self) -> dict[str, Any]:
        """The transform, a hash of the list, and one of the shards' sizes, if all are local."""
        names = [[url.rsplit("/", 1)[-1], int(count)] for url, count in zip(self.urls, self.counts, strict=True)]
        kept = [hash_array(numbers) for numbers in self._kept or ()]
        fingerprint = {**self.reader.transform, "list": hash_json([names, self.columns, kept])}
        if all(_is_local(url) and Path(url).is_file() for url in self.urls):
            fingerprint["files"] = hash_json([Path(url).stat().st_size for url in self.urls])
        return fingerprint

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard of an item, and the number of its sample there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        number = index - int(self._starts[shard])
        return shard, number if self._kept is None else int(self._kept[shard][number])

    def _sample(self, index: int) -> Sample:
        shard, number = self._locate(index)
        if shard not in self._listings:
            if len(self._listings) >= _MAX_LISTINGS:
                self._listings.popitem(last=False)
            self._listings[shard] = self._list_samples(shard)
        self._listings.move_to_end(shard)
        samples = self._listings[shard]
        if number >= len(samples):
            raise UserError(f"shard '{self.urls[shard]}' has fewer samples than its index says; delete the index")
        return samples[number]

    def _list_samples(self, shard: int) -> list[Sample]:
        url = self.urls[shard]
        try:
            return read_members(url if _is_local(url) else self._cache.get_file(url))
        except (OSError, ValueError, tarfile.TarError) as error:
            advice = "fetch it again, uncompressed, or take it off the list"
            raise UserError(f"shard '{url}' cannot be read ({error}); {advice}") from None

    def _count_samples(self, index: Path | None) -> np.ndarray:
        if index is not None and index.is_file():
            try:
                counts = {entry["url"]: int(entry["nsamples"]) for entry in json.loads(index.read_text())["shardlist"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"index '{index}' cannot be read ({error}); delete it to have it made anew") from None
            missing = [url for url in self.urls if url not in counts]
            if missing:
                raise UserError(f"index '{index}' does not name shard '{missing[0]}'; delete it to have it made anew")
            return np.array([counts[url] for url in self.urls])
        with ThreadPoolExecutor(8) as threads:  # they wait for disk or network
            lengths = list(threads.map(lambda shard: len(self._list_samples(shard)), range(len(self.urls))))
        if index is not None:
            entries = [{"url": url, "nsamples": length} for url, length in zip(self.urls, lengths, strict=True)]
            write_json(index, {"shardlist": entries})
        return np.array(lengths)

    def _apply_manifest(self, manifest: Manifest) -> None:
        ids = [_sample_id(url, n) for url, count in zip(self.urls, self.counts, strict=True) for n in range(count)]
        manifest_rows = manifest.find(pa.chunked_array([pa.array(ids)]))
        keep = (manifest_rows < 0) | manifest.column("accepted")[manifest_rows]
        self.skipped["rejected by the manifest"] = int((~keep).sum())
        if not keep.any():
            raise UserError(f"manifest '{manifest.path}' leaves no clip of {len(keep)}; relax the check")
        self._kept = [np.flatnonzero(mask) for mask in np.split(keep, np.cumsum(self.counts)[:-1])]
        self.counts = np.array([len(numbers) for numbers in self._kept])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listings": OrderedDict()}


def read_members(path: str) -> list[Sample]:
    """The samples of an uncompressed tar file in their order, from its headers alone."""
    samples: list[Sample] = []
    last_key = None
    with tarfile.open(path, "r:") as tar:
        for entry in tar:
            key, extension = base_plus_ext(entry.name)
            if not entry.isreg() or not extension:
                continue
            if key != last_key:
                samples.append({})
                last_key = key
            samples[-1][extension.lower()] = TarMember(path, entry.name, entry.offset_data, entry.size)
    return samples


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """The shards that patterns name: webdataset expands braces, `*` matches local files; a UserError if there are none."""
    patterns = [shards] if isinstance(shards, str) else list(shards)
    urls = [url.removeprefix("file://") for pattern in patterns for url in expand_urls(str(pattern))]
    globs = (sorted(glob.glob(url), key=natural_key) if _is_local(url) and "*" in url else [url] for url in urls)
    paths = [path for paths in globs for path in paths]
    if not paths:
        raise UserError(f"shards {patterns} name no shard; give paths or URLs of .tar files")
    return paths


def _is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def _cache_name(url: str) -> str:
    return f"{hash_chunks([url])[:16]}-{url.rsplit('/', 1)[-1][-64:]}"


def _sample_id(url: str, number: int) -> str:
    return f"{Path(url).stem}#{number:05d}"
