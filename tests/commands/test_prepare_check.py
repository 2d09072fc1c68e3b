"""The command `prepare check` on real files: each fault is found, and no sound clip is rejected; and training that reads the manifest."""

import csv
import importlib.util
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw

from fixtures import broken_videos
from microcinema.commands import cli
from microcinema.data import quality_check, video_writer
from microcinema.data.clips import ClipDataset
from microcinema.data.manifest import SCHEMA, Manifest
from microcinema.training.build import build_clips
from microcinema.utils.errors import UserError

SOUND = 26


def scene(seed: int, count: int = 16, height: int = 96, width: int = 160) -> np.ndarray:
    """A smooth picture of its own that moves to the side."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 12, 3), np.uint8)
    wide = cv2.resize(coarse, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[:, 3 * k : 3 * k + width] for k in range(count)])


def stamped(frames: np.ndarray) -> np.ndarray:
    """With a half-transparent watermark in the middle."""
    mark = Image.new("L", (frames.shape[2], frames.shape[1]), 0)
    ImageDraw.Draw(mark).text((30, 40), "shutterstuck", fill=255, font_size=18)
    alpha = np.array(mark)[None, ..., None] / 255 * 0.5
    return (frames * (1 - alpha) + 255 * alpha).astype(np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A data set as the web gives it: 26 clips with a watermark and two without, and one of each fault."""
    folder = tmp_path_factory.mktemp("web")
    clips = {f"sound{k:02d}": stamped(scene(k)) for k in range(SOUND)}
    clips |= {f"plain{k}": scene(100 + k) for k in range(2)}
    clips["static"] = np.repeat(stamped(scene(50))[:1], 16, axis=0)
    clips["cut"] = np.concatenate([scene(51, 9), scene(52, 7)])
    clips["short"] = stamped(scene(53, 5))
    clips["copy"] = np.stack([cv2.resize(frame, (120, 72)) for frame in clips["sound03"]])
    for name, frames in clips.items():
        video_writer.write_video(folder / f"{name}.mp4", frames, 8, crf=30 if name == "copy" else 18)
    for kind, (make, reason) in broken_videos.KINDS.items():
        if reason and kind != "one_frame":
            make(folder / f"{kind}.mp4", 0)
            clips[kind] = np.zeros(0)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("videoid", "name"), *((name, f"a <b>clip</b> & {name}") for name in clips)])
    return folder


BROKEN = {"empty", "truncated_header", "truncated_middle", "wrong_extension", "audio_only", "zero_duration"}
REJECTED = {"static": "static", "cut": "cut", "short": "short", "copy": "duplicate"} | dict.fromkeys(BROKEN, "broken")


def arguments(world: Path, output: Path, *more: str) -> list[str]:
    data = [f"data.metadata={world / 'clips.csv'}", f"data.root={world}"]
    return ["prepare", "check", *data, f"output_dir={output}", "num_workers=1", *more]


def read(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pyarrow.parquet.read_table(output / "manifest.parquet").to_pylist()}


