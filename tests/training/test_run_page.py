"""The page over runs, from real runs: what it reads, what it says of damaged files, and that it reads only what was added."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures import tiny
from fixtures.tiny_training import reset_accelerator
from microcinema.commands import cli
from microcinema.sprites.dataset import write_dataset
from microcinema.training import run_page
from microcinema.training.run_page import read_runs, render_page

PROMPTS = ["a red star", "a <i>blue</i> circle"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the command `train` that was resumed, in a folder whose name is not plain."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.base_folder(folder / "base", "sd21")
    write_dataset(folder / "clips", num_videos=3, progress=False)
    overrides = [
        f"base.pretrained_model_name_or_path={folder / 'base'}",
        f"data.root={folder / 'clips'}",
        f"validation_data={{root: {folder / 'clips'}, metadata: {folder / 'clips/clips.csv'}}}",
        f"output_dir={folder / 'runs/sweep/a run & more'}",
        f"validation_prompts=[{', '.join(PROMPTS)}]",
        f"resolution={tiny.SIZE}",
        *("model=plain", "num_frames=4", "train_batch_size=1", "dataloader_num_workers=0", "logging_steps=1"),
        *("validation_steps=2", "checkpointing_steps=2", "validation_clips=1", "resume_from_checkpoint=latest"),
        *("sampling.num_inference_steps=1", "sampling.keyframe_num_inference_steps=1"),
    ]
    for steps in (2, 3):
        reset_accelerator()
        assert cli.main(["train", *overrides, f"max_train_steps={steps}"]) == 0
    return folder / "runs"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of them, to damage."""
    return shutil.copytree(trained, tmp_path / "runs")


def only(folder: Path) -> run_page.Run:
    (run,) = read_runs(folder, {}).values()
    return run


def page(folder: Path) -> str:
    return render_page(folder, list(read_runs(folder, {}).values()), 10)


def event_file(folder: Path) -> Path:
    return max(folder.glob("*/*/logs/*/events.*"), key=lambda path: path.stat().st_size)


def test_curves_are_those_that_tensorboard_reads(trained: Path):
    run = only(trained)
    events = EventAccumulator(str(run.folder / "logs/microcinema"))
    events.Reload()
    assert set(run.curves) == set(events.Tags()["scalars"]) >= {"loss", "validation/loss/t=100", "clips_per_second"}
    for tag, curve in run.curves.items():
        assert {step: value for step, (value, _) in curve.items()} == {e.step: e.value for e in events.Scalars(tag)}
    assert run.last == (max(e.wall_time for tag in run.curves for e in events.Scalars(tag)), 3)


def test_the_page_shows_all_that_the_runs_wrote(trained: Path):
    run, shown = only(trained), page(trained)
    assert all(f">{tag} <" in shown for tag in run.curves) and "step 3 of 3" in shown
    assert run.videos == {"2": ["0.mp4", "1.mp4"], "3": ["0.mp4", "1.mp4"]}
    assert 'data-steps="2 3" data-url="sweep/a%20run%20%26%20more/validation/step-"' in shown
    assert PROMPTS[1] not in shown and "a &lt;i&gt;blue&lt;/i&gt; circle" in shown
    assert run.events[0][1] == "started; processes: 1"
    assert run.events[1][1].startswith("started again, after step 2 had been logged")
    assert run.events[2][1] == "finished: wrote model_index.json" and len(run.events) == 3
    assert not re.search(r'(?:src|href)="(?!data:)', shown)  # nothing from elsewhere


def test_configs_stand_side_by_side(runs: Path):
    first = only(runs).folder
    other = shutil.copytree(first, first.with_name("other"))
    text = (other / "config.yaml").read_text(encoding="utf-8").replace("max_train_steps: 3", "max_train_steps: 9")
    (other / "config.yaml").write_text(text, encoding="utf-8")
    (runs / "damaged").mkdir()
    (runs / "damaged/environment.json").touch()  # and no config: it stands in no column
    differing, common = page(runs).split('<details id="common">')
    row = re.search(r"<code>max_train_steps</code></th>(.*)</tr>", differing)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["3", "9"]
    assert "<code>model.max_frames</code>" in common and "<code>model.max_frames</code>" not in differing


