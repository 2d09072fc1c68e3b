"""Pictures of every kind that people have, against what a viewer shows of them; written byte by byte where Pillow cannot write them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from microcinema.data import images
from microcinema.data.images import open_image, to_rgb
from microcinema.data.video_reader import TarMember, read_image
from microcinema.pipelines.keyframe import KeyframePipeline, make_keyframe
from microcinema.utils.errors import UserError

GRAY, GRAY_ALPHA, COLOR, COLOR_ALPHA = 0, 4, 2, 6  # types of pixels in PNG
CHANNELS = {GRAY: 1, GRAY_ALPHA: 2, COLOR: 3, COLOR_ALPHA: 4}


def png(pixels, depth, kind, *chunks):
    """Bytes of a PNG of integer pixels (h, w, channels) of `depth` bits, with further chunks (name, bytes) before them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = (pixels.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits.astype(np.uint8)]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def shown(pixels, depth, kind, transparent=None):
    """What a viewer shows, float (h, w, 3): the values as shares of the largest one, over white."""
    share = pixels / (2**depth - 1)
    colors = np.broadcast_to(share[..., :1] if kind in (GRAY, GRAY_ALPHA) else share[..., :3], (*pixels.shape[:2], 3))
    alpha = share[..., -1:] if kind in (GRAY_ALPHA, COLOR_ALPHA) else np.ones_like(share[..., :1])
    if transparent is not None:
        alpha = 1.0 - (pixels == transparent).all(-1, keepdims=True)
    return 255 * (alpha * colors + 1 - alpha)


def profile(data=None, swapped=False):
    """sRGB as a color profile; `swapped`: with red and green exchanged."""
    data = data or ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:  # in the table of tags, which comes first
        for one, two in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
            data = data.replace(one, two, 1)
    return data


