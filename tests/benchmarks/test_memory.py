"""The estimate of memory against what a process takes, and the table that the guide shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from microcinema.config.compose import compose
from microcinema.pipelines.base_model import load_base

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_within_15_percent_of_what_a_process_takes(tmp_path):
    path, parts = tmp_path / "figures.json", ["sampling", "training"]  # sampling has forward in it
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--quick",
        "--sizes",
        "64",
        "--measure",
        *parts,
        "--json",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert list(figures) == parts
    for name, row in figures.items():
        assert 0.85 < row["ratio"] < 1.15, (name, row)
        assert row["measured"] > 0.2  # GiB: enough for what is not a tensor to be little
        assert name in done.stdout


@pytest.mark.slow
def test_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "RUNS", {"sample": {}})
    path = tmp_path / "figures.json"
    memory.main(["--quick", "--sizes", "64", "128", "--json", str(path)])
    small, large = json.loads(path.read_text())["sample"].values()
    assert small["weights"] == large["weights"] < small["peak"] < large["peak"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "| GiB, 16 frames | 64x64 | 128x128 |"
    assert lines[2].startswith("| `sample` | 0.")


@pytest.mark.parametrize(
    "name, counts",
    [
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (
            "sdxl",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_the_settings_are_those_of_stable_diffusion(tmp_path, name, counts):
    """Parameters of its published networks."""
    with FakeTensorMode():
        base = load_base(memory.settings_of(name, tmp_path / name), weights=False)
    assert {part: sum(p.numel() for p in getattr(base, part).parameters()) for part in counts} == counts
    assert base.tokenizer.model_max_length == 77


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["sample memory.torch_dtype=float16 decode_chunk_size=1", "train trainable_parameters=temporal"],
)
def test_the_guide_shows_what_is_estimated_today(tmp_path, name):
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(.*)` \| ([\d.]+) \| [\d.]+ \|$", page, re.MULTILINE))
    assert set(rows) == set(memory.RUNS)
    base = memory.settings_of("sd15", tmp_path / "sd15")
    composed = compose("train", [f"base.pretrained_model_name_or_path={base}", "resolution=256", "num_frames=16"])
    found = memory.estimate(composed, memory.RUNS[name])
    assert found.peak / memory.GIB == pytest.approx(float(rows[name]), rel=0.03)
