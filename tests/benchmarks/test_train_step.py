"""The benchmark of the training step puts runs side by side."""

import json

import pytest

from benchmarks import train_step
from benchmarks.step_timer import PARTS
from fixtures import tiny, tiny_training
from microcinema.sprites.dataset import write_dataset


def test_runs_stand_side_by_side(tmp_path, capsys):
    write_dataset(tmp_path / "clips", num_videos=2, seed=0)
    tiny.base_folder(tmp_path / "base")
    tiny_training.reset_accelerator()
    overrides = [f"base.pretrained_model_name_or_path={tmp_path / 'base'}", f"data.root={tmp_path / 'clips'}"]
    overrides += [f"resolution={tiny.SIZE}", "num_frames=4", "train_batch_size=1", "dataloader_num_workers=0"]
    runs = ["--run", "one clip", "--run", "two clips", "gradient_accumulation_steps=2"]
    figures = tmp_path / "figures.json"
    assert train_step.main([*overrides, *runs, "--steps", "1", "--clock", "cpu", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert report["clock"] == "cpu"
    assert [timings["clips"] for timings in report["runs"].values()] == [1, 2]
    for timings in report["runs"].values():
        assert all(timings[part] > 0 for part in PARTS if part != "encoders")  # both captions are known after warm-up
        assert sum(timings[part] for part in (*PARTS, "other")) == pytest.approx(timings["step"])
        assert 0 <= timings["data_wait"] < 1 and timings["decoding"] > 0 and timings["peak_memory_gib"] > 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "ms for a clip (share of the step)"
    assert rows[2:] == ["step", *PARTS, "other", "decoding a clip, by one worker", "waiting for workers", "GiB at most"]


def test_several_runs_need_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_step.main(["--run", "a", "--run", "b"]) == 2
    assert capsys.readouterr().err.startswith("error: 2 runs under several processes;")