def gray_profile():
    """A gray profile of gamma 1: values are light, so that sRGB shows them brighter."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)}
    tags[b"kTRC"] = b"curv" + bytes(8)
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("kind, depths", [(GRAY, (1, 2, 4, 8, 16)), *((kind, (8, 16)) for kind in (4, 2, 6))])
@pytest.mark.parametrize("has_transparent_color", [False, True])
def test_depth_and_transparency_are_as_a_viewer_shows_them(tmp_path, kind, depths, has_transparent_color):
    if has_transparent_color and kind in (GRAY_ALPHA, COLOR_ALPHA):
        pytest.skip("no such files")
    for depth in depths:
        pixels = np.random.default_rng(depth).integers(0, 2**depth, (9, 8, CHANNELS[kind]))
        transparent, chunks = None, []
        if has_transparent_color:
            transparent = pixels[4, 4]
            chunks = [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
        (tmp_path / "a.png").write_bytes(png(pixels, depth, kind, *chunks))
        image = open_image(tmp_path / "a.png")
        assert image.mode == "RGB"
        expected = shown(pixels, depth, kind, transparent)
        assert np.abs(np.array(image) - expected).max() <= (1 if depth < 16 else 2), depth
        assert ("alpha" in image.info["conversions"]) == (kind in (GRAY_ALPHA, COLOR_ALPHA) or has_transparent_color)
        assert np.array_equal(read_image(tmp_path / "a.png")[0], image)  # in training as well


def test_a_ramp_of_16_bits_is_a_ramp_and_said_to_be_converted(tmp_path):
    ramp = np.tile((np.arange(64) * 4).astype(np.uint16) * 257, (64, 1))
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        (keyframe,) = KeyframePipeline(tmp_path / name)(["a star"], 64, 64)
        assert np.array_equal(np.array(keyframe.image)[5, :, 1], np.arange(64) * 4)
        assert keyframe.provenance["bit_depth"] == "16 to 8"
    for dtype in ("<u2", ">u2"):  # in memory
        assert np.array_equal(make_keyframe(Image.fromarray(ramp.astype(dtype)), 64, 64, {}).image, keyframe.image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_8_bits_keeps_its_colors(mode):
    y, x = np.mgrid[:16, :16]
    color = (200, 200, 200) if mode in ("L", "LA") else (255, 255, 255) if mode == "1" else (204, 51, 51)
    pixels = np.where(((x - 8) ** 2 + (y - 8) ** 2 < 30)[..., None], np.uint8(color), np.uint8([0, 0, 0]))
    assert np.abs(np.array(to_rgb(Image.fromarray(pixels).convert(mode))).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_what_is_hidden_by_transparency_stays_hidden(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)
    pixels[:8, :, 3], pixels[8:] = 0, (220, 30, 30, 255)
    image = Image.fromarray(pixels)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    (keyframe,) = KeyframePipeline(tmp_path / f"a.{suffix}")(["a star"], 16, 16)
    found = np.array(keyframe.image)
    assert (found[:8] == 255).all() and np.abs(found[8:].astype(int) - (220, 30, 30)).max() <= 1
    assert keyframe.provenance["alpha"] == "composited over white"
    assert np.array_equal(make_keyframe(image, 16, 16, {}).image, found) or suffix == "gif"
    image.putalpha(255)
    assert "alpha" not in make_keyframe(image, 16, 16, {}).provenance  # nothing was hidden


def test_color_profiles_become_srgb(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (255, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile(swapped=True))
    image = open_image(tmp_path / "a.png")
    assert np.abs(np.array(image).astype(int) - pixels[..., [1, 0, 2]]).max() <= 2
    assert image.info["conversions"]["color_profile"].endswith("to sRGB")
    for gray in ("L", "P", "1"):  # a profile for colors on a picture without
        Image.new(gray, (4, 4), 1).save(tmp_path / "b.png", icc_profile=profile())
        assert np.array_equal(open_image(tmp_path / "b.png"), Image.new(gray, (4, 4), 1).convert("RGB"))
    # With both, of 16 bits, and with transparency.
    half = np.full((4, 4, 2), 32768)
    half[0, 0, 1], half[1:, :, 1] = 0, 65535
    (tmp_path / "c.png").write_bytes(png(half, 16, GRAY_ALPHA, (b"iCCP", b"x\0\0" + zlib.compress(gray_profile()))))
    assert np.array(open_image(tmp_path / "c.png"))[2, 2].tolist() == [188, 188, 188]  # light of one half
    assert np.array(open_image(tmp_path / "c.png"))[0, 0].tolist() == [255, 255, 255]
    (tmp_path / "d.png").write_bytes(png(half[..., :1], 16, GRAY, (b"iCCP", b"x\0\0" + zlib.compress(gray_profile()))))
    assert np.array(open_image(tmp_path / "d.png"))[2, 2].tolist() == [188, 188, 188]


@pytest.mark.parametrize("data", [b"torn", gray_profile(), profile()[:200]], ids=["torn", "gray", "short"])
def test_color_profiles_that_cannot_be_used_are_named(tmp_path, data):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", icc_profile=data)
    with pytest.raises(UserError, match=r"a\.png.*color profile.*save it as sRGB") as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_images_are_turned_as_cameras_say(tmp_path, orientation, suffix):
    quarters = np.zeros((16, 32, 3), np.uint8)
    quarters[:8, :16], quarters[8:, 16:] = (255, 0, 0), (0, 0, 255)
    turns = [
        np.array,
        np.fliplr,
        lambda x: np.rot90(x, 2),
        np.flipud,
        lambda x: x.swapaxes(0, 1),
        lambda x: np.rot90(x, 3),
        lambda x: np.rot90(x, 2).swapaxes(0, 1),
        np.rot90,
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quarters).save(
        tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    found, expected = np.array(open_image(tmp_path / f"a.{suffix}")), turns[orientation - 1](quarters)
    assert found.shape == expected.shape
    assert np.median(np.abs(found.astype(int) - expected)) <= 2
    with Image.open(tmp_path / f"a.{suffix}") as image:  # as the Python API gets it
        assert np.array_equal(make_keyframe(image, *found.shape[:2], {}).image, found)


def eps():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


REFUSED = {
    "empty.png": (b"", "not an image"),
    "text.png": (b"not an image", "not an image"),
    "postscript.png": (eps(), "not an image"),
    "ppm.png": (saved(Image.new("RGB", (4, 4)), "PPM"), "not an image"),
    "icon.png": (saved(Image.new("RGB", (16, 16)), "ICO"), "not an image"),
    "pdf.jpg": (saved(Image.new("RGB", (16, 16)), "PDF"), "not an image"),
    "torn.png": (saved(Image.effect_noise((64, 64), 50), "PNG")[:-900], "truncated"),
    "torn.jpg": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "truncated"),
    "float.tiff": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "no known range"),
    "32_bits.tiff": (saved(Image.new("I", (4, 4), 70000), "TIFF"), "no known range"),
    "inverted.tiff": (saved(Image.new("I;16", (4, 4), 700), "TIFF", tiffinfo={262: 0}), "no known range"),
    "lab.tiff": (saved(Image.new("LAB", (4, 4)), "TIFF"), "no known range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_with_known_colors_is_named_in_one_line(tmp_path, monkeypatch, name):
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=rf"{name}.*{words}") as error:
        open_image(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        read_image(tmp_path / name)


def test_what_is_no_regular_file_is_refused_and_nothing_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in (tmp_path / "pipe.png", tmp_path / "folder.png", tmp_path / "link.png", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            open_image(name)
    for name in (tmp_path / "gone.png", "a\0.png"):
        with pytest.raises(UserError, match="no such file"):
            open_image(name)


def test_pictures_have_a_limit_of_pixels_which_is_tried_before_they_are_decoded(tmp_path, monkeypatch):
    header = png(np.zeros((1, 1, 1), int), 1, GRAY)
    for side, words in ((12_000, "12000x12000 pixels, above the limit"), (60_000, "exceeds limit")):
        size = struct.pack(">II", side, side)
        data = header.replace(struct.pack(">II", 1, 1), size, 1)
        checksum = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "a.png").write_bytes(data[:29] + checksum + data[33:])
        with pytest.raises(UserError, match=words):
            open_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 16)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (4, 4)


def test_the_first_frame_of_several_is_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tiff", "mpo"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(np.array(open_image(tmp_path / f"a.{suffix}")).astype(int) - (255, 0, 0)).max() <= 2, suffix


def test_a_picture_in_a_tar_file_is_read_like_one_outside(tmp_path):
    data = saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")
    (tmp_path / "a.tar").write_bytes(b"x" * 7 + data + b"y")
    assert (read_image(TarMember(str(tmp_path / "a.tar"), "1.png", 7, len(data))) == 255).all()
    with pytest.raises(UserError, match=r"a\.tar:1\.png"):
        read_image(TarMember(str(tmp_path / "a.tar"), "1.png", 0, 7))
