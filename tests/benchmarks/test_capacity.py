"""The plan is what its figures say, by hand and on the published page."""

import json
from pathlib import Path

import pytest

from benchmarks import capacity

ROOT = Path(__file__).parents[2]
FIGURES = {
    "clips": 1e6,
    "hours_of_video": 5000.0,  # 18 s a clip
    "bits_per_second": 1e6,  # 2.25 MB a clip
    "training_flops": 6e12,
    "vae_flops": 3e12,
    "text_encoder_flops": 1e12,
    "gradient_bytes": 2e9,
    "latent_bytes": 100_000.0,
    "text_token_bytes": 90_000.0,
    "sample_overhead_bytes": 10_000.0,
    "decoding_seconds": 0.5,
    "peak_flops": 1e15,
    "utilisation_low": 0.2,
    "utilisation_high": 0.4,
    "nvlink_bytes_per_second": 7e9,
    "node_bytes_per_second": 8e9,
    "store_bytes_per_second": 4.5e8,  # 200 raw clips, 2250 latents
    "cores_per_gpu": 10.0,  # 20 clips a second
    "clips_per_step": 1000.0,
    "steps": 36_000.0,
    "dollars_per_gpu_hour": 2.0,
    "store_dollars_per_tb_month": 20.0,
}


def test_eight_gpus():
    found = capacity.plan(FIGURES, 8, "raw clips", 0.25)
    # 8 x 250 TFLOP/s on 10 TFLOP are 200 clips a second, so 5 s a step; 2 x 7/8 x 2 GB at 7 GB/s are half a second more.
    assert found.communication == pytest.approx(0.5)
    assert found.step == pytest.approx(5.5)
    assert found.limits == pytest.approx({"GPUs": 1000 / 5.5, "store": 200, "decoding": 160})
    assert (found.bottleneck, found.rate) == ("decoding", pytest.approx(160))
    assert found.cores == pytest.approx(1000 / 5.5 / 2)
    assert found.reading == pytest.approx(160 * 2.25e6)


def test_many_gpus_run_into_the_store_or_into_their_gradients():
    raw = capacity.plan(FIGURES, 64, "raw clips", 0.25)
    assert (raw.bottleneck, raw.rate) == ("store", 200)
    cached = capacity.plan(FIGURES, 64, "cached latents", 0.25)
    # 64 x 250 TFLOP/s on 6 TFLOP: 0.375 s; 2 x 63/64 x 2 GB leave a node at 8 GB/s: 0.4921875 s.
    assert cached.step == pytest.approx(0.375 + 0.4921875)
    assert cached.bottleneck == "gradients"
    assert cached.cores == 0 and "decoding" not in cached.limits


def test_latents_on_few_gpus_are_bound_by_the_gpus():
    found = capacity.plan(FIGURES, 8, "cached latents", 0.25)
    assert found.bottleneck == "GPUs"
    assert found.rate == pytest.approx(1000 / (3 + 0.5))


def test_the_tables_show_it():
    entries = {name: {"value": value, "unit": "u", "kind": "assumed", "source": "s"} for name, value in FIGURES.items()}
    shown = capacity.render(FIGURES, entries)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")
    ]
    assert ["stored, KB a clip", "2,250", "200"] in rows
    assert ["stored, TB for 1.0 million clips", "2.2", "0.2"] in rows
    assert ["operations, TFLOP a clip", "10.0", "6.0"] in rows
    assert ["GPU hours", "2.78 to 5.56"] in rows  # 1e6 clips of 4 TFLOP on 1 PFLOP/s, at 40 and 20%
    assert ["core hours of decoding", "139"] in rows
    # 64 GPUs are bound by the store, whatever they reach: 1e6 clips at 200 a second, and 36 million of them.
    assert ["64", "raw clips", "200", "store", "1.39", "88.9", "178"] in rows
    assert ["64", "raw clips", "200", "store", "50", "3,200", "6,400"] in rows
    # 8 are bound by themselves at 20%: 6.25 s and 0.5 s a step of 1000; at 40% by their decoders, 160 clips a second.
    assert ["8", "raw clips", "148 to 160", "GPUs, decoding", "1.74 to 1.88", "13.9 to 15", "27.8 to 30"] in rows


def test_the_page_is_what_the_committed_figures_come_to():
    figures, entries = capacity.read_figures()
    text = capacity.PAGE.read_text(encoding="utf-8")
    assert capacity.page(text, capacity.render(figures, entries)) == text
    assert set(figures) == set(FIGURES)
    assert {entry["kind"] for entry in entries.values()} == {"published", "counted", "measured", "assumed"}
    assert all(entry["source"] for entry in entries.values())


def test_a_changed_figure_changes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "PAGE", tmp_path / "scale.md")
    monkeypatch.setattr(capacity, "FIGURES", tmp_path / "scale.json")
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    entries = json.loads((ROOT / "docs" / "scale.json").read_text(encoding="utf-8"))
    entries["clips"]["value"] = 1234567
    (tmp_path / "scale.md").write_text(text)
    (tmp_path / "scale.json").write_text(json.dumps(entries))
    capacity.main([])
    changed = (tmp_path / "scale.md").read_text()
    assert "TB for 1.2 million clips" in changed
    assert changed.partition(capacity.BEGIN)[0] == text.partition(capacity.BEGIN)[0]
    assert changed.partition(capacity.END)[2] == text.partition(capacity.END)[2]


def test_decoding_is_measured_on_a_real_file(monkeypatch):
    monkeypatch.setattr(capacity, "WEBVID", (48, 64))
    few, many = (capacity.measure_decoding(3.0, 2, rate) for rate in (2e4, 2e5))
    assert 0 < few["decoding_seconds"] < 5
    assert few["bits"] * 1.2 >= 2e4 and few["bits"] < many["bits"]
