"""The command `prepare`: what it writes, and what it refuses to write over."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from microcinema import cli, preparing
from microcinema.config import compose, instantiate
from microcinema.data.flow import _method


def test_it_renders_and_replaces_only_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "sprites"
    for clips in (2, 1):
        assert cli.main(["prepare", f"output_dir={folder}", f"num_clips={clips}", "num_frames=3", "size=32"]) == 0
        assert len((folder / "clips.csv").read_text().splitlines()) == 1 + clips
        assert len(list(folder.rglob("*.mp4"))) == clips

    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert cli.main(["prepare", f"output_dir={precious.parent}", "num_clips=1"]) == 2
    assert cli.main(["prepare", f"output_dir={precious}", "num_clips=1"]) == 2
    assert "choose a new folder" in capsys.readouterr().err
    assert precious.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sprites", "thesis"]


def test_latents_are_of_the_clips_and_of_the_named_model(tmp_path: Path):
    base = tiny.base_folder(tmp_path / "base")
    clips = ["num_clips=2", "num_frames=3", f"output_dir={tmp_path / 'sprites'}", "size=32"]
    assert cli.main(["prepare", *clips, f"latents_of={base}"]) == 0
    chosen = ["data=sprites_latents", f"data.dataset.root={tmp_path / 'sprites'}", "num_frames=3", "resolution=32"]
    data = instantiate(compose("train", chosen).data)
    data.check(tiny.vae())
    side = 32 // tiny.VAE_FACTOR
    assert [item["latents"].shape for item in (data[0], data[1])] == [(3, tiny.LATENT_CHANNELS, side, side)] * 2
    assert data[0]["caption"].startswith("a ")


def test_an_unknown_model_is_told_before_anything_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["prepare", f"output_dir={tmp_path / 'sprites'}", "latents_of=no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert not (tmp_path / "sprites").exists()


def test_key_frames_and_flow_stand_beside_the_latents(tmp_path: Path):
    base = tiny.base_folder(tmp_path / "base")
    clips = ["num_clips=2", "num_frames=3", f"output_dir={tmp_path / 'sprites'}", "size=32"]
    assert cli.main(["prepare", *clips, f"latents_of={base}", "keyframe=first", "flow_teacher=ground_truth"]) == 0
    chosen = ["data=sprites_latents", f"data.dataset.root={tmp_path / 'sprites'}", "num_frames=3", "resolution=32"]
    data = instantiate(compose("train", chosen).data)
    data.check_extras("ground_truth", 0)
    side = 32 // tiny.VAE_FACTOR
    assert data[1]["keyframe"].shape == (3, 32, 32) and data[1]["flow"].shape == (2, 2, side, side)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["keyframe=first", "flow_teacher=dis"], "keyframe=first, flow_teacher=dis is kept beside latents"),
        (["keyframe=3", "latents_of=sprites-base"], "reference frame 3 is not in a clip of 3"),
        (["flow_teacher=raft", "latents_of=sprites-base"], "microcinema[flow]"),
        (["flow_teacher=raf"], "'ground_truth', 'dis' or 'raft'"),
    ],
)
def test_what_cannot_be_kept_is_told_before_anything_is_rendered(
    tmp_path: Path, overrides: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)  # as if it were not installed
    monkeypatch.setattr(preparing, "load_base", lambda name: SimpleNamespace(vae=tiny.vae()))
    _method.cache_clear()
    assert cli.main(["prepare", f"output_dir={tmp_path / 'out'}", "num_clips=1", "num_frames=3", *overrides]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
