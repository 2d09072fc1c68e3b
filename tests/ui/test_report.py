"""Reports and a comparison in Chromium: nothing fails, every picture and video loads, on a narrow screen and on paper as well."""

from pathlib import Path

import numpy as np
import pytest

from fixtures import tiny, tiny_detectors, zero_shot_data
from microcinema.commands import cli
from microcinema.pipelines.saving import save_pipeline
from microcinema.sprites.evaluate import evaluate, real_sample
from microcinema.sprites.judge import SpriteJudge
from microcinema.sprites.protocol import SpritesProtocol

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of miniature UCF-101, a comparison of two seeds, and a report of Moving Sprites, by name."""
    folder = tmp_path_factory.mktemp("pages")
    zero_shot_data.ucf101(folder / "ucf101")
    save_pipeline(tiny.video_pipeline(folder / "base", keyframe_position=1), folder / "model", with_base=False)
    tiny_detectors.clip_folder(folder / "clip")
    path, sha256 = tiny_detectors.write_script(tiny_detectors.SmallVideoScript(), folder / "video.pt")
    protocol = {"num_frames": 10, "fps": "null", "height": 32, "width": 32}
    protocol |= {"selection": "draw", "num_samples": 7, "num_real": 9}
    command = [
        *("evaluate", "evaluation=ucf101", f"evaluation.root={folder / 'ucf101'}", f"pipeline={folder / 'model'}"),
        *(f"evaluation.protocol.{key}={value}" for key, value in protocol.items()),
        *(f"evaluation.video.weights={path}", f"evaluation.video.sha256={sha256}"),
        *(f"evaluation.clip.weights={folder / 'clip'}", "evaluation.num_inference_steps=1", "batch_size=4"),
    ]
    for seed in (0, 1):
        assert cli.main([*command, f"seed={seed}", f"output_dir={folder / f'seed-{seed}'}"]) == 0
    compared = f"compare=[{folder / 'seed-0'}, {folder / 'seed-1'}]"
    assert cli.main(["evaluate", compared, f"output_dir={folder / 'compared'}"]) == 0

    small = SpritesProtocol(num_prompts=8, num_heldout_prompts=2, num_image_prompts=2, num_frames=16, size=64, fps=8.0)
    judge = SpriteJudge.load("sprites-classifier")
    evaluate(small, lambda task: real_sample(task.sprite, small), judge, folder / "sprites", {"pipeline": "real"})
    return {
        "report": folder / "seed-0/report.html",
        "comparison": folder / "compared/comparison.html",
        "sprites": folder / "sprites/report.html",
    }


LOADED = """async () => {
  const videos = [...document.querySelectorAll("video")].filter(video => video.offsetParent !== null);
  for (const video of videos) {
    video.scrollIntoView({block: "center"});
    for (let i = 0; video.readyState < 2 && i < 200; i++) await new Promise(done => setTimeout(done, 50));
  }
  const images = [...document.images];
  return [images.length, images.filter(i => i.complete && i.naturalWidth > 0).length,
          videos.length, videos.filter(v => v.readyState >= 2 && v.videoWidth > 0 && !v.error && !v.controls).length];
}"""


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["report", "comparison", "sprites"])
def test_page_shows_everything(name: str, width: int, pages: dict[str, Path], browser, tmp_path: Path):
    faults: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url[:80]))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else faults.append(r.url))
    page.goto(pages[name].as_uri())
    images, loaded, videos, playing = page.evaluate(LOADED)
    assert images == loaded > 0 and videos == playing >= 7
    # Tables scroll inside the page, which itself does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert faults == []
    page.close()


@pytest.mark.parametrize("name", ["report", "comparison", "sprites"])
def test_page_can_be_printed(name: str, pages: dict[str, Path], browser, tmp_path: Path):
    """On paper, which is white, every video shows its key frame though nobody has scrolled to it, and nothing is wider than the sheet."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page.goto(pages[name].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    page.set_viewport_size({"width": 700, "height": 1000})  # of A4 at 96 dots an inch, without margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.evaluate(
        "[...document.querySelectorAll('video')].every(video => video.poster.startsWith('data:image'))"
    )
    page.pdf(path=tmp_path / f"{name}.pdf", format="A4")
    assert np.fromfile(tmp_path / f"{name}.pdf", np.uint8).size > 20_000
    page.close()
