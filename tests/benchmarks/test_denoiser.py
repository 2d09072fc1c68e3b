"""The benchmark of the denoiser, with tiny networks."""

import json

from benchmarks import denoiser


def test_every_network_is_measured(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert denoiser.main(["--quick", "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    peers = {"UNetMotionModel", "UNet3DConditionModel", "I2VGenXLUNet", "UNetSpatioTemporalConditionModel"}
    ours = {"VideoUNet, MicroCinema", "VideoUNet, Factorized-Dreamer"}
    assert set(report["forward"]) == peers | ours | {denoiser.REFERENCE}
    trained = {f"{model}, train: {trainable}" for model in ours for trainable in ("all", "temporal")}
    assert set(report["training"]) == peers | trained | {denoiser.REFERENCE}
    for part in ("forward", "training"):
        assert report[part][denoiser.REFERENCE]["ratio"] == 1
        assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["parameters"] > 0 for row in report[part].values())
    assert "UNetMotionModel" in capsys.readouterr().out


def test_options(tmp_path):
    path = tmp_path / "figures.json"
    options = ["--parts", "forward", "--only", "MicroCinema", "--fusion", "spade", "--clock", "cpu", "--latents", "4"]
    denoiser.main(["--quick", "--rounds", "1", *options, "--json", str(path)])
    report = json.loads(path.read_text())
    assert set(report["forward"]) == {denoiser.REFERENCE, "VideoUNet, MicroCinema"}
    assert "training" not in report
    assert (report["fusion"], report["clock"], report["size"]["latents"]) == ("spade", "cpu", 4)
