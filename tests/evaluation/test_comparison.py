"""Comparisons: differences of the same clips, and what cannot be compared."""

import json

import numpy as np
import pytest
from PIL import Image

from microcinema.config.compose import compose
from microcinema.evaluation.comparison import compare
from microcinema.evaluation.fvd import video_distance
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.utils.errors import UserError

N = 40
MEASURES = [
    {"key": "fvd", "label": "FVD", "meaning": "", "unit": "", "better": "lower", "digits": 2},
    {"key": "psnr", "label": "PSNR", "meaning": "", "unit": "dB", "better": "higher", "digits": 1},
    {"key": "object", "label": "Object", "meaning": "", "unit": "%", "better": "higher", "digits": 1},
]


def write(folder, name, shift=0.0, right=lambda i: True, identifier="p-2-abc", samples=False):
    """An evaluation whose PSNR is that of clip i, 20 + i, and a shift."""
    clips = [
        {"part": "all", "name": f"{i:05d}", "prompt": f"prompt <{i}>", "measures": {"psnr": 20 + i + shift}}
        | {"right": {"object": right(i)}}
        for i in range(N)
    ]
    real = np.random.default_rng(0).normal(size=(N, 3))
    fvd = video_distance(np.random.default_rng(1).normal(size=(N, 3)) + shift, real)
    results = {
        "protocol": {"identifier": identifier, "fps": 8.0},
        "generated": {"pipeline": f"models/{name}", "fps": 8.0},
        "measures": MEASURES,
        "values": {"fvd": vars(fvd)},
        "clips": clips,
    }
    path = folder / name
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    if samples:
        for i in range(N):
            item, out = PromptItem("", f"{i:05d}"), SampleFolder(path / "samples", ("frames",))
            out.write_keyframe(item, Image.new("RGB", (16, 16)), {"id": item.id})
            out.write_video(item, np.full((4, 16, 16, 3), i, np.uint8), 8.0, {"id": item.id})
    return str(path)


def rows(folder):
    content = json.loads((folder / "comparison.json").read_text())
    return {row["key"]: row["cells"] for row in content["rows"]}


def test_differences_are_of_the_same_clips(tmp_path):
    """Clips differ by far more than the models do; the difference of each pair is exact."""
    one, other = write(tmp_path, "one"), write(tmp_path, "other", 0.5, lambda i: i % 4 > 0)
    page = compare([one, other], str(tmp_path / "out"))
    found = rows(tmp_path / "out")
    first, second = found["psnr"]
    assert first["high"] - first["low"] > 5 and "difference" not in first
    assert second["difference"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": N} and second["verdict"] == "better"
    assert (
        found["object"][1]["difference"]["value"] == pytest.approx(-0.25) and found["object"][1]["verdict"] == "worse"
    )
    fvd = found["fvd"][1]["difference"]
    widths = [cell["high"] - cell["low"] for cell in (*found["fvd"], fvd)]
    assert fvd["low"] < fvd["value"] < fvd["high"] and widths[2] < np.hypot(*widths[:2])  # by the same resamples
    values = [video_distance(*sides).value for sides in features(0.5)]
    assert fvd["value"] == pytest.approx(values[1] - values[0])
    text = page.read_text()
    assert "PSNR (dB) ↑" in text and "+0.5<span>+0.5 to +0.5</span>" in text and "<h2>Clips" not in text
    assert (tmp_path / "out" / "comparison.tex").read_text().startswith("\\begin{tabular}{lrr}")
    assert "| PSNR (dB) ↑ | 39.5 | 40.0 (+0.5) |" in (tmp_path / "out" / "comparison.md").read_text()


def features(shift):
    real, one = (np.random.default_rng(seed).normal(size=(N, 3)) for seed in (0, 1))
    return (one, real), (one + shift, real)


def test_no_difference_has_no_verdict_and_runs_of_one_model_have_the_names_of_their_folders(tmp_path):
    one = write(tmp_path / "a", "model")
    other = write(tmp_path / "b", "model", right=lambda i: i % 20 > 0)
    (tmp_path / "b" / "model").rename(tmp_path / "b" / "fast")
    compare([one, other.replace("model", "fast")], str(tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert [found[key][1]["verdict"] for key in ("fvd", "psnr", "object")] == ["", "", ""]
    assert "|  | model | fast |" in (tmp_path / "out" / "comparison.md").read_text()


def test_clips_stand_side_by_side_and_text_is_escaped(tmp_path):
    folders = [write(tmp_path, name, shift, samples=True) for name, shift in (("one", 0.0), ("other", 1.0))]
    text = compare([*folders, folders[0]], str(tmp_path / "out")).read_text()
    assert text.count("data:video/mp4") == 3 * text.count('class="card side"') >= 3 * 12
    assert "prompt &lt;0&gt;" in text and "prompt <0>" not in text and "http" not in text


@pytest.mark.parametrize("case", ["one", "missing", "protocol", "old"])
def test_what_cannot_be_compared_is_refused(tmp_path, case):
    one = write(tmp_path, "one")
    other = write(tmp_path, "other", identifier="p-2-xyz" if case == "protocol" else "p-2-abc")
    if case == "old":
        (tmp_path / "other" / "results.json").write_text('{"protocol": {}}')
    folders = {"one": [one], "missing": [one, "gone"]}.get(case, [one, other])
    words = {"one": "two or more", "missing": "'gone' has no readable", "protocol": "p-2-xyz, and", "old": "older"}[
        case
    ]
    with pytest.raises(UserError, match=words):
        compare(folders, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_it_is_a_key_of_the_command():
    assert compose("evaluate", ["compare=[runs/a,runs/b]"]).compare == ["runs/a", "runs/b"]
