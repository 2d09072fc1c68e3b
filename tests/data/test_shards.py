"""WebDataset shards: real tar files, written by the webdataset library, read from disk and over HTTP."""

import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from fixtures import broken_videos, tiny, tiny_training
from fixtures.tiny_training import logged, pipeline, train, weights
from microcinema.data import video_reader
from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.manifest import SCHEMA
from microcinema.data.quarantine import Quarantine
from microcinema.data.shards import ShardDataset, expand_shards
from microcinema.utils.errors import UserError

COUNTS = (5, 3, 4, 6)
SHARDS = "{00000..00003}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four shards of 18 videos, with captions in .json or .txt, and one video beside them, which is in the first shard too."""
    folder = tmp_path_factory.mktemp("shards")
    seed = 0
    for shard, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for k in range(count):
                path = folder / "one.mp4"
                broken_videos.sound(path, seed)
                sample = {"__key__": f"{shard:05d}{k:04d}", "mp4": path.read_bytes()}
                if seed % 2:
                    sample["txt"] = f"caption {seed}"
                else:
                    sample["json"] = {"caption": f"caption {seed}", "motion": f"motion {seed}", "videoid": seed}
                writer.write(sample)
                seed += 1
    broken_videos.sound(folder / "one.mp4", 0)
    return folder


def clips(folder, shards: str = SHARDS, **arguments) -> ShardDataset:
    shape = (tiny_training.FRAMES, 8.0, tiny.SIZE)
    return ShardDataset(f"{folder}/{shards}", *shape, **{"cache_dir": f"{folder}/cache", **arguments})


def test_the_items_are_those_of_the_files(folder):
    data = clips(folder, clip_position="first")
    assert len(data) == sum(COUNTS)
    assert [data[k]["caption"] for k in range(18)] == [f"caption {k}" for k in range(18)]
    assert (data[4]["motion"], data[4]["description"], data[3]["motion"]) == ("motion 4", "caption 4", "caption 3")
    assert (data[5]["id"], data[17]["id"]) == ("00001#00000", "00003#00005")
    frames = video_reader.read_clip(folder / "one.mp4", tiny_training.FRAMES, 8.0)
    size = tiny.SIZE, tiny.SIZE
    from microcinema.data.clip_reader import resize_and_crop

    torch.testing.assert_close(data[0]["video"], resize_and_crop(frames, size))
    for variant in ({"decoder": "decord"}, {"timeout": 60}):
        torch.testing.assert_close(
            clips(folder, clip_position="first", **variant)[7]["video"], data[7]["video"], rtol=0, atol=0
        )
    assert pickle.loads(pickle.dumps(data))[9]["caption"] == "caption 9"


def test_captions_have_names_of_their_own(folder):
    data = clips(folder, columns={"motion": "videoid"})
    assert data.captions(4)["motion"] == "4"
    with pytest.raises(
        UserError, match=r"00000#00000' has neither .txt nor 'text' in .json .caption, motion, videoid."
    ):
        clips(folder, columns={"caption": "text"}).captions(0)


