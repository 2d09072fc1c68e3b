"""What is read at time t is what a sequential decoder shows at time t, as displayed: a table of files, each read in every way.

The decoder is PyAV's own, which decodes each file from its beginning; pictures show their numbers, which tell their true times. The quick tests
read a sample of the table, the slow ones the rest.
"""

import itertools
import struct
import tarfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

from fixtures.video_files import FPS, INTERLACED, REGULAR, SIZE, VARIABLE, copy, display, number_of, picture, write
from microcinema.data import quality, video_index, video_reader
from microcinema.data.clip_reader import ClipReader, resize_and_crop
from microcinema.data.decoder_process import DecoderProcess
from microcinema.data.video_index import TarMember, read_index
from microcinema.utils.errors import UserError

CODECS = {
    ".3gp": "libx264",
    ".avi": "ffv1 huffyuv libvpx libx264 mjpeg mpeg4 msmpeg4v3",
    ".flv": "flv libx264",
    ".gif": "gif",
    ".h264": "libx264",
    ".ivf": "libsvtav1 libvpx libvpx-vp9",
    ".m2ts": "libx264",
    ".m4v": "mpeg4",
    ".mkv": "ffv1 libsvtav1 libvpx libvpx-vp9 libx264 libx265 mjpeg mpeg2video mpeg4",
    ".mov": "libx264 mjpeg png prores_ks qtrle",
    ".mp4": "libsvtav1 libvpx-vp9 libx264 libx265 mjpeg mpeg4",
    ".mpg": "mpeg1video mpeg2video",
    ".mxf": "mpeg2video",
    ".nut": "libx264 mpeg4",
    ".ts": "libx264 libx265 mpeg2video mpeg4",
    ".webm": "libsvtav1 libvpx libvpx-vp9",
    ".wmv": "msmpeg4v3 wmv2",
}
B_FRAMES: dict[str, dict[str, Any]] = {
    **{codec: {"max_b_frames": 2, "gop_size": 12} for codec in ("libx264", "mpeg1video", "mpeg2video", "mpeg4")},
    "libx265": {"x265-params": "log-level=none:keyint=12:bframes=2"},
}
CONSTANT_RATE = (".h264", ".m4v", ".mpg", ".mxf")  # they store no times, or not of every frame
GROUPS = {  # groups of pictures of x264
    "closed": "keyint=12:bframes=2",
    "open": "open-gop=1:keyint=12:bframes=3",
    "refreshed": "intra-refresh=1:keyint=12:bframes=0",  # no key frame but the first
}
SIZE_CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    *((codec, ".ts", {}) for codec in ("libx264", "libx265", "mpeg2video")),
    *((codec, ".webm", {}) for codec in ("libvpx", "libvpx-vp9")),
    *((codec, ".avi", {}) for codec in ("mjpeg", "mpeg4")),
    *(("libx264", suffix, {"x264-params": "repeat-headers=1:bframes=0"}) for suffix in (".mkv", ".mp4")),
    ("libx265", ".mkv", {"x265-params": "log-level=none:repeat-headers=1:bframes=0"}),
]
MUXERS = [
    ("live", ".mkv", {"live": "1"}),  # no duration, no index
    ("index in front", ".mkv", {"cues_to_front": "1"}),
    ("fragments", ".mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ("fragments of a frame", ".mp4", {"movflags": "frag_every_frame+empty_moov"}),
    ("negative offsets", ".mp4", {"movflags": "negative_cts_offsets"}),
    ("no edit list", ".mp4", {"use_editlist": "0"}),
    ("no duration", ".flv", {"flvflags": "no_duration_filesize"}),
]
PIXELS = [
    ("yuv420p10le", "libx265", ".mp4", SIZE),
    ("yuv422p10le", "libx264", ".mkv", SIZE),
    ("yuv444p", "libx264", ".mp4", (47, 95)),
    ("yuv420p", "libvpx-vp9", ".mkv", (47, 95)),
    ("yuv420p", "mpeg4", ".avi", (47, 95)),
    ("gbrp12le", "ffv1", ".mkv", SIZE),
]
TURNS = [turn for turn in itertools.product((0, 90, 180, 270), (False, True), (False, True)) if any(turn)]
LARGER, OTHER_SHAPE = (2 * SIZE[0], 2 * SIZE[1]), (2 * SIZE[0], SIZE[1])


class File(NamedTuple):
    """A video file, the times of its pictures in seconds, its displayed size, and how its frames are turned."""

    path: Path
    stamps: list[Fraction] = REGULAR
    size: tuple[int, int] = SIZE
    turn: tuple[int, bool, bool] = (0, False, False)


Maker = Callable[[Path], File]


def one(
    folder: Path,
    suffix: str,
    codec: str = "libx264",
    stamps: list[Fraction] = REGULAR,
    shown: tuple[int, int] = SIZE,
    **settings: Any,
) -> File:
    path = write(folder / f"one{suffix}", codec, stamps, **settings)
    return File(path, stamps, shown, settings.get("rotation", (0, False, False)))


def two(
    folder: Path,
    suffix: str,
    codec: str,
    second: tuple[int, int] = SIZE,
    joined: bool = False,
    **settings: Any,
) -> File:
    """Two files of 20 frames, the second of another size, as one: copied packet by packet, or `joined` byte by byte."""
    parts = [write(folder / f"{k}{suffix}", codec, REGULAR[:20], (SIZE, second)[k], 20 * k, **settings) for k in (0, 1)]
    path = folder / f"two{suffix}"
    if joined:
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return File(path)
    return File(copy(parts, path))


def cut(folder: Path, suffix: str, codec: str, first: int, **settings: Any) -> File:
    """A copy from the packet numbered `first` on."""
    return File(copy([write(folder / "whole.mkv", codec, **settings)], folder / f"cut{suffix}", first))


def hidden(folder: Path, suffix: str) -> File:
    """VP8 with frames that are decoded and not shown, as alternate reference frames are: the fifth bit of a frame says it."""

    def hide(number: int, data: bytes) -> bytes:
        return bytes([data[0] & 0xEF, *data[1:]]) if number in (5, 6, 20) else data

    return File(copy([write(folder / "whole.webm", "libvpx")], folder / f"hidden{suffix}", edit=hide))


def edited(folder: Path, *edits: tuple[int, int]) -> File:
    """An MP4 whose edit list (ISO 14496-12, 8.6.6) shows these parts, (first frame, number of frames) each."""
    path = write(folder / "edited.mp4", **B_FRAMES["libx264"])
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        ticks = file.streams.video[0].time_base.denominator // FPS
    at = data.index(b"elst") - 4
    (old_size,), (offset,) = struct.unpack_from(">I", data, at), struct.unpack_from(">i", data, at + 20)
    entries = [struct.pack(">IiI", count * 1000 // FPS, offset + start * ticks, 1 << 16) for start, count in edits]
    box = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits)) + b"".join(entries)
    data[at : at + old_size] = box
    for name in (b"edts", b"trak", b"moov"):
        at = data.index(name) - 4
        struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + len(box) - old_size)
    path.write_bytes(data)
    stamps = REGULAR.copy()
    for k, number in enumerate(k for start, count in edits for k in range(start, start + count)):
        stamps[number] = Fraction(k, FPS)
    return File(path, stamps)


