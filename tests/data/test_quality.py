"""Measures of a single clip: cuts, copies, hashes and the small frames that they are computed from."""

import cv2
import numpy as np

from fixtures import broken_videos
from microcinema.data import quality, video_reader, video_writer


def test_cuts_are_told_from_motion_and_flashes():
    assert quality.find_cut(np.array([2.0, 3, 40, 2, 3])) == 3
    assert quality.find_cut(np.array([40.0, 2, 2])) == 1
    assert quality.find_cut(np.array([30.0, 35, 40, 38, 30])) is None  # all of it is fast
    assert quality.find_cut(np.array([2.0, 40, 40, 2])) is None  # a flash: there and back
    assert quality.find_cut(np.array([1.0, 10, 1])) is None
    assert quality.find_cut(np.array([40.0])) is None
    assert quality.find_cut(np.array([2.0, 30, 2, 2, 60, 3])) == 5


def test_the_first_of_several_copies_is_named():
    rng = np.random.default_rng(0)
    clip_hashes = rng.integers(1, 2**63, (50, 3), dtype=np.uint64)
    clip_hashes[40] = clip_hashes[7]
    clip_hashes[45] = clip_hashes[7]
    clip_hashes[45, 2] ^= np.uint64(0b111)  # three bits of a re-encoded copy
    clip_hashes[30, 0] = clip_hashes[8, 0]  # the same first frame alone is another clip
    clip_hashes[[10, 11], :] = 0  # blank frames are not the same clip
    first = quality.first_copies(clip_hashes)
    assert {k: int(v) for k, v in enumerate(first) if v >= 0} == {40: 7, 45: 7}


def test_hashes_stand_another_size_and_codec(tmp_path):
    frames = broken_videos.frames(3, 16, 96, 160)
    video_writer.write_video(tmp_path / "a.mp4", np.stack([cv2.resize(f, (320, 192)) for f in frames]), 8, crf=32)
    again = video_reader.survey(tmp_path / "a.mp4", quality.SIZE, 8.0, 100)[2]
    one, other = quality.hashes(frames), quality.hashes(again)
    assert sum(bin(a ^ b).count("1") for a, b in zip(one, other, strict=True)) <= 6
    assert (
        sum(
            bin(a ^ b).count("1")
            for a, b in zip(one, quality.hashes(broken_videos.frames(4, 16, 96, 160)), strict=True)
        )
        > 40
    )


def test_survey_sees_the_right_frames(tmp_path):
    frames = broken_videos.frames(5, 40, 96, 160)
    video_writer.write_video(tmp_path / "a.mp4", frames, 24, lossless=True)
    info, times, small = video_reader.survey(tmp_path / "a.mp4", frames.shape[1:3], 8.0, 100)
    assert info == video_reader.probe(tmp_path / "a.mp4")
    np.testing.assert_allclose(times, np.arange(14) / 8, atol=1e-3)
    np.testing.assert_array_equal(small, frames[::3])
    assert len(video_reader.survey(tmp_path / "a.mp4", (24, 40), 8.0, 3)[2]) == 3
    broken_videos.rotated(tmp_path / "r.mp4", 0)
    info, _, small = video_reader.survey(tmp_path / "r.mp4", (96, 64), 8.0, 100)
    assert (info.height, info.width) == (96, 64)
    np.testing.assert_array_equal(small, video_reader.read_clip(tmp_path / "r.mp4", 16))