@pytest.fixture(scope="module")
def checked(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("check")
    assert cli.main(arguments(world, output)) == 0
    return output


def test_each_fault_is_found_and_no_sound_clip_is_rejected(checked):
    table = pyarrow.parquet.read_table(checked / "manifest.parquet")
    assert table.schema.equals(SCHEMA)
    rows = read(checked)
    assert {name: row["rejected_for"] for name, row in rows.items() if not row["accepted"]} == REJECTED
    assert {name for name, row in rows.items() if not row["decodable"]} == BROKEN
    assert rows["copy"]["duplicate_of"] == "sound03"
    assert rows["cut"]["cut"] == pytest.approx(9 / 8) and rows["sound00"]["cut"] is None
    assert "is empty" in rows["empty"]["reason"] and rows["sound00"]["reason"] is None
    one = rows["sound05"]
    assert (one["num_frames"], one["fps"], one["width"], one["height"], one["duration"]) == (16, 8.0, 160, 96, 2.0)
    assert (rows["static"]["static"], one["static"], rows["empty"]["static"]) == (True, False, None)


def test_the_watermark_is_learned_from_the_clips(checked):
    rows = read(checked)
    marked = [row["watermark"] for name, row in rows.items() if name.startswith("sound")]
    plain = [rows[name]["watermark"] for name in ("plain0", "plain1", "cut")]
    assert min(marked) > 0.7 > 0.3 > max(plain)


def test_the_page_shows_it(checked):
    page = (checked / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")  # nothing comes from elsewhere
    assert page.count("<svg") == 7 and page.count("data:image/jpeg") >= 8
    assert "<h2>Accepted</h2>" in page
    assert "a &lt;b&gt;clip&lt;/b&gt; &amp; sound00" in page
    assert "empty.mp4&#39; is empty" in page and "<td>copy</td><td>sound03</td>" in page


def test_training_leaves_out_what_the_manifest_rejects(world, checked):
    data = ClipDataset(world / "clips.csv", world, 8, 8.0, 32, manifest=checked / "manifest.parquet")
    assert len(data) == SOUND + 2
    assert data.skipped == {"rejected by the manifest": len(REJECTED)}
    assert {data[k]["id"] for k in range(len(data))} == {row["id"] for row in data.rows}
    tag = {"action": "tag", "box": [0.1, 0.3, 0.9, 0.7]}
    told = ClipDataset(world / "clips.csv", world, 8, 8.0, 32, manifest=checked / "manifest.parquet", watermark=tag)
    captions = {told.id(k): told[k]["caption"] for k in range(len(told))}
    assert {name for name, caption in captions.items() if not caption.endswith(", watermark")} == {"plain0", "plain1"}
    shapes = [(16, 64, 64), (8, 48, 80)]
    shaped = ClipDataset(world / "clips.csv", world, 8, 8.0, 32, manifest=checked / "manifest.parquet", buckets=shapes)
    assert shaped[0]["video"].shape == (8, 3, 48, 80)


def test_a_check_that_was_broken_off_goes_on(world, checked, tmp_path, capsys):
    output = tmp_path / "check"
    shutil.copytree(checked, output)
    (output / "manifest.parquet").unlink()
    chunks = {file: file.stat().st_mtime_ns for file in (output / "chunks").iterdir()}
    assert cli.main(arguments(world, output, "min_motion=0", "reject=[short, watermark]")) == 0
    # Finished chunks are not examined again; only the verdicts are new.
    assert {file: file.stat().st_mtime_ns for file in (output / "chunks").iterdir()} == chunks
    rows = read(output)
    assert rows["static"]["rejected_for"] == "watermark" and rows["cut"]["accepted"]
    assert rows["sound00"]["rejected_for"] == "watermark" and rows["short"]["rejected_for"] == "short, watermark"
    assert "rejected for watermark: 2" in capsys.readouterr().out


def test_a_row_is_a_clip_and_a_check_sees_what_changed(tmp_path, capsys, monkeypatch):
    """Clips share the id of their source video, one has two captions; a clip is mended, another breaks, a caption changes."""
    monkeypatch.setattr(quality_check, "_worker_pool", lambda *_: ThreadPool(1))  # starts at once
    listing = tmp_path / "list.csv"
    lines = [
        "id,file_name,text",
        "A,0.mp4,one",
        "A,1.mp4,two",
        "B,2.mp4,three",
        "B,2.mp4,of the same file",
        "B,3.mp4,copy",
    ]
    listing.write_text("\n".join(lines))
    for k, seed in enumerate((0, 1, 2, 2)):
        broken_videos.sound(tmp_path / f"{k}.mp4", seed)
    sound = (tmp_path / "0.mp4").read_bytes()
    (tmp_path / "0.mp4").write_bytes(b"broken")
    keys = ["data=folder", f"data.metadata={listing}", f"data.root={tmp_path}", f"output_dir={tmp_path / 'check'}"]

    def kept(*more: str) -> list[str]:
        assert cli.main(["prepare", "check", *keys, "num_workers=1", *more]) == 0
        columns = {"file": "file_name", "caption": "text"}
        data = ClipDataset(
            listing, tmp_path, 8, 8, 64, columns=columns, manifest=tmp_path / "check" / "manifest.parquet"
        )
        assert data.skipped["rejected by the manifest"] == 5 - len(data)
        return [data.captions(k)["caption"] for k in range(len(data))]

    assert kept() == ["two", "three", "of the same file"]
    assert "rejected for broken: 1, duplicate: 1" in capsys.readouterr().out
    (tmp_path / "0.mp4").write_bytes(sound)
    assert kept() == ["one", "two", "three", "of the same file"]
    (tmp_path / "1.mp4").write_bytes(b"broken")
    assert kept() == ["one", "three", "of the same file"]
    listing.write_text("\n".join([*lines[:1], "A,0.mp4,a new caption", *lines[2:]]))
    assert kept("reject=[]") == ["a new caption", "three", "of the same file", "copy"]
    captions = pyarrow.parquet.read_table(tmp_path / "check" / "chunks" / "000000.parquet").column("caption")
    assert captions[0].as_py() == "a new caption"


def test_the_number_of_clips_left_out_is_told_by_training_and_by_latents(world, checked, capsys):
    data = ClipDataset(world / "clips.csv", world, 8, 8.0, 32, manifest=checked / "manifest.parquet")
    model = SimpleNamespace(motion_score=False)
    config = SimpleNamespace(data=SimpleNamespace(build=lambda: data), model=model)
    for main in (True, False):
        build_clips(config, SimpleNamespace(is_main_process=main))
    assert capsys.readouterr().out == f"{len(REJECTED)} clips skipped: rejected by the manifest\n"


def test_a_sample_is_spread_over_the_list(world, tmp_path):
    assert cli.main(arguments(world, tmp_path, "max_samples=5")) == 0
    rows = read(tmp_path)
    assert next(iter(rows)) == "sound00" and list(rows)[-1] == "zero_duration" and len(rows) == 5
    assert rows["sound00"]["watermark"] is None  # too few to learn from
    data = ClipDataset(world / "clips.csv", world, 8, 8.0, 32, manifest=tmp_path / "manifest.parquet")
    assert len(data) == SOUND + 2 + len(REJECTED) - sum(not row["accepted"] for row in rows.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed")
def test_a_ray_cluster_finds_the_same(world, checked, tmp_path):
    assert cli.main(arguments(world, tmp_path, "ray_address=local")) == 0
    assert read(tmp_path) == read(checked)


def test_bad_input(world, tmp_path, capsys):
    assert cli.main(arguments(world, tmp_path, "ray_address=127.0.0.1:1")) == 2
    assert "ray_address='127.0.0.1:1' cannot be used" in capsys.readouterr().err
    assert cli.main(arguments(world, tmp_path, "reject=[ugly]")) == 2
    assert "reject" in capsys.readouterr().err
    with pytest.raises(UserError, match="none.parquet' cannot be read"):
        Manifest(tmp_path / "none.parquet")
    other = pyarrow.table({"id": ["a"]})
    pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(UserError, match="other.parquet' is no manifest, it lacks accepted|cannot be read"):
        Manifest(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="buckets need the sizes of the clips; set manifest"):
        ClipDataset(world / "clips.csv", world, 8, 8.0, 32, buckets=[(8, 32, 32)])


def test_preview(world, tmp_path, capsys):
    data = [f"data.metadata={world / 'clips.csv'}", f"data.root={world}", "data.clip_position=first"]
    keep = [f"output={tmp_path / 'preview.png'}", "max_samples=2", "num_frames=4", "columns=4", "resolution=[48, 80]"]
    listing = (world / "clips.csv").read_text().splitlines()[:5]
    (tmp_path / "some.csv").write_text("\n".join(listing) + "\n")
    data[0] = f"data.metadata={tmp_path / 'some.csv'}"
    assert cli.main(["prepare", "preview", *data, *keep]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as picture:
        width, height = picture.size
        assert width >= 4 * 80 and height > 2 * (48 + 18)
        page = np.array(picture)
    assert (page[8:56, 8:88].std(axis=(0, 1)) > 10).all()  # the frames first,
    assert page[58:76].min() < 60 and (page[58:76, -8:] == 255).all()  # the words below them