def unmarked(folder: Path) -> File:
    """An MP4 in which no key frame is marked as one, so that FFmpeg takes every frame for one."""
    path = write(folder / "unmarked.mp4", **B_FRAMES["libx264"])
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    return File(path)


def with_cover(folder: Path, suffix: str, video: bool = True) -> File:
    """A stream of one picture, then perhaps a video, then sound."""
    path = folder / f"cover{suffix}"
    images = [av.VideoFrame.from_ndarray(picture(k), format="rgb24") for k in range(40)]
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
    silence.sample_rate = 16000
    with av.open(str(path), "w") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        streams = [cover, *([file.add_stream("libx264", rate=FPS)] if video else [])]
        sound = file.add_stream("aac", rate=16000)
        for stream in streams:
            stream.height, stream.width = SIZE
        file.start_encoding()
        file.mux([*cover.encode(images[0]), *cover.encode(), *sound.encode(silence), *sound.encode()])
        for stream in streams[1:]:
            file.mux([packet for image in [*images, None] for packet in stream.encode(image)])
    return File(path)


def table() -> dict[str, Maker]:
    makers: dict[str, Maker] = {}
    for suffix, codecs in CODECS.items():
        for codec, b_frames, variable in itertools.product(codecs.split(), (False, True), (False, True)):
            if (codec in B_FRAMES or not b_frames) and not (variable and suffix in CONSTANT_RATE):
                settings = B_FRAMES[codec] if b_frames else {"max_b_frames": 0} if codec == "libx264" else {}
                makers[f"{'B-frames ' * b_frames}{'variable ' * variable}{codec} {suffix}"] = partial(
                    one, suffix=suffix, codec=codec, stamps=VARIABLE if variable else REGULAR, **settings
                )
    x264 = B_FRAMES["libx264"]
    common = (("mpeg4", ".avi"), ("libx264", ".flv"), ("libx264", ".mkv"), ("libx264", ".mp4"), ("libx264", ".ts"))
    for (codec, suffix), aspect in itertools.product(common, (Fraction(2), Fraction(1, 2), Fraction(8, 9))):
        shown = (SIZE[0], round(SIZE[1] * aspect))
        make = partial(one, suffix=suffix, codec=codec, shown=shown, sample_aspect_ratio=aspect)
        makers[f"aspect {aspect} {codec} {suffix}"] = make
    for codec, suffix in (("libx264", ".mkv"), ("mpeg4", ".mov"), ("libx264", ".mp4"), ("libvpx-vp9", ".webm")):
        for turn in TURNS:
            makers[f"turn {turn} {codec} {suffix}"] = partial(one, suffix=suffix, codec=codec, rotation=turn)
    turned = {"rotation": (90, False, True), "sample_aspect_ratio": Fraction(2)}
    makers["aspect and turn"] = partial(one, suffix=".mp4", shown=(2 * SIZE[0], SIZE[1]), **turned)
    for codec, suffix in (("mpeg2video", ".mpg"), ("mpeg2video", ".ts"), ("mpeg4", ".avi")):
        make = partial(one, suffix=suffix, codec=codec, flags=INTERLACED, **B_FRAMES[codec])
        makers[f"interlaced {codec} {suffix}"] = make
    for suffix in (".mkv", ".mp4", ".ts"):
        options = {"x264-params": "interlaced=1:keyint=12:bframes=2"}
        makers[f"interlaced libx264 {suffix}"] = partial(one, suffix=suffix, **options)
    for codec, suffix, settings in SIZE_CHANGES:
        makers[f"larger {codec} {suffix}"] = partial(two, suffix=suffix, codec=codec, second=LARGER, **settings)
    for codec, suffix in (("libx264", ".h264"), ("libx264", ".ts"), ("mpeg2video", ".mpg"), ("mpeg2video", ".ts")):
        make = partial(two, suffix=suffix, codec=codec, joined=True, **B_FRAMES[codec])
        makers[f"joined {codec} {suffix}"] = make
    for codec in ("libx264", "libx265", "mpeg2video", "mpeg4"):  # of a stream that was stored in parts
        make = partial(two, suffix=".ts", codec=codec, joined=True, starts=(0, 20), **B_FRAMES[codec])
        makers[f"segments {codec} .ts"] = make
    for suffix in (".ivf", ".mkv", ".webm"):
        makers[f"hidden libvpx {suffix}"] = partial(hidden, suffix=suffix)
    hiding = {"auto-alt-ref": 1, "lag-in-frames": 16, "b": "100k", "deadline": "good"}
    makers["hidden libvpx-vp9 .webm"] = partial(one, suffix=".webm", codec="libvpx-vp9", **hiding)
    for name, suffix, muxer in MUXERS:
        makers[f"{name} {suffix}"] = partial(one, suffix=suffix, stamps=VARIABLE, muxer=muxer, **x264)
    for (codec, suffix), start in itertools.product(common, (-1, 4)):
        if (suffix, start) != (".avi", 4):  # AVI starts at 0
            stamps = [stamp + start for stamp in VARIABLE]
            make = partial(one, suffix=suffix, codec=codec, stamps=stamps, **B_FRAMES[codec])
            makers[f"from {start} s {codec} {suffix}"] = make
    for suffix, first in itertools.product((".flv", ".mkv", ".mp4", ".ts"), (0, 5, 10, 12)):
        for name, options in GROUPS.items():
            if (name, suffix) == ("open", ".ts") and first > 0:
                continue  # the stream's headers are in its first packet alone
            make = partial(cut, suffix=suffix, codec="libx264", first=first, **{"x264-params": options})
            makers[f"{name} from packet {first} {suffix}"] = make
        for codec in ("libx265", "mpeg2video") if suffix != ".flv" else ():
            make = partial(cut, suffix=suffix, codec=codec, first=first, **B_FRAMES[codec])
            makers[f"{codec} from packet {first} {suffix}"] = make
    vp9 = partial(cut, suffix=".mkv", codec="libvpx-vp9", first=5, gop_size=12)
    makers["libvpx-vp9 from packet 5 .mkv"] = vp9  # packets that cannot be decoded
    makers["one edit"] = lambda folder: edited(folder, (6, 20))
    makers["two edits"] = lambda folder: edited(folder, (10, 10), (30, 10))
    makers["edits in another order"] = lambda folder: edited(folder, (30, 10), (0, 10))
    makers["no key frame marked"] = unmarked
    for suffix in (".mkv", ".mp4"):
        makers[f"cover {suffix}"] = partial(with_cover, suffix=suffix)
    for pixels, codec, suffix, size in PIXELS:
        make = partial(one, suffix=suffix, codec=codec, size=size, shown=size, pix_fmt=pixels)
        makers[f"{pixels} {size} {codec} {suffix}"] = make
    return makers


