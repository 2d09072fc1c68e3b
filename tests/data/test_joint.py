"""Videos and pictures trained together, over real files."""

import csv
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from microcinema.data import video_reader, video_writer
from microcinema.data.clips import ClipDataset
from microcinema.data.indexed import DistributedBatchSampler, IndexedDataset
from microcinema.data.joint import JointDataset
from microcinema.data.manifest import SCHEMA
from microcinema.data.optical_flow import FlowClips
from microcinema.data.shards import ShardDataset
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Nine wide videos and three pictures, each with a list."""
    folder = tmp_path_factory.mktemp("joint")
    rng = np.random.default_rng(0)
    lists: dict[str, list[tuple[str, str]]] = {"videos": [], "pictures": []}
    for k in range(9):
        frames = np.repeat(rng.integers(0, 256, (1, 48, 80, 3), dtype=np.uint8), 8, axis=0)
        video_writer.write_video(folder / f"{k}.mp4", frames, 8)
        lists["videos"].append((f"{k}.mp4", f"video {k}"))
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        lists["pictures"].append((f"{k}.png", f"picture {k}"))
    for name, rows in lists.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    return folder


COLUMN = {"file": "file_name", "caption": "text"}


def clips(world: Path, name: str, num_frames: int, **more) -> ClipDataset:
    return ClipDataset(world / f"{name}.csv", world, num_frames, 8.0, 32, columns=COLUMN, **more)


def test_pictures_are_clips_of_one_frame(world):
    item = clips(world, "pictures", 1)[0]
    assert item["video"].shape == (1, 3, 32, 32) and item["fps"] == 8.0
    with pytest.raises(UserError, match="0.png' is a picture, not a clip of 4 frames; set num_frames=1"):
        clips(world, "pictures", 4)[0]
    with pytest.raises(UserError, match="no frame rate of its own; set fps"):
        ClipDataset(world / "pictures.csv", world, 1, None, 32, columns=COLUMN)[0]
    (world / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="broken.png' cannot be read"):
        video_reader.read_image(world / "broken.png")
    assert clips(world, "videos", 1)[0]["video"].shape == (1, 3, 32, 32)  # one frame of a video


def joint(world: Path, **more) -> JointDataset:
    parts = {"videos": clips(world, "videos", 4), "pictures": clips(world, "pictures", 1)}
    return JointDataset(parts, **{"weights": {"videos": 1, "pictures": 2.0}, "bucket_run": 4, **more})


def test_videos_and_pictures_train_together(world):
    data = IndexedDataset(joint(world), seed=0)
    assert data.same_shape_run == 4 and len(data.dataset) == 12
    met: dict[str, int] = {}
    whole = []
    for batch in DataLoader(data, batch_sampler=DistributedBatchSampler(0, 120, 2, same_shape_run=4), num_workers=1):
        assert batch["video"].shape in ((2, 4, 3, 32, 32), (2, 1, 3, 32, 32))
        whole += batch["id"]
        for name in batch["caption"]:
            met[name] = met.get(name, 0) + 1
    assert {met[f"video {k}"] for k in range(9)} == {8} and {met[f"picture {k}"] for k in range(3)} == {16}
    # Two processes with batches of one meet the same clips.
    ranks = [
        iter(DataLoader(data, batch_sampler=DistributedBatchSampler(0, 120, 1, rank, 2, same_shape_run=4)))
        for rank in range(2)
    ]
    assert [next(ranks[k % 2])["id"][0] for k in range(40)] == whole[:40]
    assert data.dataset.id(10) == "pictures/1.png"


def test_batches_that_would_hold_two_shapes_are_refused(world):
    with pytest.raises(UserError, match="train_batch_size=3 does not divide the 4 consecutive clips of one shape"):
        DistributedBatchSampler(0, 12, 3, same_shape_run=4)
    with pytest.raises(UserError, match="or the 2 clips trained so far"):
        DistributedBatchSampler(2, 10, 4, same_shape_run=4)


@pytest.mark.parametrize("weights", [{}, {"videos": 1}, {"videos": 1, "pictures": 0}, {"videos": 1, "photos": 1}])
def test_weights_that_do_not_fit(world, weights):
    with pytest.raises(UserError, match="for the parts videos, pictures; give each a positive number"):
        joint(world, weights=weights)


def test_flow_comes_with_clips_of_every_shape(world):
    """The wrapper that adds flow hides neither shapes nor names."""
    flow = pickle.loads(pickle.dumps(FlowClips(joint(world), "dis", 8)))
    assert IndexedDataset(flow, seed=0).same_shape_run == 4
    assert flow.id(10) == "pictures/1.png"
    flow.check_processes(1000)


def test_more_processes_than_shards_are_refused_in_joint_data_too(world, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            tar.add(world / "0.png", "0.png")
    shards = ShardDataset(str(tmp_path / "*.tar"), 1, 8.0, 32, cache_dir=tmp_path / "cache")
    data = JointDataset({"videos": clips(world, "videos", 4), "web": shards}, {"videos": 1, "web": 1})
    for dataset in (data, FlowClips(data, "dis", 8)):
        dataset.check_processes(2)
        with pytest.raises(UserError, match=r"data\.parts\.web: 3 processes and 2 shards"):
            dataset.check_processes(3)


def test_skipped_clips_are_counted_by_part_and_reason(world, tmp_path):
    rows = [{"key": f"{k}.mp4", "id": f"{k}.mp4", "accepted": k > 1} for k in range(9)]
    table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "manifest.parquet")
    videos = clips(world, "videos", 4, manifest=tmp_path / "manifest.parquet")
    data = JointDataset({"videos": videos, "pictures": clips(world, "pictures", 1)}, {"videos": 1, "pictures": 1})
    assert data.skipped == FlowClips(data, "dis", 8).skipped == {"rejected by the manifest (videos)": 2}
    assert len(data) == 10


def test_joint_data_are_checked_part_by_part(world):
    with pytest.raises(UserError, match="JointDataset cannot be checked; check the data that it is made of"):
        joint(world).subset([0])
