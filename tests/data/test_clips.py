"""The data set over real mp4 files and WebVid-style lists."""

import csv
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from microcinema.data import video_writer
from microcinema.data.clip_reader import resize_and_crop
from microcinema.data.clips import ClipDataset
from microcinema.utils.errors import UserError

HEADERS = (
    ("videoid", "contentUrl", "duration", "page_dir", "name"),
    ("videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"),
)


def write_list(path: Path, header: tuple[str, ...], rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def video(count: int = 24, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frame k's blue channel is 5 k everywhere, so a clip tells which frames it holds."""
    rng = np.random.default_rng(seed)
    frames = np.stack([cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (width, height)) for _ in range(count)])
    frames[..., 2] = 5 * np.arange(count)[:, None, None]
    return frames


def shown(item: dict) -> list[int]:
    """The frame numbers of a clip of `video`."""
    return (item["video"][:, 2].float().mean(dim=(1, 2)) / 5).round().int().tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """Four videos: one in a page folder of the folder videos, one in a page folder, one flat with a page_dir, one flat without."""
    root = tmp_path_factory.mktemp("webvid")
    rows = [
        {
            "videoid": "0001",
            "name": 'A star, "red"',
            "page_dir": "000001_000050",
            "motion": "to the left",
            "duration": "PT00H00M03S",
        },
        {"videoid": "0002", "name": "A moon", "page_dir": "000001_000050", "description": "A green moon on sand"},
        {"videoid": "1000000003", "name": "Ein Herz, schön", "page_dir": "000051_000100"},
        {"videoid": "0004", "name": "A circle"},
    ]
    for k, row in enumerate(rows):
        folder = [root / "videos" / "000001_000050", root / "000001_000050", root, root][k]
        folder.mkdir(parents=True, exist_ok=True)
        video_writer.write_video(folder / f"{row['videoid']}.mp4", video(seed=k), fps=8, lossless=True)
    return root, rows


def test_files_with_other_suffixes_are_found(world, tmp_path):
    root, rows = world
    copy = shutil.copytree(root, tmp_path / "copy")
    path = copy / "000001_000050" / "0002.mp4"
    path.rename(path.with_suffix(".mkv"))
    files = [dataset((copy, rows), tmp_path).file(index).relative_to(copy) for index in range(4)]
    assert str(files[1]) == "000001_000050/0002.mkv" and {file.suffix for file in files} == {".mp4", ".mkv"}


def dataset(world, tmp_path, header=(*HEADERS[0], "description", "motion"), **arguments) -> ClipDataset:
    root, rows = world
    listing = write_list(tmp_path / "list.csv", header, rows)
    return ClipDataset(str(listing), str(root), **{"num_frames": 8, "fps": 8, "resolution": 32, **arguments})


@pytest.mark.parametrize("header", HEADERS)
def test_both_header_orders_and_all_layouts(world, tmp_path, header):
    clips = dataset(world, tmp_path, header, clip_position="first")
    assert len(clips) == 4
    for k, row in enumerate(world[1]):
        item = clips[k]
        assert (item["id"], item["caption"], item["index"], item["fps"]) == (row["videoid"], row["name"], k, 8.0)
        assert item["description"] == item["motion"] == item["caption"]  # these lists have one caption
        assert item["video"].shape == (8, 3, 32, 32)
        assert item["video"].dtype == torch.uint8
        assert torch.equal(item["video"], resize_and_crop(video(seed=k)[:8], (32, 32)))


def test_two_captions(world, tmp_path):
    clips = dataset(world, tmp_path)
    assert (clips[0]["description"], clips[0]["motion"]) == ('A star, "red"', "to the left")
    assert (clips[1]["description"], clips[1]["motion"]) == ("A green moon on sand", "A moon")


@pytest.mark.parametrize(("clip", "expected"), [("first", [0, 2, 4, 6]), ("center", [9, 11, 13, 15])])
def test_the_place_of_the_clip(world, tmp_path, clip, expected):
    assert shown(dataset(world, tmp_path, num_frames=4, fps=4, clip_position=clip)[0]) == expected


def test_native_rate(world, tmp_path):
    item = dataset(world, tmp_path, fps=None, clip_position="first")[0]
    assert (shown(item), item["fps"]) == (list(range(8)), 8.0)


def test_a_random_clip_depends_on_seed_epoch_and_index_alone(world, tmp_path):
    clips = dataset(world, tmp_path, seed=3)
    first = [shown(clips[k]) for k in range(4)]
    assert [shown(clips[k]) for k in reversed(range(4))] == first[::-1]
    assert len({start for start, *_ in first}) > 1
    clips.set_epoch(1)
    second = [shown(clips[k]) for k in range(4)]
    assert second != first
    assert [shown(dataset(world, tmp_path, seed=4)[k]) for k in range(4)] != first
    again = dataset(world, tmp_path, seed=3, decoder="decord")
    assert [shown(again[k]) for k in range(4)] == first
    long, starts = dataset(world, tmp_path, num_frames=20), []
    for epoch in range(30):
        long.set_epoch(epoch)
        frames = shown(long[0])
        assert np.diff(frames).tolist() == [1] * 19
        starts.append(frames[0])
    assert set(starts) == {0, 1, 2, 3, 4}  # every part of the video is reached


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_items_and_see_the_epoch(world, tmp_path, context):
    clips = dataset(world, tmp_path)
    loader = DataLoader(clips, batch_size=2, num_workers=1, multiprocessing_context=context)
    for epoch in (0, 1):
        clips.set_epoch(epoch)
        batches = list(loader)
        assert batches[0]["video"].shape == (2, 8, 3, 32, 32)
        assert [name for batch in batches for name in batch["id"]] == [row["videoid"] for row in world[1]]
        torch.testing.assert_close(
            torch.cat([batch["video"] for batch in batches]), torch.stack([clips[k]["video"] for k in range(4)])
        )


def test_a_worker_names_the_bad_clip(world, tmp_path):
    loader = DataLoader(dataset(world, tmp_path, num_frames=25), num_workers=1)
    with pytest.raises(UserError, match=r"0001\.mp4' \(24 frames at 8 fps, 3\.000 s\) is shorter"):
        next(iter(loader))


def test_pickles(world, tmp_path):
    clips = dataset(world, tmp_path)
    copy = pickle.loads(pickle.dumps(clips))
    torch.testing.assert_close(copy[2]["video"], clips[2]["video"])


# ------------------------------------------------------------------------------------------------ resize


@pytest.mark.parametrize(
    ("source", "size", "scaled", "corner"),
    [
        ((96, 128), (48, 48), (48, 64), (0, 8)),  # short side, then the middle
        ((128, 96), (48, 48), (64, 48), (8, 0)),
        ((90, 160), (32, 56), (32, 57), (0, 0)),
        ((20, 30), (40, 40), (40, 60), (0, 10)),  # enlarged if need be
        ((51, 67), (24, 32), (24, 32), (0, 0)),
    ],
)
def test_resize_agrees_with_pillow(source, size, scaled, corner):
    frames = video(2, *source)
    got = resize_and_crop(frames, size)
    assert got.shape == (2, 3, *size)
    for k in range(2):
        resized = np.array(Image.fromarray(frames[k]).resize(scaled[::-1], Image.Resampling.BICUBIC)).astype(int)
        expected = resized[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
        assert np.abs(got[k].permute(1, 2, 0).numpy() - expected).max() <= 1  # both round, not always the same way


def test_the_right_size_is_left_alone():
    frames = video(3)
    np.testing.assert_array_equal(resize_and_crop(frames, (48, 64)).permute(0, 2, 3, 1), frames)


def test_small_is_not_aliased():
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert resize_and_crop(stripes, (16, 16))[..., 2:-2].float().sub(127.5).abs().max() < 8


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"fps": -1}, "fps is -1"),
        ({"resolution": 36}, "36x36.* does not divide by 8"),
        ({"resolution": (32, 60)}, "32x60.* does not divide by 8"),
        ({"resolution": 48, "multiple_of": 32}, "does not divide by 32"),
        ({"resolution": 0}, "resolution is 0"),
        ({"resolution": (64, 64, 3)}, "64, 64, 3"),
        ({"decoder": "opencv"}, "decoder is 'opencv'"),
        ({"clip_position": "last"}, "clip_position is 'last'"),
    ],
)
def test_values_out_of_range_are_named(world, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        dataset(world, tmp_path, **arguments)


@pytest.mark.parametrize("column", ["videoid", "name"])
def test_a_missing_column_is_named(world, tmp_path, column):
    header = tuple(name for name in HEADERS[0] if name != column)
    with pytest.raises(UserError, match=f"lacks column {column}"):
        dataset(world, tmp_path, header)


def test_lists_that_are_none(world, tmp_path):
    arguments = {"root": str(world[0]), "num_frames": 8, "fps": 8, "resolution": 32}
    with pytest.raises(UserError, match="cannot be read"):
        ClipDataset(str(tmp_path / "none.csv"), **arguments)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="lacks column videoid and name"):
        ClipDataset(str(tmp_path / "empty.csv"), **arguments)
    (tmp_path / "header.csv").write_text("videoid,name\n")
    with pytest.raises(UserError, match="no rows"):
        ClipDataset(str(tmp_path / "header.csv"), **arguments)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read"):
        ClipDataset(str(tmp_path / "binary.csv"), **arguments)


def test_a_root_without_the_videos_shows_three_paths(world, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no video") as caught:
        dataset((empty, world[1]), tmp_path)
    page = Path("000001_000050", "0001.mp4")
    assert f"{empty / 'videos' / page}, {empty / page}, {empty / '0001.mp4'};" in str(caught.value)


def test_a_missing_or_short_video_is_named(world, tmp_path):
    root, rows = world
    clips = dataset((root, [*rows, {"videoid": "9", "name": "gone", "page_dir": "x"}]), tmp_path)
    with pytest.raises(UserError, match=r"video '9' is missing; tried .*videos/x/9\.mp4, .*/9\.mp4"):
        clips[4]
    with pytest.raises(
        UserError, match=r"0002\.mp4' \(24 frames at 8 fps, 3\.000 s\) is shorter than asked \(25 frames at 8 fps"
    ):
        dataset(world, tmp_path, num_frames=25)[1]