def test_events_tell_of_quarantine_and_numbers_that_are_not_finite(runs: Path):
    folder = only(runs).folder
    record = {
        "sample_index": 1,
        "index": 1,
        "id": "clip-1",
        "reason": "no <b> stream",
        "time": "2026-01-02T03:04:05+0000",
    }
    (folder / "quarantine").mkdir()
    (folder / "quarantine/rank-00000.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "not_finite").mkdir()
    (folder / "not_finite/step-2-rank-00000.safetensors").touch()
    texts = [text for _, text in only(runs).events]
    assert "broken clips in quarantine: 1; the last, clip-1: no <b> stream" in texts
    assert "stopped: not finite step-2-rank-00000.safetensors" in texts
    assert "no &lt;b&gt; stream" in page(runs)


@pytest.mark.parametrize("at, fault", [(0.5, "is damaged"), (0.0, "is damaged")])
def test_a_damaged_event_file_is_told_and_read_up_to_there(runs: Path, at: float, fault: str):
    whole, file = only(runs), event_file(runs)
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 255
    file.write_bytes(content)
    run = only(runs)
    assert [text for _, text in run.events if file.name in text and "damaged at byte" in text]
    assert sum(map(len, run.curves.values())) < sum(map(len, whole.curves.values()))
    assert "damaged at byte" in page(runs)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", ["", "[", "7", '[{"time": "soon"}]', "\x00"])
def test_other_damaged_files_are_told(runs: Path, name: str, content: str):
    folder = only(runs).folder
    (folder / name).write_text(content)
    told = [text for _, text in only(runs).events if text.startswith(name)]
    assert told and "\n" not in told[0] and name in page(runs)
    assert only(runs).curves["loss"]


def test_a_run_that_is_being_written_is_read_on_from_where_it_was(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """Cut anywhere, an event file has what stands before the cut, and no fault; later, only the rest of it is read."""
    whole, file = only(runs).curves, event_file(runs)
    content = file.read_bytes()
    known: dict[Path, run_page.Run] = {}
    for end in range(0, len(content), len(content) // 40):
        file.write_bytes(content[:end])
        known = read_runs(runs, known)
        assert not [text for run in known.values() for _, text in run.events if "cannot be read" in text]
    file.write_bytes(content)
    (run,) = read_runs(runs, known).values()
    assert run is next(iter(known.values())) and run.curves == whole
    monkeypatch.setattr(run_page.Event, "FromString", None)  # nothing is left to parse
    run.read()
    assert not [text for _, text in run.events if "cannot be read" in text]


def test_a_run_may_be_the_folder_itself_and_hidden_folders_are_none(runs: Path):
    folder = only(runs).folder
    assert only(folder).name == folder.name and 'data-url="validation/step-"' in page(folder)
    shutil.copytree(folder, runs / ".microcinema-dry-run")
    assert only(runs).folder == folder


def test_an_empty_folder_says_so(tmp_path: Path):
    assert read_runs(tmp_path, {}) == {} and "No run has started here" in page(tmp_path)


def test_curves_are_short_and_without_what_is_not_finite(runs: Path):
    run = only(runs)
    run.curves = {"loss": {step: (float("nan") if step % 2 else step, 0.0) for step in range(10_000)}}
    run.curves["none"] = {0: (float("inf"), 0.0)}
    loss, none = (run_page._plot(tag, [run]) for tag in ("loss", "none"))
    ((number, last, points),) = loss["lines"]
    assert (number, last, len(points.split())) == (0, "9998", 200) and none["lines"] == []
    assert "nan" not in points
