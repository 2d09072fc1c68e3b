"""The whole measurement with the world's renderer, or a spoiled one, in the place of a model; and the report about it."""

import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch

from microcinema.pipelines.sample_folder import Sample
from microcinema.sprites import scene
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.sprites.evaluate import REPORT_FILE, RESULTS_FILE, evaluate, real_sample, text_table
from microcinema.sprites.judge import SpriteJudge
from microcinema.sprites.protocol import SpritesProtocol, Task
from microcinema.utils.errors import UserError

PROTOCOL = SpritesProtocol(5, 2, 2)


@pytest.fixture(scope="module")
def judge() -> SpriteJudge:
    """Untrained: what it says is wrong, but it says the same of the same clip."""
    torch.manual_seed(0)
    classes = {
        "shape": list(scene.SHAPES),
        "colour": list(scene.COLOURS),
        "size": list(scene.SIZES),
        "background": list(scene.BACKGROUNDS),
    }
    return SpriteJudge(SpriteClassifier(classes, channels=(8, 16, 16), feature_dim=16), batch_size=5)


def perfect(task: Task) -> Sample:
    return real_sample(task.sprite, PROTOCOL)


def frozen(task: Task) -> Sample:
    sample = perfect(task)
    return Sample(np.repeat(sample.frames[:1], 16, axis=0), sample.keyframe)


@pytest.fixture(scope="module")
def perfect_run(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perfect")
    return folder, evaluate(PROTOCOL, perfect, judge, folder, {"pipeline": "<renderer>", "seed": 7})


def test_a_perfect_model_scores_like_real_clips(perfect_run):
    _, results = perfect_run
    assert results["protocol"]["identifier"] == PROTOCOL.identifier
    assert list(results["parts"]) == ["seen", "heldout", "image"]
    for part in results["parts"].values():
        assert part["model"] == part["real"]
        assert part["model"]["motion"]["value"] == part["model"]["speed"]["value"] == 1
        assert part["model"]["psnr"]["value"] == 60 and part["model"]["ssim"]["value"] == pytest.approx(1)
        assert part["frechet"]["model"] == pytest.approx(0, abs=1e-9) and part["frechet"]["real"] > 0
    image = results["parts"]["image"]["model"]
    assert image["epe"]["value"] < 0.5 * image["epe_of_no_motion"]["value"]
    assert "epe" not in results["parts"]["seen"]["model"]
    assert "Motion" in text_table(results)


def test_a_model_that_only_repeats_the_key_frame_fails_at_motion(judge, tmp_path):
    results = evaluate(PROTOCOL, frozen, judge, tmp_path, {"pipeline": "frozen"})
    for name, part in results["parts"].items():
        still = [task.sprite.motion == "still" for task in PROTOCOL.tasks() if task.part == name]
        assert part["model"]["motion"]["value"] == pytest.approx(np.mean(still))
        assert part["model"]["static"]["value"] == 1
        assert part["model"]["psnr"]["value"] == 60
    image = results["parts"]["image"]["model"]
    assert image["epe"]["value"] == pytest.approx(image["epe_of_no_motion"]["value"], abs=1e-6)


def test_a_key_frame_in_the_middle_is_compared_with_the_middle_frame(judge, tmp_path):
    def load(task: Task) -> Sample:
        return real_sample(task.sprite, PROTOCOL, keyframe_index=8)

    results = evaluate(PROTOCOL, load, judge, tmp_path, {}, keyframe_index=8)
    assert all(part["model"]["psnr"]["value"] == 60 for part in results["parts"].values())
    results = evaluate(PROTOCOL, load, judge, tmp_path, {})
    assert all(part["model"]["psnr"]["value"] < 60 for part in results["parts"].values())


def test_results_on_disk_are_those_returned(perfect_run):
    folder, results = perfect_run
    stored = json.loads((folder / RESULTS_FILE).read_text())
    assert stored == json.loads(json.dumps(results))
    assert [clip["prompt"] for clip in stored["clips"]] == [task.prompt for task in PROTOCOL.tasks()]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_report_is_one_page_that_plays_every_clip(perfect_run, tmp_path):
    import base64

    folder, _ = perfect_run
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    videos = [attributes["data-src"] for tag, attributes in elements.found if tag == "video"]
    assert len(videos) == len(PROTOCOL.tasks())
    file = tmp_path / "clip.mp4"
    file.write_bytes(base64.b64decode(videos[0].removeprefix("data:video/mp4;base64,")))
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert sum(1 for _ in container.decode(stream)) == 16
    # Self-contained: nothing but data is referred to, and nothing is imported.
    links = [value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(value.startswith("data:") for value in links)
    assert not re.search(r"https?://|@import|url\(", page)
    for task in PROTOCOL.tasks():
        assert task.prompt in page
    assert PROTOCOL.identifier in page and "seed=7" in page


def test_report_escapes_what_it_is_told(perfect_run):
    folder, _ = perfect_run
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert "&lt;renderer&gt;" in page and "<renderer>" not in page


def test_a_clip_of_the_wrong_length_is_named(judge, tmp_path):
    def short(task: Task) -> Sample:
        return Sample(perfect(task).frames[:8], perfect(task).keyframe)

    with pytest.raises(UserError, match=r"seen-00000 is \(8, 64, 64, 3\)"):
        evaluate(PROTOCOL, short, judge, tmp_path, {})
    assert not (tmp_path / RESULTS_FILE).exists()


def test_judge_is_saved_loaded_and_independent_of_batches(judge, tmp_path):
    judge.classifier.save_pretrained(tmp_path / "classifier")
    loaded = SpriteJudge.load(tmp_path / "classifier", batch_size=2)
    clips = np.stack([perfect(task).frames for task in PROTOCOL.tasks()[:5]])
    (names, features), (again, others) = judge(clips), loaded(clips)
    assert names == again and set(names[0]) == {"shape", "colour", "size", "background"}
    np.testing.assert_allclose(features, others, atol=1e-5)
    with pytest.raises(UserError, match="no-such-classifier"):
        SpriteJudge.load("no-such-classifier")
    (tmp_path / "classifier" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the classifier"):
        SpriteJudge.load(tmp_path / "classifier")
