"""The measure of upscaling: what it counts, and that it runs from training to the table."""

import json

import numpy as np

from benchmarks import upscaling


def test_motion_that_is_right_costs_no_flicker_and_noise_that_changes_does():
    rng = np.random.default_rng(0)
    truth = rng.integers(20, 230, (4, 8, 8, 3))
    still_error, moving_error = rng.integers(-10, 11, (1, 8, 8, 3)), rng.integers(-10, 11, (4, 8, 8, 3))
    psnr, flicker = upscaling.figures(truth + still_error, truth)
    assert flicker == 0 and np.isclose(psnr, 10 * np.log10(255**2 / np.square(still_error).mean()))
    assert upscaling.figures(truth + moving_error, truth)[1] > 5


def test_from_training_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upscaling, "CLIPS", 4)
    keys = ["--upscaler", str(tmp_path / "upscaler"), "--train-steps", "1", "1", "--clips", "1", "--steps", "1"]
    upscaling.main([*keys, "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert list(rows) == [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()[-4:]]
    own, one = rows["noise of its own for each frame"][0][1], rows["one noise"][0][1]
    assert one < own / 5  # untrained, it makes its noise visible