TABLE = table()
SAMPLE = (
    "B-frames variable libx264 .avi",
    "variable libx264 .avi",
    "variable mpeg4 .avi",
    "B-frames libx264 .ts",
    "B-frames mpeg2video .ts",
    "B-frames variable libx265 .mp4",
    "variable libsvtav1 .mkv",
    "variable libvpx .webm",
    "B-frames libx264 .h264",
    "B-frames mpeg2video .mpg",
    "variable gif .gif",
    "aspect 2 libx264 .mp4",
    "aspect 8/9 libx264 .ts",
    "turn (90, True, False) libx264 .mp4",
    "turn (0, False, True) libx264 .mkv",
    "aspect and turn",
    "interlaced libx264 .ts",
    "larger libvpx .webm",
    "larger libx264 .mp4",
    "joined libx264 .ts",
    "segments mpeg2video .ts",
    "hidden libvpx .webm",
    "live .mkv",
    "fragments .mp4",
    "from 4 s libx264 .mp4",
    "closed from packet 5 .ts",
    "open from packet 10 .mkv",
    "refreshed from packet 12 .mp4",
    "libvpx-vp9 from packet 5 .mkv",
    "two edits",
    "no key frame marked",
    "cover .mkv",
    "yuv420p10le (48, 96) libx265 .mp4",
)
assert set(SAMPLE) <= set(TABLE)


