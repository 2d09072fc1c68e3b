"""The page of all benchmarks of speed."""

import re

import pytest

from benchmarks import performance


def test_names_and_ratios_of_the_page():
    assert performance.display_name("VideoUNet, microcinema, train: temporal") == "`microcinema`, `temporal`"
    assert performance.display_name("VideoUNet, plain") == "`plain`"
    assert performance.display_name("2D UNet per frame") == "2D UNet per frame"
    assert performance.ratio({"ratio": 1.234, "ratio_low": 1.2, "ratio_high": 1.26}) == "1.23 (1.20 to 1.26)"
    assert performance.ratio({"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}) == "1"
    assert performance.ratio(None) == ""


@pytest.mark.slow
def test_one_command_writes_the_page_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "docs")]
    assert performance.main(arguments) == 0
    page = (tmp_path / "docs/performance.md").read_text()
    assert all(
        name in page for name in ("`microcinema`", "I2VGenXLUNet", "`import torch`", "clips a second", "| VAE |")
    )
    assert not re.search(r"\{\{|\{%|undefined|\bnan\b", page)
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        "performance.md",
        "performance.png",
        "sampling.png",
    }
    (tmp_path / "work/decoding.json").unlink()
    capsys.readouterr()
    assert performance.main(arguments) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["decoding"]
    (tmp_path / "work/loader.json").unlink()
    performance.QUICK["loader"], line = "loader --decoder none", performance.QUICK["loader"]
    assert performance.main(arguments) == 2
    assert "run it alone" in capsys.readouterr().err
    performance.QUICK["loader"] = line
