"""Protocols: which texts, which real clips, and an identifier that changes with each of them."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fixtures import zero_shot_data
from microcinema.config.compose import compose
from microcinema.data.video_writer import write_video
from microcinema.evaluation.protocol import ZeroShotProtocol
from microcinema.evaluation.ucf101 import LISTS, VIDEOS, descriptive_prompts
from microcinema.evaluation.videos import Video
from microcinema.utils.errors import UserError


def preset(option: str, **changes) -> ZeroShotProtocol:
    protocol = compose("evaluate", [f"evaluation={option}"]).evaluation.protocol.build()
    return dataclasses.replace(protocol, **changes)


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory) -> Path:
    """The lists of 13,320 clips in 101 classes, no two as large; no videos."""
    root = tmp_path_factory.mktemp("ucf101")
    (root / VIDEOS).mkdir()
    (root / LISTS).mkdir()
    classes = list(descriptive_prompts())
    sizes = [81 + number for number in range(101)]
    sizes[-1] += 13320 - sum(sizes)
    clips = [f"{name}/v_{name}_g{i:03d}.avi" for name, size in zip(classes, sizes, strict=True) for i in range(size)]
    test = set(clips[::4]) | set(clips[-453:])
    lists = {"classInd": [f"{n} {name}" for n, name in enumerate(classes, 1)]}
    lists["testlist01"] = sorted(test)[:3783]
    lists["trainlist01"] = [f"{clip} 1" for clip in clips if clip not in set(lists["testlist01"])]
    for name, lines in lists.items():
        (root / LISTS / f"{name}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize(
    "option, samples, real, identifier",
    [
        ("ucf101", 13320, 13320, "svd-2-"),
        ("ucf101_videopoet", 10000, 9537, "videopoet-2-"),
        ("ucf101_lavie", 10100, 13320, "lavie-2-"),
        ("ucf101_styleganv2048", 2048, 2048, "styleganv2048-2-"),
    ],
)
def test_presets_of_ucf101_ask_for_what_the_papers_say(ucf101, option, samples, real, identifier):
    protocol = preset(option)
    asked, videos = protocol.samples(ucf101), protocol.real(ucf101)
    assert (len(asked), len(videos)) == (samples, real)
    assert len({video.name for video in videos}) == real
    assert [sample.sample_index for sample in asked] == list(range(samples))
    assert protocol.num_frames == 16
    assert protocol.identifier(asked, videos, {}).startswith(identifier)
    counts = Counter(sample.source.partition("/")[0] for sample in asked)
    if option == "ucf101":  # the data's own histogram
        assert counts == Counter(video.label for video in videos)
        assert (protocol.fps, protocol.height, protocol.width) == (25, 240, 320)
    if option == "ucf101_lavie":
        assert set(counts.values()) == {100} and "Apply Eye Makeup" in {sample.prompt for sample in asked}
    if option == "ucf101_videopoet":
        assert {sample.prompt for sample in asked} <= set(descriptive_prompts().values())
        assert not {video.name for video in videos} & {video.name for video in protocol.videos(ucf101, "test")}


def test_msrvtt_asks_for_one_caption_or_all(tmp_path):
    root = zero_shot_data.msrvtt(tmp_path)
    one, every = preset("msrvtt"), preset("msrvtt_all")
    assert (one.num_samples, one.num_real, every.num_samples) == (2990, 2990, 59800)
    assert [sample.source for sample in one.samples(root)] == list(zero_shot_data.CAPTIONS)
    assert [sample.source for sample in every.samples(root)][:3] == [
        f"video7010/{text.id}" for text in every.videos(root, "test")[0].captions
    ]
    assert len(one.samples(root)) == 4 and len(one.real(root)) == 4
    assert [sample.prompt for sample in every.samples(root)] == [
        text.strip() for captions in zero_shot_data.CAPTIONS.values() for text in captions
    ]
    assert every.real(root) == []


def test_draws_follow_the_seed_alone(ucf101):
    protocol = preset("ucf101_styleganv2048", num_samples=20, num_real=30)
    assert protocol.samples(ucf101) == protocol.samples(ucf101) and protocol.real(ucf101) == protocol.real(ucf101)
    other = dataclasses.replace(protocol, seed=1)
    assert other.samples(ucf101) != protocol.samples(ucf101) and other.real(ucf101) != protocol.real(ucf101)
    places = [protocol.position(index) for index in range(200)]
    assert places == [protocol.position(index) for index in range(200)]
    assert min(places) < 0.1 and max(places) > 0.9
    assert preset("ucf101").position(3) == 0.5


def test_the_identifier_changes_with_everything_that_changes_the_number(ucf101):
    protocol = preset("ucf101_styleganv2048", num_samples=5, num_real=5)
    samples, real = protocol.samples(ucf101), protocol.real(ucf101)
    detectors = {"VideoFeatures": {"sha256": "a", "preparation": "squash"}}
    seen = {protocol.identifier(samples, real, detectors)}
    assert protocol.identifier(list(samples), list(real), json.loads(json.dumps(detectors))) in seen
    for change in (
        {"fps": 8.0},
        {"height": 128},
        {"ddof": 1},
        {"clip_position": "first"},
        {"seed": 1},
        {"num_frames": 8},
    ):
        seen.add(dataclasses.replace(protocol, **change).identifier(samples, real, detectors))
    seen.add(protocol.identifier(samples[1:], real, detectors))
    seen.add(protocol.identifier(samples, real[1:], detectors))
    seen.add(protocol.identifier(samples, real, {"VideoFeatures": {"sha256": "b", "preparation": "squash"}}))
    assert len(seen) == 10


@pytest.mark.parametrize(
    "option, changes, words",
    [
        ("ucf101", {"prompts": "caption"}, "prompts=caption are not of ucf101"),
        ("msrvtt", {"selection": "per_class"}, "classes"),
        ("ucf101", {"selection": "every_caption"}, "captions"),
        ("ucf101", {"selection": "draw", "num_samples": None}, "num_samples"),
        ("ucf101", {"stride": 3}, "stride=3"),
        ("ucf101_lavie", {"keyframe": "own"}, "keyframe=own"),
    ],
)
def test_choices_that_exclude_each_other(option, changes, words):
    with pytest.raises(UserError, match=words):
        preset(option, **changes)


@pytest.mark.parametrize("option, real", [("ucf101_i2v", 2048), ("msrvtt_i2v", 4)])
def test_key_frames_of_real_clips_are_of_the_videos_that_are_asked_for(ucf101, tmp_path, option, real):
    root = ucf101 if option == "ucf101_i2v" else zero_shot_data.msrvtt(tmp_path)
    protocol = preset(option) if option == "ucf101_i2v" else preset(option, num_samples=4)
    asked, videos = protocol.samples(root), protocol.real(root)
    assert [sample.source for sample in asked] == [video.name for video in videos] and len(videos) == real
    assert (protocol.num_frames, protocol.fps, protocol.stride, protocol.keyframe) == (16, None, 3, "own")


def test_a_stride_takes_every_third_frame(tmp_path):
    frames = np.stack([np.full((16, 16, 3), 10 * k, np.uint8) for k in range(20)])
    write_video(tmp_path / "a.mp4", frames, 25, lossless=True)
    protocol = preset("msrvtt_i2v", num_frames=5)
    found = protocol.read(Video("a", tmp_path / "a.mp4"), 0)
    assert [round(frame.mean() / 10) for frame in found] == [0, 3, 6, 9, 12]
