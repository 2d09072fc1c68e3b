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


@pytest.mark.slow  # the bounds of a training step, below, count operations in the quick round
def test_operations_are_counted_at_full_width_without_computing(tmp_path):
    path = tmp_path / "figures.json"
    assert denoiser.main(["--parts", "flops", "--json", str(path)]) == 0
    flops = json.loads(path.read_text())["flops"]
    assert flops[denoiser.REFERENCE]["parameters"] == 859_520_964  # of Stable Diffusion 1.5
    ratios = {name.removeprefix("VideoUNet, "): row["ratio"] for name, row in flops.items()}
    assert ratios["plain"] == pytest.approx(ratios["microcinema_once"], abs=0.001)
    assert all(ratios[preset] < costs["flops"] for preset, costs in COSTS.items())
    assert 1 < ratios["microcinema_once"] < ratios["factorized_dreamer_light"] < 1.5
    assert ratios["UNetMotionModel"] < ratios["UNetSpatioTemporalConditionModel"]
    assert ratios["microcinema_once"] < ratios["factorized_dreamer"] and 1.5 < ratios["microcinema"] < 3


# Of a training step with trainable_parameters=temporal at Stable Diffusion 1.5's width, one clip of 16 frames of 256x256: upper bounds.
COSTS = {
    "microcinema": {"launches": 4567, "gigabytes": 178.2, "flops": 2.09},
    "microcinema_once": {"launches": 3985, "gigabytes": 93.0, "flops": 1.12},
    "factorized_dreamer": {"launches": 3795, "gigabytes": 115.9, "flops": 1.41},
    "factorized_dreamer_light": {"launches": 3039, "gigabytes": 87.3, "flops": 1.14},
    "plain": {"launches": 2305, "gigabytes": 78.6, "flops": 1.12},
}


@pytest.mark.parametrize(
    "preset", [pytest.param(preset, marks=() if preset == "microcinema" else pytest.mark.slow) for preset in COSTS]
)
def test_launches_and_memory_traffic_of_a_training_step_stay_within_bounds(preset):
    """A slice that autograd copies onto itself costs no operations, and shows here."""
    name = f"VideoUNet, {preset}, train: temporal"
    found = denoiser.count_launches(denoiser.STABLE_DIFFUSION, [name])[name]
    assert found["launches"] <= COSTS[preset]["launches"]
    assert found["bytes"] / 1e9 <= COSTS[preset]["gigabytes"]
