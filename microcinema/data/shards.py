"""WebDataset shards, local or by URL, as a data set of clips: tar files in which the files of a sample are adjacent and share a name.

A clip is decoded in place, from its bytes in the tar file. Shards named by a URL are downloaded by the webdataset library when first needed, into a
cache that drops the oldest. The order is `ShardOrder` (data/ordering.py): a few shards at a time, each worker of each process its own.
"""

import glob
import itertools
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
import pyarrow.compute as pc
from webdataset.cache import FileCache
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from microcinema.config import types
from microcinema.data.clip_reader import ClipReader
from microcinema.data.manifest import Manifest
from microcinema.data.ordering import Ordering, ShardOrder
from microcinema.data.source import ClipSource
from microcinema.data.text_table import parse_object, text_of
from microcinema.data.video_reader import IMAGES, VIDEOS, TarMember
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import natural_key, write_json
from microcinema.utils.hashing import hash_array, hash_chunks, hash_json

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
        self.names = shard_names(self.urls)
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
        return _sample_id(self.names[shard], number)

    def file_state(self, index: int) -> str:
        return super().file_state(index) if _is_local(self.urls[self._locate(index)[0]]) else ""

    def subset(self, indices: Sequence[int] | np.ndarray) -> tuple["ShardDataset", Sequence[int] | np.ndarray]:
        return self, indices

    def file(self, index: int) -> TarMember:
        sample = self._sample(index)
        for suffixes in (VIDEOS, IMAGES):  # a picture beside a video is its thumbnail
            extensions = [extension for extension in sample if f".{extension}".endswith(suffixes)]
            if extensions:
                return sample[min(extensions, key=lambda extension: extension.count("."))]
        names = ", ".join(member.name for member in sample.values())
        raise UserError(f"sample '{self.id(index)}' has no video (it has: {names}); take it out of its shard")

    def captions(self, index: int) -> dict[str, str]:
        sample = self._sample(index)
        texts, keys = dict.fromkeys(self.columns, ""), "no keys"
        if "json" in sample:
            fault = f"'{sample['json']}' holds no captions ({{reason}})"
            with user_errors(f"{fault}; take it out of its shard", ValueError):  # a fault of the disk passes
                record = parse_object(sample["json"].read())
                texts, keys = {name: text_of(record, key) for name, key in self.columns.items()}, ", ".join(record)
        if not texts["caption"] and "txt" in sample:
            texts["caption"] = sample["txt"].read().decode("utf-8", errors="replace").strip()
        if not texts["caption"]:
            name = self.columns["caption"]
            raise UserError(f"sample '{self.id(index)}' has neither .txt nor '{name}' in .json ({keys}); set columns")
        return {name: text or texts["caption"] for name, text in texts.items()}

    def fingerprint(self) -> dict[str, Any]:
        """The transform, a hash of the list, and one of the shards' sizes, if all are local."""
        shards = zip(self.urls, self.counts, self.names, strict=True)
        names = [[url.rsplit("/", 1)[-1], int(count), *name.split("/")[:-1]] for url, count, name in shards]
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
        advice = "fetch it again, uncompressed, or take it off the list"
        with user_errors(f"shard '{url}' cannot be read ({{reason}}); {advice}"):
            return read_members(url if _is_local(url) else self._cache.get_file(url))

    def _count_samples(self, index: Path | None) -> np.ndarray:
        if index is not None and index.is_file():
            with user_errors(f"index '{index}' cannot be read ({{reason}}); delete it to have it made anew"):
                counts = {entry["url"]: int(entry["nsamples"]) for entry in json.loads(index.read_text())["shardlist"]}
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
        # The check may have seen shards of more folders, and so have named more of the folders of each.
        names = shard_names(self.urls, str(pc.first(manifest.table.column("key"))).count("/"))
        keys = [_sample_id(name, n) for name, count in zip(names, self.counts, strict=True) for n in range(count)]
        manifest_rows = manifest.find(pa.chunked_array([pa.array(keys)]))
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
    with tarfile.open(path, "r:") as tar:
        files = [entry for entry in tar if entry.isreg() and base_plus_ext(entry.name)[1]]
    members = [TarMember(path, entry.name, entry.offset_data, entry.size) for entry in files]
    groups = itertools.groupby(members, lambda member: base_plus_ext(member.name)[0])
    return [sample for _, group in groups for sample in _split(list(group))]


def _split(members: list[TarMember]) -> list[Sample]:
    """The samples of files that share a name up to the first dot: one, unless the names of all videos and pictures have more dots."""
    media = [base_plus_ext(member.name)[1] for member in members if member.name.lower().endswith((*VIDEOS, *IMAGES))]
    split = os.path.splitext if media and all("." in extension for extension in media) else base_plus_ext
    groups = itertools.groupby(members, lambda member: split(member.name)[0])
    return [{split(member.name)[1].removeprefix(".").lower(): member for member in group} for _, group in groups]


def shard_names(urls: Sequence[str], num_folders: int = 0) -> list[str]:
    """The names of shards without suffix, with as many of the folders above them as tell all apart, but at least `num_folders`."""
    parts = [(*Path(url).parent.parts, Path(url).stem) for url in urls]
    longest, count = max(map(len, parts)), 1 + num_folders
    while count < longest and len({part[-count:] for part in parts}) < len(set(urls)):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


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


def _sample_id(name: str, number: int) -> str:
    return f"{name}#{number:05d}"
