"""The gallery of the docs."""

import shlex

import numpy as np
from PIL import Image

from microcinema.config.compose import compose
from microcinema.data.video_writer import write_video
from scripts.recipes import gallery


def test_every_clip_is_made_by_a_command_that_composes_and_the_page_shows_it():
    page = gallery.render(gallery.ROWS)
    for row in gallery.ROWS:
        assert f"(gallery/{row.name}.gif)" in page and f"## {row.title}\n" in page
        for tile in row.tiles:
            compose("sample", [*row.shared, *tile])
            assert f"`{', '.join(tile)}`" in page
    commands = [line for line in page.splitlines() if line.startswith("microcinema sample")]
    assert len(commands) == len(gallery.ROWS)
    assert all(shlex.split(command)[2].partition("=")[0] in ("prompt", "image") for command in commands)


def test_clips_stand_side_by_side_and_a_shorter_one_waits(tmp_path):
    for name, (frames, shade) in {"a": (6, 40), "b": (3, 200)}.items():
        write_video(tmp_path / f"{name}.mp4", np.full((frames, 32, 48, 3), shade, np.uint8), 8.0, lossless=True)
    gallery.join([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "both.gif")
    with Image.open(tmp_path / "both.gif") as gif:
        assert gif.n_frames >= 1 and gif.size == (2 * 48 * gallery.SCALE + gallery.GAP, 32 * gallery.SCALE)
        gif.seek(gif.n_frames - 1)
        row = np.array(gif.convert("RGB"))[10]
        assert (
            abs(int(row[5, 0]) - 40) < 12 and abs(int(row[-5, 0]) - 200) < 12 and row[48 * gallery.SCALE + 1, 0] > 240
        )


def test_the_docs_have_the_page_and_pictures_of_this_recipe():
    assert (gallery.DOCS / "gallery.md").read_text(encoding="utf-8") == gallery.render(gallery.ROWS)
    assert {path.stem for path in (gallery.DOCS / "gallery").iterdir()} == {row.name for row in gallery.ROWS}
