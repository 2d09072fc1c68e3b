"""The benchmark of the denoiser, with tiny networks."""

import json

import pytest

from benchmarks import denoiser


def test_every_network_is_measured(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert denoiser.main(["--quick", "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    peers = {"UNetMotionModel", "UNet3DConditionModel", "I2VGenXLUNet", "UNetSpatioTemporalConditionModel"}
    ours = {f"VideoUNet, {preset}" for preset in denoiser.PRESETS}
    assert set(report["forward"]) == peers | ours | {denoiser.REFERENCE}
    trained = {f"{model}, train: {trainable}" for model in ours for trainable in ("all", "temporal")}
    assert set(report["training"]) == peers | trained | {denoiser.REFERENCE}
    for part in ("forward", "training"):
        assert report[part][denoiser.REFERENCE]["ratio"] == 1
        assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["parameters"] > 0 for row in report[part].values())
    assert "UNetMotionModel" in capsys.readouterr().out


def test_options(tmp_path):
    path = tmp_path / "figures.json"
    options = ["--parts", "forward", "--only", "plain", "--clock", "cpu", "--latents", "4"]
    denoiser.main(["--quick", "--rounds", "1", *options, "--json", str(path)])
    report = json.loads(path.read_text())
    assert set(report["forward"]) == {denoiser.REFERENCE, "VideoUNet, plain"}
    assert "training" not in report
    assert (report["clock"], report["size"]["latents"]) == ("cpu", 4)


def test_operations_are_counted_at_full_width_without_computing(tmp_path):
    path = tmp_path / "figures.json"
    assert denoiser.main(["--parts", "flops", "--json", str(path)]) == 0
    flops = json.loads(path.read_text())["flops"]
    assert flops[denoiser.REFERENCE]["parameters"] == 859_520_964  # of Stable Diffusion 1.5
    ratios = {name.removeprefix("VideoUNet, "): row["ratio"] for name, row in flops.items()}
    assert ratios["plain"] == pytest.approx(ratios["microcinema_once"], abs=0.001)
    assert 1 < ratios["microcinema_once"] < ratios["factorized_dreamer_light"] < 1.5
    assert ratios["UNetMotionModel"] < ratios["UNetSpatioTemporalConditionModel"]
    assert ratios["microcinema_once"] < ratios["factorized_dreamer"] and 1.5 < ratios["microcinema"] < 3