def decode(file: File) -> list[np.ndarray]:
    """What is shown, one picture after the other, by nothing but PyAV's own calls."""
    frames = []
    with av.open(str(file.path)) as container:
        streams = container.streams.video
        for packet in container.demux(max(streams, key=lambda stream: stream.codec_context.name == "h264")):
            try:
                frames += packet.decode()
            except av.FFmpegError:
                assert not frames  # of a recording that begins between key frames
        return [display(frame.to_ndarray(format="rgb24"), *file.turn) for frame in frames]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SAMPLE)) for name in TABLE]
)
def test_what_is_read_is_what_is_shown(tmp_path, name):
    file = TABLE[name](tmp_path)
    whole = decode(file)
    numbers = [number_of(frame) for frame in whole]
    assert len(numbers) >= 16 and -1 not in numbers  # the pictures that were written, upright
    times = np.array([float(file.stamps[number] - file.stamps[numbers[0]]) for number in numbers])

    info = video_reader.probe(file.path)
    assert (info.num_frames, info.height, info.width) == (len(numbers), *file.size)
    assert info.duration == pytest.approx(times[-1] + 1 / FPS, abs=3e-3)  # some containers count milliseconds
    assert info.fps == pytest.approx(len(numbers) / info.duration, rel=0.02)
    for decoder in video_reader.DECODERS:
        clip = video_reader.read_clip(file.path, len(numbers), decoder=decoder)
        assert clip.shape[1:3] == file.size and [number_of(frame) for frame in clip] == numbers
        if all(frame.shape[:2] == file.size for frame in whole):
            np.testing.assert_array_equal(clip, whole)
        for count, fps, start in ((6, 8.0, 0.0), (4, 12.5, 0.31), (3, 30.0, info.duration - 0.2)):
            moments = start + np.arange(count) / fps
            nearest = [int(np.argmin(np.abs(times - moment).round(3))) for moment in moments]
            clip = video_reader.read_clip(file.path, count, fps, start, decoder=decoder)
            assert [number_of(frame) for frame in clip] == [numbers[k] for k in nearest]
            if all(frame.shape[:2] == file.size for frame in whole):
                np.testing.assert_array_equal(clip, [whole[k] for k in nearest])

    surveyed, examined, frames = video_reader.survey(file.path, (60, 120), 8.0, 100)
    moments = np.arange(0, times[-1] + 1e-6, 1 / 8)
    nearest = sorted({int(np.argmin(np.abs(times - moment).round(3))) for moment in moments})
    assert surveyed == info
    assert [number_of(frame) for frame in frames] == [numbers[k] for k in nearest]
    np.testing.assert_allclose(examined, times[nearest], atol=2e-3)


