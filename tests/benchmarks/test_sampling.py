"""The benchmark of the denoising loop."""

import json

import pytest

from benchmarks import denoiser, sampling


def test_each_network_is_measured(tmp_path, capsys):
    path = tmp_path / "figures.json"
    options = ["--steps", "2", "--rounds", "1", "--latents", "4", "--clock", "cpu", "--json", str(path)]
    assert sampling.main(options) == 0
    report = json.loads(path.read_text())
    assert set(report["sampling"]) == set(sampling.NETWORKS)
    assert report["sampling"][sampling.BASELINE]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in report["sampling"].values())
    assert (report["steps"], report["clock"], report["size"]["latents"]) == (2, "cpu", 4)
    assert report["size"]["block_out_channels"] == list(sampling.TINY["block_out_channels"])
    assert "microcinema_once, fusion=scale_shift" in capsys.readouterr().out


def test_half_of_stable_diffusions_width_can_be_measured(monkeypatch):
    sizes = []
    monkeypatch.setattr(sampling, "unet_settings", lambda size: sizes.append(size) or pytest.skip("built no network"))
    with pytest.raises(pytest.skip.Exception):
        sampling.main(["--full"])
    assert sizes == [denoiser.FULL]
