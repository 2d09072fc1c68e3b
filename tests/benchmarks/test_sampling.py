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


@pytest.mark.slow
def test_settings_are_measured_on_the_same_clips_of_the_protocol(tmp_path, capsys):
    path = tmp_path / "figures.json"
    options = ["--prompts", "1", "--batch-size", "2", "--figure", str(tmp_path / "x.png"), "--json", str(path)]
    rows = ["num_inference_steps=2 keyframe.num_inference_steps=1", "num_inference_steps=1 guidance_interval=[0,0]"]
    assert sampling.main(["settings", *rows, *options]) == 0
    report = json.loads(path.read_text())
    assert list(report["settings"]) == ["preset=quality", *rows] and report["clips"] == 3
    seconds = [row["seconds"] for row in report["settings"].values()]
    assert seconds[0] > 2 * seconds[1] > 2 * seconds[2]
    assert all(row[key]["n"] == 3 for row in report["settings"].values() for key in ("object", "motion", "psnr"))
    assert (tmp_path / "x.png").stat().st_size > 1000
    table = capsys.readouterr().out
    assert "| `num_inference_steps=1 guidance_interval=[0,0]` |" in table and " 1.00 |" in table


def test_the_marks_of_the_table_compare_with_the_first_row():
    def row(seconds, share, psnr):
        interval = {"value": share, "low": share - 0.1, "high": share + 0.1}
        return {"seconds": seconds, "object": interval, "motion": interval, "psnr": dict.fromkeys(interval, psnr)}

    lines = sampling.settings_table({"a": row(2.0, 0.9, 30.0), "b": row(1.0, 0.81, 29.6), "c": row(0.5, 0.79, 29.4)})
    assert [line.count("**") for line in lines.splitlines()] == [0, 0, 6, 6, 0]
    assert "| 1.00 | 0.50 | **81.0** [71.0, 91.0] |" in lines