@pytest.mark.parametrize("pyramid", ["none", "strict", "normal"])
def test_frames_to_which_none_refers_are_skipped(tmp_path, monkeypatch, pyramid):
    """Wherever a clip begins and whatever its rhythm, what remains is decoded to the same bytes."""
    parameters = f"keyint=24:bframes=5:b-adapt=0:b-pyramid={pyramid}:scenecut=0:open-gop=1"
    path = write(tmp_path / "a.mp4", **{"x264-params": parameters})
    whole, index, decoded = decode(File(path)), read_index(path), []
    for first, stride in itertools.product((0, 7, 20, 23, 24, 26, 31), (1, 2, 3)):
        wanted = np.arange(first, 40, stride)[:4]
        np.testing.assert_array_equal(video_reader._decode_pyav(path, index, wanted), [whole[k] for k in wanted])
    count_frames(monkeypatch, decoded)
    video_reader._decode_pyav(path, index, np.array([13, 20]))
    assert len(decoded) <= 16


@pytest.mark.parametrize("name", ["interlaced libx264 .mp4", "B-frames libx265 .mp4"])
def test_fields_and_temporal_layers_are_not_skipped(tmp_path, monkeypatch, name):
    path, decoded = TABLE[name](tmp_path).path, []
    index = read_index(path)
    count_frames(monkeypatch, decoded)
    video_reader._decode_pyav(path, index, np.array([0, 20]))
    assert set(index.stamps[:21]) <= set(decoded)


def count_frames(monkeypatch, decoded: list[int]) -> None:
    """Notes the time stamps of the frames that are decoded."""

    def note(packet, started):
        frames = plain(packet, started)
        decoded.extend(frame.pts for frame in frames)
        return frames

    plain = video_index.decode
    monkeypatch.setattr(video_index, "decode", note)


# ------------------------------------------------------------------------------------------------ one answer everywhere


READERS: dict[str, Callable[[Any], Any]] = {
    "probe": video_reader.probe,
    "survey": lambda path: video_reader.survey(path, quality.SIZE, quality.FPS, quality.MAX_FRAMES),
    "read_clip": lambda path: video_reader.read_clip(path, 4),
    "read_clip with decord": lambda path: video_reader.read_clip(path, 4, decoder="decord"),
}


def refusals(path: Path) -> set[str]:
    """What every way of reading says of a file that all refuse."""
    messages = set()
    for read in READERS.values():
        with pytest.raises(UserError) as caught:
            read(path)
        messages.add(str(caught.value))
    return messages


@pytest.mark.parametrize(("codec", "suffix", "settings"), SIZE_CHANGES)
def test_a_video_that_changes_its_shape_is_refused_by_all(tmp_path, codec, suffix, settings):
    """Also by the readers of its first frames, for which no other shape matters."""
    path = two(tmp_path, suffix, codec, OTHER_SHAPE, **settings).path
    assert refusals(path) == {
        f"video file '{path}' changes its shape from 96x48 to 96x96; cut it there or take it off the list"
    }


def webm_with_transparency(folder: Path) -> Path:
    return write(folder / "a.webm", "libvpx-vp9", pix_fmt="yuva420p")


