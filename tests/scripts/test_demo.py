"""What the demo hands from one command to the next, and what it makes of the videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.data.video_writer import _MARK, write_video
from microcinema.pipelines.prompts import read_prompt_items
from microcinema.sprites import scene
from scripts.recipes import demo


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    demo.HERE.mkdir(parents=True)
    return tmp_path / demo.HERE


def test_commands_compose():
    for _, step in demo.STEPS:
        command, *overrides = cli.merge_subcommand(step)
        composed = compose(command, overrides)
        assert str(demo.HERE) in str(composed)  # nothing is written elsewhere


def test_both_papers_get_the_same_scenes_and_key_frames(here: Path):
    demo.write_prompts()
    image = here / "microcinema" / "star_keyframe.png"
    image.parent.mkdir()
    for name in demo.SCENES:
        Image.new("RGB", (8, 8)).save(image.with_name(f"{name}_keyframe.png"))
    one, two = (
        read_prompt_items(None, None, str(here / f"{name}.csv"), None, 0, 1) for name in ("prompts", "two_prompts")
    )
    assert [request.id for request in one] == [request.id for request in two] == list(demo.SCENES)
    assert one[0].prompt == "a large red star moving quickly to the left on sand" and one[0].motion_prompt is None
    assert (two[0].prompt, two[0].motion_prompt) == ("a large red star on sand", "moving quickly to the left")
    assert two[0].image is not None and two[0].image.resolve() == image.resolve()
    known = {
        motion.split()[0] for motion in map(scene.motion_caption, map(scene.sample_attributes, [0] * 200, range(200)))
    }
    assert {request.motion_prompt.split()[0] for request in two if request.motion_prompt} <= known


def test_both_papers_videos_are_shown_one_above_the_other(here: Path):
    shades = {"microcinema": 40, "factorized_dreamer": 200}
    clip = np.arange(0, 40, 10, np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    for paper, shade in shades.items():
        for name in demo.SCENES:
            write_video(here / paper / f"{name}.mp4", clip + np.uint8(shade), 8.0, lossless=True)
            (here / paper / f"{name}.json").write_text('{"keyframe_index": 3}')
    demo.show_both()
    with Image.open(here / "both_papers" / "all.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (4 * 64 * demo.SCALE, 2 * 64 * demo.SCALE)
        above, below = (gif.convert("RGB").getpixel((5, y))[0] for y in (10, gif.height - 10))
    assert abs(above - 40) < 4 and abs(below - 200) < 4
    sheet = np.array(Image.open(here / "both_papers" / "sheet.png"))
    rows = np.flatnonzero(
        (sheet[:, 8 + 64 + 4 : 8 + 2 * 64 + 4] == _MARK).all(axis=(1, 2))
    )  # of the second frame of two
    assert len(rows) == 2 * 2 * 2 * len(demo.SCENES)  # two lines above and two below, in each row of either paper
    assert sheet[rows[2] - 10, 8 + 64 + 4, 0] == pytest.approx(40 + 30, abs=4)  # frame 3
    assert {path.name for path in (here / "both_papers").iterdir()} == {"all.gif", "sheet.png"}
