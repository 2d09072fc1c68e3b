import dataclasses
import io
import itertools

import av
import cv2
import numpy as np
import pytest

from microcinema.sprites import scene
from microcinema.sprites.tracking import NO_MOTION, judge_motion, segment, track


def every_motion(seed: int = 0) -> list[scene.Sprite]:
    """One clip of each shape, motion and speed; colours, sizes and backgrounds take turns."""
    rng = np.random.default_rng(seed)
    looks = itertools.cycle(itertools.product(scene.COLOURS, scene.BACKGROUNDS, scene.SIZES))
    clips = []
    for shape, motion in itertools.product(scene.SHAPES, scene.MOTIONS):
        if shape == "circle" and motion in scene.ROTATIONS:
            continue
        for speed in [""] if motion == "still" else scene.SPEEDS:
            for _ in range(5):  # coprime to the 72 looks
                colour, background, size = next(looks)
            clips.append(scene.place(rng, shape, colour, size, background, motion, speed))
    return clips


def h264(frames: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def blur(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 1.2) for frame in frames])


def wobble(frames: np.ndarray) -> np.ndarray:
    """What a generated clip adds: smooth distortion, jitter and blotches of colour, new in every frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)

    def smooth(spread: float, *shape: int) -> np.ndarray:
        noise = cv2.GaussianBlur(rng.normal(size=(*frames.shape[1:3], *shape)).astype(np.float32), (0, 0), spread)
        return noise / noise.std()

    result = []
    for frame in frames:
        dx, dy = smooth(5) * 0.5 + rng.normal(0, 0.5), smooth(5) * 0.5 + rng.normal(0, 0.5)
        warped = cv2.remap(
            frame,
            x + dx.astype(np.float32),
            y + dy.astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        result.append(np.clip(warped + 10 * smooth(2, 3), 0, 255).astype(np.uint8))
    return np.stack(result)


@pytest.mark.parametrize(("damage", "clips"), [(np.copy, 110), (h264, 55), (blur, 55), (wobble, 55)])
def test_names_the_motion_of_real_clips(damage, clips):
    chosen = every_motion()[:: 110 // clips]
    assert len(chosen) == clips
    verdicts = [judge_motion(damage(scene.render(sprite).frames), fps=8.0) for sprite in chosen]
    wrong = [
        (scene.combined_caption(s), v.name, v.speed)
        for s, v in zip(chosen, verdicts, strict=True)
        if (s.motion, s.speed) != (v.name, v.speed)
    ]
    assert len(wrong) <= 0.01 * clips + 0.5, wrong


def test_played_backwards_every_steady_motion_turns_into_its_opposite():
    opposites = [
        ("left", "right"),
        ("up", "down"),
        ("clockwise", "counterclockwise"),
        ("growing", "shrinking"),
        ("still", "still"),
        ("bouncing", "bouncing"),
    ]
    opposite = {a: b for pair in opposites for a, b in (pair, pair[::-1])}
    for sprite in every_motion(seed=1)[::7]:
        verdict = judge_motion(scene.render(sprite).frames[::-1], fps=8.0)
        if sprite.motion != "bouncing":  # it need not end on the ground
            assert (verdict.name, verdict.speed) == (opposite[sprite.motion], sprite.speed)


def test_rates_are_the_worlds():
    rng = np.random.default_rng(3)
    moving = scene.place(rng, "heart", "red", "small", "grass", "left", "quickly")
    rates = judge_motion(scene.render(moving).frames, 8.0).rates
    assert rates["x"] == pytest.approx(-scene.TRANSLATION_SPEED[1] * moving.pace, rel=0.02) and abs(rates["y"]) < 0.1
    turning = scene.place(rng, "star", "blue", "large", "sand", "counterclockwise", "quickly")
    assert judge_motion(scene.render(turning).frames, 8.0).rates["turn"] == pytest.approx(
        -scene.ROTATION_SPEED[1] * turning.pace, rel=0.05
    )
    growing = scene.place(rng, "moon", "yellow", "small", "night", "growing", "slowly")
    assert judge_motion(scene.render(growing).frames, 8.0).rates["scale"] == pytest.approx(
        scene.SCALING_SPEED[0] * growing.pace, rel=0.1
    )
    bouncing = scene.place(rng, "square", "green", "small", "brick", "bouncing", "slowly")
    assert judge_motion(scene.render(bouncing).frames, 8.0).rates["bounce"] == pytest.approx(
        scene.BOUNCE_HEIGHT, rel=0.1
    )


@pytest.mark.parametrize(("num_frames", "size", "fps"), [(32, 64, 16.0), (8, 64, 4.0), (16, 128, 8.0)])
def test_frame_rate_and_resolution_do_not_matter(num_frames, size, fps):
    for sprite in every_motion(seed=2)[::9]:
        if (
            fps == 4.0
            and (sprite.motion in scene.ROTATIONS or sprite.motion == "bouncing")
            and sprite.speed == "quickly"
        ):
            continue  # too few frames a turn or a bounce
        verdict = judge_motion(scene.render(sprite, num_frames, size, fps).frames, fps)
        assert (verdict.name, verdict.speed) == (sprite.motion, sprite.speed), scene.combined_caption(sprite)


def test_mask_follows_the_true_mask():
    for sprite in every_motion(seed=4)[::11]:
        clip = scene.render(sprite)
        mask = segment(clip.frames)
        union = np.maximum(mask, clip.masks).sum()
        assert np.minimum(mask, clip.masks).sum() / union > 0.8
        true_places = [
            (clip.masks[f][..., None] * np.mgrid[:64, :64].transpose(1, 2, 0)[..., ::-1]).sum((0, 1))
            / clip.masks[f].sum()
            + 0.5
            for f in range(16)
        ]
        np.testing.assert_allclose(track(clip.frames).position, true_places, atol=0.4)


def test_a_frozen_clip_stays_still_and_an_empty_scene_has_no_motion():
    for sprite in every_motion()[::13]:
        clip = scene.render(sprite)
        assert judge_motion(np.repeat(clip.frames[:1], 16, axis=0), 8.0).name == "still"
    rng = np.random.default_rng(0)
    for background in scene.BACKGROUNDS:
        elsewhere = scene.place(rng, "star", "red", "small", background, "still", "")
        empty = scene.render(dataclasses.replace(elsewhere, x=-500.0, y=-500.0)).frames
        assert judge_motion(empty, 8.0).name == NO_MOTION, background
    assert judge_motion(np.zeros((16, 64, 64, 3), np.uint8), 8.0).name == NO_MOTION
    assert judge_motion(scene.render(elsewhere, num_frames=1).frames, 8.0).name == NO_MOTION
