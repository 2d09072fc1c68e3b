"""The command `prepare`: what it writes, and what it refuses to write over."""

from pathlib import Path

import pytest

from microcinema.commands import cli


def test_it_renders_and_replaces_only_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "sprites"
    for clips in (2, 1):
        assert (
            cli.main(["prepare", "sprites", f"output_dir={folder}", f"num_videos={clips}", "num_frames=3", "size=32"])
            == 0
        )
        assert len((folder / "clips.csv").read_text().splitlines()) == 1 + clips
        assert len(list(folder.rglob("*.mp4"))) == clips

    overrides = [f"output_dir={folder}", "num_videos=12", "num_frames=1", "size=32", "rotation_weight=1000"]
    assert cli.main(["prepare", "sprites", *overrides]) == 0
    lines = (folder / "clips.csv").read_text().splitlines()[1:]
    assert all("rotating" in line or "circle" in line for line in lines)

    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert cli.main(["prepare", "sprites", f"output_dir={precious.parent}", "num_videos=1"]) == 2
    assert cli.main(["prepare", "sprites", f"output_dir={precious}", "num_videos=1"]) == 2
    assert "choose a new folder" in capsys.readouterr().err
    assert precious.read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sprites", "thesis"]


@pytest.mark.parametrize(
    "name", ["latents/000000.tar", "videos/000001_001000/mine.mp4", "notes.txt", "videos/cut.mp4", ".env"]
)
def test_it_replaces_no_file_of_others_in_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    """Encoded latents, for example, that lie beside the clips."""
    command = ["prepare", "sprites", f"output_dir={tmp_path}", "num_frames=1", "size=32"]
    assert cli.main([*command, "num_videos=2"]) == 0
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main([*command, "num_videos=1"]) == 2
    assert f"holds '{name}', which is not of Moving Sprites" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