def read(data: ShardDataset, start: int, stop: int, processes: int, workers: int = 0) -> dict[int, tuple]:
    """What a run of so many processes reads: number to index and place of the clip."""
    found = {}
    for rank in range(processes):
        numbers = DistributedBatchSampler(start, stop, 4 // processes, rank, processes)
        loader = DataLoader(IndexedDataset(data, 0), batch_sampler=numbers, num_workers=workers)
        for batch in loader:
            for k, number in enumerate(batch["sample_index"].tolist()):
                found[number] = (batch["id"][k], batch["caption"][k], batch["video"][k].sum().item())
    return found


def test_processes_workers_and_resuming_change_nothing(folder):
    whole = read(clips(folder, parallel_shards=2), 0, 40, 1)
    assert sorted(whole) == list(range(40))
    first = [whole[number][0] for number in range(18)]
    assert len(set(first)) == 18 and first != sorted(first)
    assert read(clips(folder, parallel_shards=2), 0, 40, 2, workers=1) == whole
    assert read(clips(folder, parallel_shards=2), 20, 40, 4) == {number: whole[number] for number in range(20, 40)}


def test_a_run_from_shards_resumes_exactly(tmp_path, folder):
    settings = {"checkpointing_steps": 2, "dataloader_num_workers": 1, "checkpoints_total_limit": None}
    train(pipeline(tmp_path), clips(folder), tmp_path / "whole", **settings)
    train(pipeline(tmp_path), clips(folder), tmp_path / "parts", **{**settings, "max_train_steps": 2})
    train(pipeline(tmp_path, seed=5), clips(folder), tmp_path / "parts", resume_from_checkpoint="latest", **settings)
    one, other = (weights(tmp_path / run / "checkpoint-4") for run in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


@pytest.fixture
def server(folder):
    """Serves the shards over HTTP, and counts what is asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()


def test_shards_by_url_are_fetched_when_needed_and_once(tmp_path, folder, server):
    url, asked = server
    arguments = {"cache_dir": tmp_path / "cache", "index": tmp_path / "index.json", "clip_position": "first", "seed": 0}
    remote = ShardDataset(f"{url}/{SHARDS}", tiny_training.FRAMES, 8.0, tiny.SIZE, **arguments)
    assert len(asked) == 4  # to count the samples: the index was not there
    local = clips(folder, clip_position="first")
    for index in (0, 8, 17):
        assert torch.equal(remote[index]["video"], local[index]["video"])
    assert len(asked) == 4
    counts = {
        entry["url"][-9:]: entry["nsamples"] for entry in json.loads((tmp_path / "index.json").read_text())["shardlist"]
    }
    assert counts == {f"{shard:05d}.tar": count for shard, count in enumerate(COUNTS)}

    asked.clear()
    again = ShardDataset(
        f"{url}/{SHARDS}", tiny_training.FRAMES, 8.0, tiny.SIZE, **{**arguments, "cache_dir": tmp_path / "new"}
    )
    assert asked == []
    assert torch.equal(again[17]["video"], local[17]["video"])
    assert asked == ["/00003.tar"]
    with pytest.raises(UserError, match="index.json' does not name shard '.*00009.tar'; delete it"):
        ShardDataset(f"{url}/00009.tar", 4, 8.0, tiny.SIZE, **arguments)
    with pytest.raises(UserError, match="shard 'http.*00009.tar' cannot be read"):
        ShardDataset(f"{url}/00009.tar", 4, 8.0, tiny.SIZE, cache_dir=tmp_path / "cache")


def test_no_shards_and_more_processes_than_shards(folder, tmp_path):
    for nothing in ([], f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match="name no shard"):
            ShardDataset(nothing, 4, 8.0, tiny.SIZE)
    for number in range(12):
        (tmp_path / f"{number}.tar").touch()
    assert expand_shards([f"{tmp_path}/*.tar", "x.tar"]) == [f"{tmp_path}/{number}.tar" for number in range(12)] + [
        "x.tar"
    ]
    data = clips(folder, shards="*.tar")
    data.check_processes(4)
    with pytest.raises(UserError, match="5 processes and 4 shards"):
        data.check_processes(5)


def test_shards_that_are_none(tmp_path, folder):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(UserError, match=r"shard '.*a.tar' cannot be read"):
        clips(tmp_path, "a.tar")
    with pytest.raises(UserError, match=r"shard '.*b.tar' cannot be read"):
        clips(tmp_path, "b.tar")
    with tarfile.open(tmp_path / "c.tar", "w"):
        pass
    with pytest.raises(UserError, match="hold no sample"):
        clips(tmp_path, "c.tar")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(folder / "00000.tar", "x.txt")
    with pytest.raises(UserError, match=r"d#00000' has no video .it has: x.txt"):
        clips(tmp_path, "d.tar").file(0)
    data = (folder / "00000.tar").read_bytes()
    (tmp_path / "e.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        [clips(tmp_path, "e.tar")[k] for k in range(5)]


def test_a_manifest_leaves_samples_out(tmp_path, folder):
    """Of one shard all, of another some; what it does not know stays. Each of the others has its turn in a pass."""
    data = clips(folder, clip_position="first")
    ids = [data.id(k) for k in range(18)]
    rejected = {*ids[5:8], ids[0], ids[17]}
    table = pa.Table.from_pylist(
        [{"key": name, "accepted": name not in rejected} for name in [*ids[:-2], ids[17]]], schema=SCHEMA
    )
    pyarrow.parquet.write_table(table, tmp_path / "manifest.parquet")
    kept = clips(folder, clip_position="first", manifest=tmp_path / "manifest.parquet", parallel_shards=2)
    left = [k for k in range(18) if ids[k] not in rejected]
    assert kept.skipped == {"rejected by the manifest": 5}
    assert [kept.id(k) for k in range(len(kept))] == [ids[k] for k in left]
    assert [kept[k]["caption"] for k in range(len(kept))] == [f"caption {k}" for k in left]
    ((order, share),) = kept.orderings([0])
    assert sorted(order.epoch_and_index(n)[1] for n in range(13)) == list(range(13)) and share == 13
    assert kept.fingerprint()["list"] != data.fingerprint()["list"]
    table = pa.Table.from_pylist([{"key": name, "accepted": False} for name in ids], schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="leaves no clip of 18; relax the check"):
        clips(folder, manifest=tmp_path / "manifest.parquet")


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    """Also by the manifest of both folders for one of them, and of one folder for both."""
    for folder in "ab":
        files = {f"{k}.{kind}": f"{folder}{k}".encode() for k in range(3) for kind in ("mp4", "txt")}
        write_tar(tmp_path / folder / "00000.tar", files)
    both = [f"{tmp_path}/{folder}/00000.tar" for folder in "ab"]
    data = ShardDataset(both, 4, 8.0, tiny.SIZE)
    ids = [data.id(k) for k in range(6)]
    assert ids == [f"{folder}/00000#{k:05d}" for folder in "ab" for k in range(3)]
    assert data.fingerprint()["list"] != ShardDataset(both[::-1], 4, 8.0, tiny.SIZE).fingerprint()["list"]
    table = pa.Table.from_pylist([{"key": name, "accepted": name != ids[0]} for name in ids], schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "both.parquet")
    table = pa.Table.from_pylist([{"key": f"00000#{k:05d}", "accepted": k != 0} for k in range(3)], schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "one.parquet")

    def kept(shards, manifest):
        data = ShardDataset(shards, 4, 8.0, tiny.SIZE, manifest=tmp_path / manifest)
        return [data.captions(k)["caption"] for k in range(len(data))]

    assert kept(both, "both.parquet") == ["a1", "a2", "b0", "b1", "b2"]
    assert kept(both[:1], "both.parquet") == kept(both[:1], "one.parquet") == ["a1", "a2"]
    assert kept(both[1:], "both.parquet") == ["b0", "b1", "b2"]
    with pytest.raises(UserError, match="one.parquet' names no clip of this data"):
        kept(both, "one.parquet")


@pytest.mark.parametrize(
    ("files", "videos"),
    [
        (("0.jpg", "0.json", "0.mp4", "1.mp4", "1.jpg"), ["0.mp4", "1.mp4"]),  # a thumbnail before the video
        (("a.v1.json", "a.v1.mp4", "a.v2.json", "a.v2.mp4"), ["a.v1.mp4", "a.v2.mp4"]),  # dots in names
        (("2026.01.01.mp4", "2026.01.01.json", "2026.01.02.mp4"), ["2026.01.01.mp4", "2026.01.02.mp4"]),
        (("s.1/0.mp4", "s.1/0.json", "s.2/0.mp4"), ["s.1/0.mp4", "s.2/0.mp4"]),
        (("0.low.mp4", "0.mp4", "0.seg.png", "1.mp4"), ["0.mp4", "1.mp4"]),  # WebDataset's extensions of several parts
        (("0.JPG", "1.jpg"), ["0.JPG", "1.jpg"]),
        (("0.mp4", "._0.mp4", "1.mp4"), ["0.mp4", "1.mp4"]),
    ],
)
def test_each_video_is_a_sample_whatever_lies_beside_it(tmp_path, files, videos):
    text = b'{"caption": "a star"}'
    write_tar(tmp_path / "0.tar", {name: text if name.endswith("json") else b"x" for name in files})
    data = clips(tmp_path, "0.tar")
    assert [data.file(k).name for k in range(len(data))] == videos
    captions = [name.removesuffix("json") for name in files if name.endswith("json")]
    for k, video in enumerate(videos):
        if video.removesuffix("mp4") in captions:
            assert data.captions(k)["caption"] == "a star"


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"3", b"null", b'"text"', b"", b"{", b"\xff", b"[" * 200_000, b'{"a":' * 200_000]
    + [b'{"caption": ' + value + b"}" for value in (b'["a"]', b'"\\ud800"', b'{"en": "a"}', b"true")],
)
def test_a_json_that_holds_no_captions_is_quarantined_by_name(tmp_path, content):
    write_tar(tmp_path / "0.tar", {"0.mp4": b"x", "0.json": content, "0.txt": b"a star"})
    quarantine = Quarantine(tmp_path / "quarantine", retries=0)
    assert quarantine.try_read(clips(tmp_path, "0.tar"), 0, 0) is None
    assert "0.tar:0.json' holds no captions (" in quarantine.reason