def unknown_codec(folder: Path) -> Path:
    path = write(folder / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    return path


def list_of_files(folder: Path) -> Path:
    """What FFmpeg reads as the videos that it names."""
    path = folder / "a.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {write(folder / 'b.mp4').name}\n")
    with av.open(str(path)) as container:
        assert container.format.name == "concat"
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "turned by 45 degrees": (
        lambda folder: write(folder / "a.mp4", rotation=(45, False, False)),
        "another than a right angle; convert it",
    ),
    "transparent WebM": (webm_with_transparency, "has transparency that cannot be decoded; convert it to mp4"),
    "list of files": (list_of_files, "damaged, truncated or not a video"),
    "unknown codec": (unknown_codec, "FFmpeg has no decoder for it"),
    "sound with a cover": (lambda folder: with_cover(folder, ".mp4", video=False).path, "has no video stream"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_right_is_refused_in_one_line(tmp_path, name):
    make, reason = REFUSED[name]
    (message,) = refusals(make(tmp_path))
    assert reason in message and "\n" not in message


@pytest.mark.parametrize("fraction", [0.5, 0.93])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", ".flv"),
        ("libx264", ".h264"),
        ("libx264", ".mkv"),
        ("libx264", ".mp4"),
        ("libx264", ".ts"),
        ("libvpx", ".webm"),
        ("mpeg4", ".avi"),
        ("mpeg4", ".nut"),
        ("mpeg2video", ".mpg"),
        ("wmv2", ".wmv"),
    ],
)
def test_a_truncated_file_is_read_to_its_end_or_refused_by_all(tmp_path, codec, suffix, fraction):
    path = write(tmp_path / f"a{suffix}", codec, **B_FRAMES.get(codec, {}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    try:
        info = video_reader.probe(path)
    except UserError:
        assert len(refusals(path)) == 1
        return
    whole = decode(File(path))
    assert len(whole) == info.num_frames
    for decoder in video_reader.DECODERS:
        np.testing.assert_array_equal(video_reader.read_clip(path, info.num_frames, decoder=decoder), whole)
    assert READERS["survey"](path)[0] == info


def test_a_transport_stream_that_lost_a_packet_is_refused_by_all(tmp_path):
    """The decoder conceals it, and joined recordings look the same to the demuxer."""
    path = write(tmp_path / "a.ts", "libx265")
    packets = [path.read_bytes()[at : at + 188] for at in range(0, path.stat().st_size, 188)]
    # ISO 13818-1, 2.4.3.2: of program 256, neither the first packet of a picture nor its padded last one.
    del packets[max(k for k, packet in enumerate(packets) if packet[1:3] == b"\1\0" and packet[3] & 0x30 == 0x10)]
    path.write_bytes(b"".join(packets))
    assert len(decode(File(path))) == 40
    assert len(refusals(path)) == 1


@pytest.mark.parametrize(
    ("codec", "suffix", "pixels"),
    [("prores_ks", ".mov", "yuva444p10le"), ("png", ".mov", "rgba"), ("qtrle", ".mov", "argb")],
)
def test_transparent_frames_are_shown_over_white(tmp_path, codec, suffix, pixels):
    """Their hidden colors are not seen; opaque pixels are those of the decoder."""
    path = tmp_path / f"a{suffix}"
    rgba = np.dstack([picture(3), np.full(SIZE, 255, np.uint8)])
    rgba[24:, 48:] = (255, 0, 0, 0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=FPS)
        (stream.height, stream.width), stream.pix_fmt = SIZE, pixels
        for frame in (av.VideoFrame.from_ndarray(rgba, format="rgba"), None):
            file.mux(stream.encode(frame))
    (clip,), (shown,) = video_reader.read_clip(path, 1), decode(File(path))
    np.testing.assert_array_equal(clip[30:, 60:], 255)
    np.testing.assert_array_equal(clip[:20], shown[:20])
    assert np.abs(shown[30:, 60:].astype(int) - (255, 0, 0)).max() < 10  # there were hidden colors


RED = [  # ITU-T H.273: matrix, range (1: 16 to 235, 2: full), and red in it
    (1, 1, (63, 102, 240)),
    (1, 2, (54, 99, 255)),
    (5, 1, (81, 90, 240)),
    (5, 2, (76, 85, 255)),
    (9, 1, (74, 97, 240)),
    (2, 0, (81, 90, 240)),  # untagged: BT.601
]


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize(("matrix", "value_range", "red"), RED)
def test_colors_are_those_of_their_matrix_and_range(tmp_path, matrix, value_range, red, pixels):
    path, depth = tmp_path / "a.mp4", 10 if pixels.endswith("10le") else 8
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, value_range
        frame = av.VideoFrame(32, 32, pixels)
        for plane, level in zip(frame.planes, red, strict=True):
            levels = np.full(plane.buffer_size * 8 // (8 if depth == 8 else 16), level << (depth - 8))
            plane.update(levels.astype(np.uint8 if depth == 8 else np.uint16).tobytes())
        frame.colorspace, frame.color_range = matrix, value_range
        file.mux([*stream.encode(frame), *stream.encode()])
    for decoder in video_reader.DECODERS:
        clip = video_reader.read_clip(path, 1, decoder=decoder)
        np.testing.assert_allclose(clip.astype(int), np.broadcast_to((255, 0, 0), clip.shape), atol=4)


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".ts"])
def test_videos_in_shards_are_read_as_files(tmp_path, suffix):
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    path = write(tmp_path / f"a{suffix}", codec, VARIABLE, **B_FRAMES[codec])
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name in ("before", "it", "after"):
            shard.add(path if name == "it" else write(tmp_path / "b.ts"), name)
    with tarfile.open(tmp_path / "shard.tar") as shard:
        member = shard.getmember("it")
    source = TarMember(str(tmp_path / "shard.tar"), f"it{suffix}", member.offset_data, member.size)
    assert video_reader.probe(source) == video_reader.probe(path)
    np.testing.assert_array_equal(video_reader.read_clip(source, 9, 12.5), video_reader.read_clip(path, 9, 12.5))


@pytest.mark.parametrize("decoder", video_reader.DECODERS)
@pytest.mark.parametrize("name", ["12:30 it.mp4", "http:it.mp4", "it%03d,#?&.mp4", "-it.mp4"])
def test_names_are_no_protocols_and_patterns(tmp_path, monkeypatch, name, decoder):
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(write(tmp_path / "plain.mp4").read_bytes())
    assert [number_of(frame) for frame in video_reader.read_clip(name, 3, decoder=decoder)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["aspect 2 libx264 .ts", "turn (90, True, False) libx264 .mp4", "variable mpeg4 .avi"])
def test_checks_and_training_read_the_same(tmp_path, name):
    """The check's manifest has what `probe` says; clips of training and preview, in a process of their own, are cut from the same frames."""
    file = TABLE[name](tmp_path)
    process = DecoderProcess(timeout=60)
    measures, survey = quality.measure(process, file.path, None)
    process.close()
    assert survey is not None and measures["decodable"]
    assert {key: measures[key] for key in vars(survey.info)} == vars(video_reader.probe(file.path))
    reader = ClipReader(5, 8.0, (24, 24), "pyav", "center", 0, 8, timeout=60)
    clip, _ = reader.read(file.path, epoch=0, index=0)
    expected = resize_and_crop(video_reader.read_clip(file.path, 5, 8.0, position=0.5), (24, 24))
    np.testing.assert_array_equal(clip, expected)


# ------------------------------------------------------------------------------------------------ decord


@pytest.mark.parametrize(
    ("name", "is_simple"),
    [
        ("B-frames variable libx265 .mp4", True),
        ("two edits", True),
        ("B-frames libx264 .ts", False),
        ("variable mpeg4 .avi", False),
        ("variable libvpx .webm", False),
        ("aspect 2 libx264 .mp4", False),
        ("turn (0, False, True) libx264 .mkv", False),
        ("yuv420p10le (48, 96) libx265 .mp4", False),
        ("yuv444p (47, 95) libx264 .mp4", False),
        ("interlaced libx264 .mp4", False),
        ("larger libx264 .mp4", False),
        ("refreshed from packet 12 .mp4", False),
        ("cover .mkv", False),
    ],
)
def test_decord_reads_simple_files_alone(tmp_path, monkeypatch, name, is_simple):
    """What it reads wrong, or with exceptions of its own, is read by PyAV."""
    file = TABLE[name](tmp_path)
    assert read_index(file.path).is_simple == is_simple
    calls = []
    monkeypatch.setattr(video_reader, "_decode_decord", lambda *arguments: calls.append(arguments))
    video_reader.read_clip(file.path, 4, decoder="decord")
    assert len(calls) == is_simple
