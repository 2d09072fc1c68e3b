import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "scripts" / "benchmark.py"


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
    assert set(report["forward"]) == peers | {benchmark.REFERENCE, "VideoUNet"}
    assert set(report["training"]) == peers | {
        benchmark.REFERENCE,
        "VideoUNet, train: all",
        "VideoUNet, train: temporal",
    }
    for part in ("forward", "training"):
        assert report[part][benchmark.REFERENCE]["ratio"] == 1
        assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["parameters"] > 0 for row in report[part].values())
    assert "UNetMotionModel" in capsys.readouterr().out


def test_options(benchmark, tmp_path):
    path = tmp_path / "figures.json"
    options = ["--parts", "forward", "--only", "VideoUNet", "--fusion", "spade", "--clock", "cpu", "--latents", "4"]
    benchmark.main(["denoiser", "--quick", "--rounds", "1", *options, "--json", str(path)])
    report = json.loads(path.read_text())
    assert set(report["forward"]) == {benchmark.REFERENCE, "VideoUNet"}
    assert "training" not in report
    assert (report["fusion"], report["clock"], report["size"]["latents"]) == ("spade", "cpu", 4)
