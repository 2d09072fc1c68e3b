"""The command `sweep`: from a grid to a table, resumed where it stopped, whatever the number of workers; a failure stays alone."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fixtures import tiny
from microcinema.commands import cli, sweep
from microcinema.config.compose import compose
from microcinema.training.heldout_loss import RECORD
from microcinema.training.preemption import EXIT_STATUS
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all trainings are told: tiny networks, two clips of Moving Sprites, two others held out."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny.base_folder(folder / "base")
    for split in ("train", "heldout"):
        own = ["num_videos=2", "num_frames=4", "size=32", f"output_dir={folder / split}"]
        assert cli.main(["prepare", "sprites", f"split={split}", *own]) == 0
    steps = [
        "max_train_steps=5",
        "checkpointing_steps=1",
        "validation_steps=5",
        "validation_clips=1",
        "lr_warmup_steps=0",
    ]
    return [
        f"base.pretrained_model_name_or_path={base}",
        f"data.root={folder / 'train'}",
        f"validation_data={{root: {folder / 'heldout'}, metadata: {folder / 'heldout/clips.csv'}}}",
        *("model=plain", "diffusion=none", "num_frames=4", "resolution=32", "train_batch_size=1", "report_to=null"),
        *(*steps, "dataloader_num_workers=0", "learning_rate=1e-2"),
    ]


def listed(overrides: Sequence[str]) -> str:
    return "[" + ", ".join(json.dumps(text) for text in overrides) + "]"


class Recorder:
    """A `Runner` that runs nothing, and is preempted once. It leaves what the commands do; one that is told `fails` among its arguments fails."""

    def __init__(self, fails: str = "nothing") -> None:
        self.fails, self.calls = fails, []

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        self.calls.append(arguments)
        log.write_text("starts\nerror: no such thing\nsrun: task 0: Exited with exit code 3\n")
        if len(self.calls) == 1:
            return EXIT_STATUS
        told = dict(text.split("=", 1) for text in arguments[3:])
        value, folder = int(told["seed"]) + 10.0 * float(told.get("learning_rate", 0)), Path(told["output_dir"])
        if arguments[2] == "train":
            (folder / "validation").mkdir(exist_ok=True)
            (folder / RECORD).write_text(
                json.dumps([{"step": 1, "loss": 9}, {"step": 2, "loss": value, "loss/t=9": 0.5}])
            )
        else:
            leave_results(folder, value)
        return 3 if self.fails in arguments else 0


def leave_results(folder: Path, value: float) -> None:
    """Those of an evaluation of two parts, as Moving Sprites has."""
    clips = [{"part": part, "name": part, "prompt": "", "measures": {"psnr": value + i}} for i, part in enumerate("ab")]
    measures = [
        {"key": "psnr", "label": "PSNR", "meaning": "of clips", "unit": "dB", "better": "higher", "digits": 1},
        {"key": "frechet", "label": "Fréchet", "meaning": "of clips", "unit": "", "better": "lower", "digits": 2},
    ]
    content = {"measures": measures, "clips": clips, "sets": {"a": {"frechet": {"value": 2 * value}}}}
    (folder / "results.json").write_text(json.dumps({**content, "model": {"pipeline": "p"}}))


HELD_OUT = "validation_data={metadata: heldout.csv}"


def run(out: Path, runner: Any, *overrides: str) -> int:
    config = compose("sweep", [f"output_dir={out}", f"train=[{json.dumps(HELD_OUT)}]", *overrides])
    return sweep.run_all(config, sweep.plan(config), runner)


def test_a_grid_becomes_a_table_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture):
    grid = "grid={learning_rate: [0.5, 1], model: [plain, microcinema], max_train_steps: [2]}"
    runner, names = Recorder(), [f"learning_rate={x},model={m}" for x in ("0.5", "1") for m in ("plain", "microcinema")]
    assert run(tmp_path, runner, grid, "workers=1") == 0
    assert runner.calls[0] == runner.calls[1] and len(runner.calls) == 1 + 4 * 3  # the first was preempted
    assert runner.calls[0][:3] == ["-m", "microcinema", "train"]
    assert {f"tracker.group={tmp_path.name}", HELD_OUT, "max_train_steps=2", "seed=0"} < {*runner.calls[0]}
    assert [call[-3] for call in runner.calls[1:]] == [f"seed={seed}" for seed in (0, 1, 2) for _ in names]
    assert f"12/12  {names[-1]}, seed 2: done" in capsys.readouterr().out

    summary = json.loads((tmp_path / "sweep.json").read_text())["variants"]
    assert list(summary) == names
    loss = summary[names[0]]["loss"]
    half = stats.t.ppf(0.975, 2) / np.sqrt(3)  # of 5, 6, 7, whose deviation is 1
    assert (loss["value"], loss["n"], loss["difference"]) == (6, 3, None) and loss["values"] == {"0": 5, "1": 6, "2": 7}
    assert loss["high"] - 6 == pytest.approx(half) == 6 - loss["low"]
    paired = summary[names[2]]["loss"]["difference"]
    assert (paired["value"], paired["low"], paired["high"]) == (5, 5, 5)  # seeds differ, differences do not
    page = (tmp_path / "sweep.md").read_text()
    assert f"| {names[2]} | 3 | 11.0000 ± {half:.4f} (+5.0000 ± 0.0000) |" in page
    latex = (tmp_path / "sweep.tex").read_text()
    assert rf"learning\_rate=1,model=plain & 3 & 11.0000 $\pm$ {half:.4f} (+5.0000 $\pm$ 0.0000)" in latex
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = {(row["variant"], row["measure"]): row for row in csv.DictReader(file)}
    row = rows[names[2], "loss"]
    assert float(row["high"]) == summary[names[2]]["loss"]["high"] and row["difference_value"] == "5.0"
    assert rows[names[0], "loss"]["difference_value"] == ""


def test_what_is_done_is_not_done_again_and_a_failure_stays_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    more = ["evaluate=[evaluation=sprites]", "variants={full: [], fast: [learning_rate=1]}", "seeds=[1, 2]"]
    assert run(tmp_path, Recorder("learning_rate=1"), *more[1:]) == 1
    shown = capsys.readouterr().out
    log = tmp_path / "fast/seed-1/log.txt"
    assert f"fast, seed 1: failed: exit status 3, 'error: no such thing'; see {log}\n" in shown
    assert "| full | 2 | 1.5000" in shown and "| fast | 0 | missing |" in shown
    runner = Recorder()
    assert run(tmp_path, runner, *more[1:]) == 0
    assert ["learning_rate=1" in call for call in runner.calls] == [True] * 3  # one was preempted
    before = (tmp_path / "sweep.json").read_bytes()
    runner = Recorder()
    assert run(tmp_path, runner, *more[1:]) == 0 and not runner.calls
    assert (tmp_path / "sweep.json").read_bytes() == before

    # An evaluation, a seed and a variant come to what there is.
    assert run(tmp_path, runner, *more) == 0
    assert [call[2] for call in runner.calls] == ["evaluate"] * (4 + 1)
    assert runner.calls[0][-3:-1] == [f"pipeline={tmp_path / 'full/seed-1/train'}", "seed=1"]
    summary = json.loads((tmp_path / "sweep.json").read_text())["variants"]["full"]
    assert {key: cell["value"] for key, cell in summary.items()} == {
        **{"loss": 1.5, "loss/t=9": 0.5, "psnr": 2.0, "a/frechet": 3.0}
    }
    assert "| Held-out loss ↓ | PSNR (dB) ↑ | Fréchet, a ↓ |" in (tmp_path / "sweep.md").read_text()
    runner = Recorder()
    assert run(tmp_path, runner, *more[:2], "seeds=[1, 2, 3]", "measures=[psnr, loss/t=9]") == 0
    assert len(runner.calls) == 4 + 1 and "| seeds | PSNR (dB) ↑ | loss/t=9 |" in (tmp_path / "sweep.md").read_text()


def test_evaluations_alone_and_of_loras(tmp_path: Path):
    runner = Recorder()
    table = "variants={ours: [pipeline=runs/ours], theirs: [generated_dir=docs]}"
    assert run(tmp_path / "a", runner, "train=null", "evaluate=[evaluation=ucf101]", table, "seeds=[0]") == 0
    told = [call[3:-2] for call in runner.calls[1:]]
    assert told == [["evaluation=ucf101", "pipeline=runs/ours"], ["evaluation=ucf101", "generated_dir=docs"]]
    lora = [
        "lora=motion",
        "init_weights_from=sprites-microcinema",
        "trainable_parameters=temporal",
        "trainable_unet_layers=[]",
    ]
    runner = Recorder()
    assert run(tmp_path / "b", runner, f"train={listed(lora)}", "evaluate=[]", "seeds=[0]") == 0
    trained = tmp_path / "b/default/seed-0/train"
    assert runner.calls[-1][3:5] == ["pipeline=sprites-microcinema", f"lora=[{trained}]"]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["variants={full: [], bad: [learning_rat=1]}"], "bad: unknown key 'learning_rat'"),
        (["grid={model.temporal.text: [true, sometimes]}"], "model.temporal.text=sometimes: model.temporal.text is"),
        (["grid={seed: [1, 2]}"], "seed=1: the sweep sets seed of train itself"),
        (["train=[]"], "default: nothing is measured"),
        (["train=null"], "train and evaluate are null"),
        (["variants={a b: [], a/b: []}"], "two variants are called 'a_b'"),
        (["evaluate=[evaluation=sprites, pipeline=sprites-microcinema]"], "the sweep sets pipeline of evaluate itself"),
        (["evaluate=[generated_dir=/nowhere]"], "generated_dir '/nowhere' is not there"),
        (["grid={learning_rate: []}"], "grid"),
        (["seeds=[]"], "seeds"),
        (["workers=0"], "workers is 0"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_starts(
    overrides: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    assert cli.main(["sweep", f"output_dir={out}", f"train=[{json.dumps(HELD_OUT)}]", *overrides]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and said in told, told
    assert not out.exists()


def test_other_settings_do_not_come_into_the_same_folder(tmp_path: Path):
    assert run(tmp_path, Recorder(), "seeds=[0]") == 0
    runner = Recorder()
    with pytest.raises(UserError, match=r"holds other results \(max_train_steps was 10000 and is 5\)"):
        run(tmp_path, runner, "seeds=[0]", "grid={max_train_steps: [5]}")
    assert not runner.calls
    with pytest.raises(UserError, match="measures: no run has 'fvd'; they have loss"):
        run(tmp_path, runner, "seeds=[0]", "measures=[fvd]")


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 500
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_real_runs_killed_and_resumed_by_one_worker_and_by_two(train: list[str], tmp_path: Path):
    """Two of four variants fail: at this learning rate the second step has no finite loss."""
    grid = "{learning_rate: [1e-2, 1e15], model.temporal.text: [true, false]}"

    def start(out: Path, workers: int) -> "subprocess.Popen[str]":
        own = [f"train={listed(train)}", f"grid={grid}", "seeds=[5]", f"output_dir={out}", f"workers={workers}"]
        command = [sys.executable, "-m", "microcinema", "sweep", *own]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)

    one, two = tmp_path / "one", tmp_path / "two"
    killed = start(one, 1)
    second = one / "learning_rate=1e-2,model.temporal.text=false/seed-5/train"
    wait_for(lambda: (second / "checkpoint-1").is_dir(), killed)
    killed.send_signal(signal.SIGTERM)
    said = killed.communicate(timeout=120)[0]
    assert killed.returncode == 130, said
    assert (
        not second.with_name("train.json").exists()
        and not (one / "learning_rate=1e15,model.temporal.text=true/seed-5/log.txt").exists()
    )
    tables = []
    for out, workers in ((one, 1), (two, 2)):
        process = start(out, workers)
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 1, said
        assert said.count("failed: exit status 2") == 2 and said.count(": done") == 2, said
        tables.append([(out / f"sweep.{suffix}").read_bytes() for suffix in ("json", "md", "tex", "csv")])
    assert tables[0] == tables[1]
    assert (second.parent / "log.txt").read_text().count("preempted; saved step") == 1
