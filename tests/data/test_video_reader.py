"""Real files, written and read through real codecs."""

import itertools
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from microcinema.data import video_reader, video_writer
from microcinema.utils.errors import UserError


def picture_frames(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colourful frames, each another: uint8 (f, h, w, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in coarse])


def encode(path: Path, frames: np.ndarray, stamps: list[Fraction], codec: str, pixels: str, **options: str) -> Path:
    """A file of any codec, with any presentation times (in seconds); `tag_` options set the codec's colour tags."""
    container_options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    tags = {key.removeprefix("tag_"): int(options.pop(key)) for key in list(options) if key.startswith("tag_")}
    with av.open(str(path), "w", options=container_options) as container:
        rate = Fraction(1) / (stamps[1] - stamps[0]) if len(stamps) > 1 else Fraction(8)
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        base = Fraction(1, 1000) if len(set(np.diff(stamps))) > 1 else 1 / rate
        stream.codec_context.time_base = base
        for tag, value in tags.items():
            setattr(stream.codec_context, tag, value)
        for array, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = round(stamp / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def regular(count: int, fps: int | Fraction, start: Fraction = Fraction(0)) -> list[Fraction]:
    return [start + k / Fraction(fps) for k in range(count)]


def plain_decode(path: Path) -> np.ndarray:
    """The oracle: every frame, in order, by nothing but PyAV's own calls."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


# ------------------------------------------------------------------------------------------------ decoders

FILES = {
    "b_frames": (40, 64, 96, 24, "libx264", "yuv420p", {"bf": "3", "g": "12"}),
    "one_key_frame": (40, 48, 80, 30, "libx264", "yuv420p", {"bf": "2", "g": "250"}),
    "open_gop": (40, 64, 64, 25, "libx264", "yuv420p", {"bf": "3", "x264-params": "open-gop=1:keyint=10"}),
    "ntsc": (40, 50, 70, Fraction(30000, 1001), "libx264", "yuv420p", {"bf": "2"}),
    "slow": (20, 66, 98, 8, "libx264", "yuv420p", {"bf": "0"}),
    "bt709": (20, 64, 64, 24, "libx264", "yuv420p", {"tag_colorspace": "1"}),
    "full_range": (20, 64, 64, 24, "libx264", "yuvj420p", {}),
    "odd_444": (20, 51, 67, 24, "libx264", "yuv444p", {"bf": "2"}),
    "rgb": (20, 51, 67, 24, "libx264rgb", "rgb24", {"crf": "0"}),
    "webvid": (20, 168, 298, 24, "libx264", "yuv420p", {"bf": "2"}),
    "width_48": (20, 64, 48, 24, "libx264", "yuv420p", {}),
    "hevc": (40, 64, 96, 24, "libx265", "yuv420p", {"x265-params": "log-level=error:keyint=12:open-gop=1"}),
}


@pytest.mark.parametrize("name", FILES)
def test_both_decoders_give_the_same_bytes_and_the_right_frames(tmp_path, name):
    """Largest difference allowed: 0. Frames are checked against a decode of the whole file."""
    count, height, width, rate, codec, pixels, options = FILES[name]
    frames = picture_frames(count, height, width)
    path = encode(tmp_path / "a.mp4", frames, regular(count, rate), codec, pixels, **options)
    whole = plain_decode(path)
    assert whole.shape == frames.shape
    assert psnr(whole, frames) > 20  # the oracle itself shows the pictures that went in, in their order

    for num_frames, position in itertools.product((1, 5, 17), (0.0, 0.37, 0.5, 1.0)):
        first = min(int(position * (count - num_frames + 1)), count - num_frames)
        expected = whole[first : first + num_frames]
        for decoder in video_reader.DECODERS:
            got = video_reader.read_clip(path, num_frames, position=position, decoder=decoder)
            np.testing.assert_array_equal(got, expected, err_msg=f"{decoder}, {num_frames} frames at {position}")
    for start in (0.11, 0.3):
        slower = [
            video_reader.read_clip(path, 4, fps=float(rate) / 3, start=start, decoder=d) for d in video_reader.DECODERS
        ]
        np.testing.assert_array_equal(*slower)


def test_variable_frame_rate_is_read_by_time(tmp_path):
    gaps = [0.02] * 10 + [0.08] * 10 + [0.03] * 10
    stamps = [round(Fraction(sum(gaps[:k])), 3) for k in range(31)]
    path = encode(tmp_path / "a.mp4", picture_frames(31, 48, 64), stamps, "libx264", "yuv420p", g="7")
    whole, times = plain_decode(path), np.array(stamps, dtype=float)
    for fps, start in itertools.product((8, 12.5, 30), (0.0, 0.1)):
        wanted = start + np.arange(8) / fps
        nearest = [int(np.argmin(np.abs(times - moment).round(6))) for moment in wanted]
        for decoder in video_reader.DECODERS:
            got = video_reader.read_clip(path, 8, fps=fps, start=start, decoder=decoder)
            np.testing.assert_array_equal(got, whole[nearest])


def test_the_clock_starts_with_the_first_frame(tmp_path):
    stamps = regular(16, 8, start=Fraction(5, 2))
    path = encode(tmp_path / "a.mkv", picture_frames(16, 48, 64), stamps, "libx264", "yuv420p")
    assert video_reader.probe(path).duration == pytest.approx(2, abs=2e-3)  # Matroska counts milliseconds
    for decoder in video_reader.DECODERS:
        got = video_reader.read_clip(path, 4, fps=4, start=0.5, decoder=decoder)
        np.testing.assert_array_equal(got, plain_decode(path)[[4, 6, 8, 10]])


def test_avi_stores_no_stamps_and_is_counted(tmp_path):
    frames = picture_frames(20, 48, 64)
    path = encode(tmp_path / "a.avi", frames, regular(20, 25), "mpeg4", "yuv420p", bf="2", qscale="3")
    whole = plain_decode(path)
    for decoder in video_reader.DECODERS:
        np.testing.assert_array_equal(
            video_reader.read_clip(path, 5, fps=12.5, start=0.2, decoder=decoder), whole[5:15:2]
        )
    assert video_reader.probe(path) == video_reader.VideoInfo(20, 25.0, 64, 48, 0.8)


@pytest.mark.parametrize(("degrees", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_a_rotated_video_is_read_as_displayed(tmp_path, degrees, matrix):
    path = encode(tmp_path / "a.mp4", picture_frames(6, 48, 64), regular(6, 8), "libx264", "yuv420p")
    upright = plain_decode(path)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 44  # ISO 14496-12: the track header's matrix
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clockwise = np.rot90(upright, -degrees // 90, axes=(1, 2))
    info = video_reader.probe(path)
    assert (info.height, info.width) == clockwise.shape[1:3]
    for decoder in video_reader.DECODERS:
        np.testing.assert_array_equal(video_reader.read_clip(path, 6, decoder=decoder), clockwise)


# ------------------------------------------------------------------------------------------------ choice of frames


@pytest.fixture(scope="module")
def two_seconds(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "two_seconds.mp4"
    video_writer.write_video(path, picture_frames(48, 48, 64), fps=24)
    return path


@pytest.mark.parametrize(
    ("num_frames", "fps", "start", "position", "expected"),
    [
        (16, 8, 0.0, 0.0, np.arange(0, 48, 3)),  # all of it: the last wanted moment is frame 45
        (4, 16, 0.0, 0.0, [0, 1, 3, 4]),  # 1.5 frames apart: of two equally near frames the earlier
        (6, 48, 0.0, 0.0, [0, 0, 1, 1, 2, 2]),  # faster than the file: repeats
        (96, 48, 0.0, 0.0, np.arange(96) // 2),  # up to the moment at which the last frame disappears
        (3, 12, 0.5, 0.0, [12, 14, 16]),
        (3, 12, 0.0, 1.0, [43, 45, 47]),  # as late as possible
        (3, 12, 1.0, 0.5, [34, 36, 38]),  # the middle of the starts from 1 s (frame 24) to the latest (frame 43)
        (1, 8, 0.0, 0.5, [24]),
        (48, None, 0.0, 0.9, np.arange(48)),
        (5, None, 0.99, 0.0, np.arange(24, 29)),
        (40, None, 0.0, 0.5, np.arange(4, 44)),
    ],
)
def test_frames_are_picked_by_time(two_seconds, num_frames, fps, start, position, expected):
    got = video_reader.read_clip(two_seconds, num_frames, fps, start, position)
    np.testing.assert_array_equal(got, plain_decode(two_seconds)[np.asarray(expected)])


@pytest.mark.parametrize(
    ("num_frames", "fps", "start"),
    [(17, 8, 0.0), (16, 8, 0.2), (97, 48, 0.0), (49, None, 0.0), (1, None, 2.0), (1, 8, 2.0)],
)
def test_a_clip_shorter_than_asked_is_refused(two_seconds, num_frames, fps, start):
    with pytest.raises(UserError, match=r"two_seconds\.mp4' \(48 frames at 24 fps, 2\.000 s\) is shorter than asked"):
        video_reader.read_clip(two_seconds, num_frames, fps, start)


def test_nearest_frames_agrees_with_a_search():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.2, 50))
    wanted = rng.uniform(-1, times[-1] + 1, 500)
    expected = np.abs(wanted[:, None] - times).argmin(axis=1)
    np.testing.assert_array_equal(video_reader.nearest_frames(times, wanted), expected)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("size", [(64, 64), (51, 67), (50, 67), (1, 1)])
@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001, 12.5])
def test_written_video_has_exactly_the_size_count_and_rate(tmp_path, size, fps):
    frames = picture_frames(7, *size)
    for lossless in (False, True):
        path = tmp_path / f"{lossless}.mp4"
        video_writer.write_video(path, frames, fps, lossless=lossless)
        info = video_reader.probe(path)
        assert (info.num_frames, info.height, info.width) == (7, *size)
        assert info.fps == pytest.approx(fps, rel=1e-9)
        assert info.duration == pytest.approx(7 / fps, abs=1e-6)
        with av.open(str(path)) as container:
            assert container.duration == pytest.approx(7 / fps * av.time_base, abs=2)
    for decoder in video_reader.DECODERS:
        np.testing.assert_array_equal(video_reader.read_clip(path, 7, decoder=decoder), frames)


def test_quality_follows_crf(tmp_path):
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in picture_frames(12, 64, 64)])
    quality, sizes = [], []
    for crf in (0, 18, 40):
        path = tmp_path / f"{crf}.mp4"
        video_writer.write_video(path, frames, 8, crf=crf)
        quality.append(psnr(video_reader.read_clip(path, 12), frames))
        sizes.append(path.stat().st_size)
    assert quality[0] > quality[1] > quality[2] + 3
    assert quality[1] > 36
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is of the GNU C library")
def test_the_same_frames_give_the_same_bytes(tmp_path):
    """In other processes, and whatever fresh memory happens to hold: MALLOC_PERTURB_ fills it."""
    np.save(
        tmp_path / "frames.npy", np.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in picture_frames(24, 64, 64)])
    )
    program = (
        "import sys, numpy; from microcinema.data import video_writer;"
        "video_writer.write_video(sys.argv[2], numpy.load(sys.argv[1]), 8, crf=30)"
    )
    written = []
    for fill in ("0", "1", "85"):
        path = tmp_path / f"{fill}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", program, tmp_path / "frames.npy", path], check=True, env=environment)
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_colours_survive(tmp_path):
    """Plain areas of saturated colours come back within 3 of 255: neither range nor matrix is mistaken."""
    colours = np.array(
        [[232, 38, 43], [31, 179, 61], [36, 92, 237], [250, 222, 33], [255, 255, 255], [0, 0, 0]], dtype=np.uint8
    )
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3))
    video_writer.write_video(tmp_path / "a.mp4", frames, 8)
    np.testing.assert_allclose(video_reader.read_clip(tmp_path / "a.mp4", 6), frames.astype(float), atol=3)


@pytest.mark.parametrize("fps", [8, 24, 10])
def test_gif_keeps_pictures_size_and_length(tmp_path, fps):
    frames = picture_frames(16, 32, 48)
    video_writer.write_gif(tmp_path / "a.gif", frames, fps)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["loop"]) == ((48, 32), 16, 0)
        shown, length = [], 0
        for k in range(16):
            gif.seek(k)
            shown.append(np.array(gif.convert("RGB")))
            length += gif.info["duration"]
    assert psnr(np.stack(shown), frames) > 25
    assert length == pytest.approx(1000 * 16 / fps, abs=5)


def test_gif_of_few_colours_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (200, 3), dtype=np.uint8)
    frames = palette[rng.integers(0, 200, (5, 16, 16))]
    video_writer.write_gif(tmp_path / "a.gif", frames, 10)
    with Image.open(tmp_path / "a.gif") as gif:
        for k in range(5):
            gif.seek(k)
            np.testing.assert_array_equal(np.array(gif.convert("RGB")), frames[k])


def test_a_large_gifs_palette_of_some_pixels_is_nearly_as_good_as_one_of_all(tmp_path):
    rng = np.random.default_rng(0)
    colors = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((136, 128), Image.BICUBIC)
    clip = np.stack([np.asarray(colors)[:, k : k + 128] for k in range(8)])
    video_writer.write_gif(tmp_path / "a.gif", clip, 8)
    found = []
    with Image.open(tmp_path / "a.gif") as gif:
        for k in range(8):
            gif.seek(k)
            found.append(np.array(gif.convert("RGB")))
    tall = Image.fromarray(clip.reshape(-1, 128, 3)).quantize(256, kmeans=1, dither=Image.Dither.NONE)
    best = np.asarray(tall.convert("RGB")).reshape(clip.shape)
    error, least = (np.square(frames.astype(float) - clip).mean() for frames in (np.stack(found), best))
    assert 0 < least < error < 1.1 * least


def test_contact_sheet_shows_every_frame(tmp_path):
    frames = picture_frames(6, 40, 60)
    video_writer.write_contact_sheet(tmp_path / "a.png", frames, columns=3)
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (8 + 40 + 4 + 40 + 8, 8 + 3 * 60 + 2 * 4 + 8, 3)
    for k, frame in enumerate(frames):
        top, left = 8 + k // 3 * 44, 8 + k % 3 * 64
        np.testing.assert_array_equal(sheet[top : top + 40, left : left + 60], frame)


def test_contact_sheet_of_several_clips_with_captions(tmp_path):
    clips = [picture_frames(4, 40, 60), picture_frames(2, 32, 32)]
    caption = "a large red star moving quickly to the left on sand, then to the right on grass, and so on"
    video_writer.write_contact_sheet(tmp_path / "a.png", clips, captions=[caption, ""])
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape[1] == 8 + 4 * 60 + 3 * 4 + 8
    text = sheet[8:40, 8:-8]
    assert text.min() < 64  # dark letters on white
    assert text[:, -4:].min() == 255  # wrapped, not cut
    height = sheet.shape[0]
    np.testing.assert_array_equal(sheet[height - 40 : height - 8, 8:40], clips[1][0])


@pytest.mark.parametrize("below", [False, True])
def test_contact_sheet_marks_the_key_frame_beside_its_pixels(tmp_path, below):
    """Also where they have the color of the mark itself; and nothing else on the sheet moves."""
    mark = np.array(video_writer._MARK, np.uint8)
    assert 255 - mark.min() > 200  # seen on white
    clips = [picture_frames(6, 40, 60), np.zeros((4, 40, 60, 3), np.uint8) + mark, picture_frames(3, 40, 60)]
    sheets = []
    for keyframes in (None, [4, 0, None]):
        path = tmp_path / "a.png"
        video_writer.write_contact_sheet(path, clips, ["one", "two", ""], 3, below, keyframes)
        sheets.append(np.array(Image.open(path)).astype(int))
    plain, marked = sheets
    changed = (plain != marked).any(axis=2)
    assert (marked[changed] == mark).all() and (plain[changed] == 255).all()
    text = 0 if below else 18 + 4
    tops, lefts = (
        (8 + text + 44, 8 + text + 84 + (18 + 4) + 12),
        (8 + 64, 8),
    )  # frame 4 of the first clip, 0 of the second
    expected = np.zeros_like(changed)
    for top, left in zip(tops, lefts, strict=True):
        expected[top - 3 : top + 43, left - 3 : left + 63] = True
        expected[top - 1 : top + 41, left - 1 : left + 61] = False
        assert (marked[top - 1, left - 1 : left + 61] == 255).all()  # white between border and picture
    np.testing.assert_array_equal(changed, expected)


# ------------------------------------------------------------------------------------------------ bad input


def broken_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "missing":
        return path
    if kind == "audio_only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path
    if kind == "wrong_extension":
        path.write_text("not a video " * 200)
        return path
    video_writer.write_video(path, picture_frames(60, 64, 96), 24)  # the index is at the front
    data = bytearray(path.read_bytes())
    if kind == "empty":
        data = bytearray()
    elif kind == "truncated_header":
        data = data[: data.index(b"mdat") // 2]
    elif kind == "truncated_middle":
        data = data[: len(data) // 2]
    elif kind == "damaged_middle":
        middle = len(data) // 2
        data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    return path


BROKEN = {
    "missing": "does not exist",
    "empty": "is empty",
    "wrong_extension": "cannot be decoded",
    "truncated_header": "cannot be decoded",
    "truncated_middle": "cannot be decoded",
    "damaged_middle": "cannot be decoded",
    "audio_only": "no video stream",
}


@pytest.mark.parametrize("decoder", video_reader.DECODERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path, kind, decoder):
    path = broken_file(tmp_path, kind)
    with pytest.raises(UserError, match=BROKEN[kind]) as caught:
        video_reader.read_clip(path, 60, decoder=decoder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "damaged_middle"])
def test_probe_refuses_a_broken_file(tmp_path, kind):
    with pytest.raises(UserError, match=BROKEN[kind]):
        video_reader.probe(broken_file(tmp_path, kind))


@pytest.mark.parametrize(
    "arguments",
    [{"num_frames": 0}, {"fps": 0.0}, {"fps": -8.0}, {"start": -1.0}, {"position": 1.5}, {"decoder": "opencv"}],
)
def test_values_out_of_range_are_named(two_seconds, arguments):
    with pytest.raises(UserError, match=f"{next(iter(arguments))}='?{next(iter(arguments.values()))}"):
        video_reader.read_clip(two_seconds, **{"num_frames": 4, **arguments})


def test_nothing_is_written_from_bad_input(tmp_path):
    good = picture_frames(2, 16, 16)
    for frames, keywords in [
        (good.astype(float), {}),
        (good[:0], {}),
        (good[0], {}),
        (good, {"fps": 0}),
        (good, {"crf": 99}),
    ]:
        with pytest.raises(UserError):
            video_writer.write_video(tmp_path / "a.mp4", frames, **{"fps": 8, **keywords})
    for keywords in ({"captions": ["one"]}, {"keyframes": [0]}):
        with pytest.raises(UserError, match="captions and key frames of all or none"):
            video_writer.write_contact_sheet(tmp_path / "a.png", [good, good], **keywords)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        video_writer.write_video(tmp_path / "file" / "a.mp4", good, 8)


def test_importing_loads_no_codec():
    heavy = "import sys, microcinema.data.video_reader; print([m for m in ('av', 'decord', 'torch', 'PIL', 'cv2') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("decoder", video_reader.DECODERS)
def test_reading_many_clips_does_not_grow(two_seconds, decoder):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def read(times: int) -> None:
        for k in range(times):
            video_reader.read_clip(two_seconds, 8, fps=8, position=k % 10 / 10, decoder=decoder)

    read(50)
    before = resident()
    read(150)
    assert resident() - before < 8 << 20  # a leak of one 48-frame video of these per read would be 66 MB
