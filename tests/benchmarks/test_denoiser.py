import importlib.util
import json
from pathlib import Path

import pytest
import torch

from microcinema.sprites import scene

PATH = Path(__file__).parents[2] / "benchmarks" / "denoiser.py"


@pytest.fixture(scope="module")
def benchmark():
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_denoiser_measures_every_contestant(benchmark, tmp_path, capsys):
    path = tmp_path / "figures.json"
    benchmark.main(["denoiser", "--quick", "--rounds", "1", "--json", str(path)])
    report = json.loads(path.read_text())
    peers = {"UNetMotionModel", "UNet3DConditionModel", "I2VGenXLUNet", "UNetSpatioTemporalConditionModel"}
    ours = {"VideoUNet, MicroCinema", "VideoUNet, Factorized-Dreamer"}
    assert set(report["forward"]) == peers | ours | {benchmark.REFERENCE}
    trained = {f"{model}, train: {train}" for model in ours for train in ("all", "temporal")}
    assert set(report["training"]) == peers | trained | {benchmark.REFERENCE}
    for part in ("forward", "training"):
        assert report[part][benchmark.REFERENCE]["ratio"] == 1
        assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["parameters"] > 0 for row in report[part].values())
    assert "UNetMotionModel" in capsys.readouterr().out


def test_options(benchmark, tmp_path):
    path = tmp_path / "figures.json"
    options = ["--parts", "forward", "--only", "MicroCinema", "--fusion", "spade", "--clock", "cpu", "--latents", "4"]
    benchmark.main(["denoiser", "--quick", "--rounds", "1", *options, "--json", str(path)])
    report = json.loads(path.read_text())
    assert set(report["forward"]) == {benchmark.REFERENCE, "VideoUNet, MicroCinema"}
    assert "training" not in report
    assert (report["fusion"], report["clock"], report["size"]["latents"]) == ("spade", "cpu", 4)


def test_sampling_measures_each_fusion(benchmark, tmp_path, capsys):
    path = tmp_path / "figures.json"
    options = ["--steps", "2", "--rounds", "1", "--latents", "4", "--clock", "cpu", "--json", str(path)]
    benchmark.main(["sampling", *options])
    report = json.loads(path.read_text())
    assert set(report["sampling"]) == {benchmark.WITHOUT, "add", "spade"}
    assert report["sampling"][benchmark.WITHOUT]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in report["sampling"].values())
    assert (report["steps"], report["clock"], report["size"]["latents"]) == (2, "cpu", 4)
    assert report["size"]["block_out_channels"] == list(benchmark.TINY["block_out_channels"])
    assert "spade" in capsys.readouterr().out


def test_sampling_can_be_measured_at_half_of_stable_diffusions_width(benchmark, monkeypatch):
    sizes = []
    monkeypatch.setattr(benchmark, "layout", lambda size: sizes.append(size) or pytest.skip("built no network"))
    with pytest.raises(pytest.skip.Exception):
        benchmark.main(["sampling", "--full"])
    assert sizes == [benchmark.FULL]


def test_drift_hands_on_its_options(benchmark, tmp_path, monkeypatch, capsys):
    from microcinema.sprites import long_video

    given = {}

    def makers(pipeline, **settings):
        given.update(settings, frames=pipeline.config["num_frames"])
        return {"real": lambda sprite, keyframe: scene.render(sprite, 31, 64, 8.0).frames}

    monkeypatch.setattr(long_video, "makers", makers)
    path = tmp_path / "figures.json"
    options = ["--prompts", "2", "--num-clips", "2", "--num-inference-steps", "3", "--guidance-scale", "1.5"]
    benchmark.main(["drift", *options, "--window-overlap", "4", "--seed", "7", "--json", str(path)])
    settings = {"num_segments": 2, "num_inference_steps": 3, "guidance_scale": 1.5, "window_overlap": 4, "seed": 7}
    assert given == {**settings, "frames": 16}
    report = json.loads(path.read_text())
    assert report | settings == report
    assert [set(row) for row in report["drift"]["real"]] == [{"object", "background_psnr"}] * 2
    assert "object as asked for" in capsys.readouterr().out


@pytest.mark.slow
def test_drift_measures_the_embedded_model(benchmark, tmp_path):
    path = tmp_path / "figures.json"
    options = ["--prompts", "1", "--num-clips", "2", "--num-inference-steps", "2", "--guidance-scale", "1"]
    benchmark.main(["drift", *options, "--json", str(path)])
    found = json.loads(path.read_text())["drift"]
    assert {kind: len(rows) for kind, rows in found.items()} == {"real": 2, "continuation": 2, "windows": 2}
    assert found["real"][1]["background_psnr"] > found["continuation"][1]["background_psnr"]
