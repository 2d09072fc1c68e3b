"""Watermarks cut off, filled in, or named."""

import numpy as np
import pytest
import torch

from microcinema.data import video_reader, video_writer
from microcinema.data.clip_reader import resize_and_crop
from microcinema.data.clips import ClipDataset
from microcinema.data.watermark import Watermark
from microcinema.utils.errors import UserError

BOX = [0.25, 0.5, 0.75, 0.625]
ROWS, COLUMNS = slice(40, 50), slice(32, 96)


def marked() -> np.ndarray:
    """Two frames of a gradient that the watermark's box covers in white: uint8 (2, 80, 128, 3)."""
    frames = np.stack([np.tile(np.linspace(k, 150, 128).astype(np.uint8)[None, :, None], (80, 1, 3)) for k in (0, 60)])
    frames[:, ROWS, COLUMNS] = 255
    return frames


def test_crop_keeps_the_largest_part_without_it():
    frames = marked()
    cropped = Watermark("crop", BOX).pixels(frames, (64, 64))
    np.testing.assert_array_equal(cropped, frames[:, :40])
    assert cropped.max() <= 150
    beside = Watermark("crop", [0.4, 0.0, 0.6, 1.0]).pixels(frames, (64, 32))  # nothing above or below
    assert beside.shape[1:3] == (80, 51)
    tall = Watermark("crop", [0.0, 0.4, 0.3, 0.6]).pixels(frames, (80, 40))  # right of it a tall clip finds more room
    assert tall.shape[1:3] == (80, 89)


def test_mask_fills_it_from_around():
    frames = marked()
    filled = Watermark("mask", BOX).pixels(frames, (64, 64))
    clean = marked()
    clean[:, ROWS, COLUMNS] = clean[:, :1, COLUMNS]
    assert np.abs(filled.astype(int) - clean).max() < 25 and frames.max() == 255  # the input is left alone
    outside = np.ones(frames.shape[:3], bool)
    outside[:, ROWS, COLUMNS] = False
    np.testing.assert_array_equal(filled[outside], frames[outside])


def test_tag_names_it_and_leaves_the_pixels():
    tag = Watermark("tag", BOX, tag="stock footage")
    frames = marked()
    assert tag.pixels(frames, (64, 64)) is frames
    assert tag.caption("a cat") == "a cat, stock footage"
    assert Watermark("crop", BOX).caption("a cat") == "a cat"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("blur", BOX), "watermark.action is 'blur', but should be 'crop', 'mask' or 'tag'"),
        (("crop", [0.5, 0.5, 0.2, 0.9]), "box=.0.5, 0.5, 0.2, 0.9.; give .left, top, right, bottom."),
        (("mask", [0, 0, 1.5, 1]), "watermark.box is .*should be less than or equal to 1"),
        (("mask", [0, 0, 1]), "watermark.box is "),
        (("crop", [0, 0, 1, 1]), "covers the whole frame"),
    ],
)
def test_bad_watermarks(arguments, said):
    with pytest.raises(UserError, match=said):
        Watermark(*arguments)


def test_the_options_reach_the_clips(tmp_path):
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 48, 80, 3), dtype=np.uint8), 8, axis=0)
    video_writer.write_video(tmp_path / "2.mp4", frames, 8)
    (tmp_path / "list.csv").write_text("videoid,name\n2,video 2\n")

    def clips(**more) -> ClipDataset:
        return ClipDataset(tmp_path / "list.csv", tmp_path, 4, 8.0, 32, **more)

    plain, wide = clips(clip_position="first"), {"action": "crop", "box": [0.0, 0.5, 1.0, 1.0]}
    cropped = clips(clip_position="first", watermark=wide)
    frames = video_reader.read_clip(tmp_path / "2.mp4", 4, 8.0)[:, :24]
    torch.testing.assert_close(cropped[0]["video"], resize_and_crop(frames, (32, 32)))
    assert cropped.fingerprint() == plain.fingerprint() | {"watermark": ["crop", 0.0, 0.5, 1.0, 1.0, ""]}
    tagged = clips(watermark={"action": "tag", "box": BOX})
    assert tagged[0]["caption"] == tagged[0]["motion"] == "video 2, watermark"
    assert tagged.reader.transform["watermark"] == ["tag", *BOX, "watermark"]
