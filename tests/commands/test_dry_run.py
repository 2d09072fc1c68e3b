"""A dry run does everything that a run does, says what it will take, and leaves nothing."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures import tiny, tiny_training
from microcinema.commands import cli, dry_run
from microcinema.profiling.memory_estimate import Estimate
from microcinema.sprites.dataset import write_dataset

ROOT = Path(__file__).parents[2]


def arguments(folder: Path) -> list[str]:
    write_dataset(folder / "clips", num_videos=3, seed=0)
    tiny.base_folder(folder / "base")
    return [
        f"base.pretrained_model_name_or_path={folder / 'base'}",
        f"data.root={folder / 'clips'}",
        f"output_dir={folder / 'runs' / 'one'}",
        f"resolution={tiny.SIZE}",
        "num_frames=4",
        "train_batch_size=1",
        "max_train_steps=1000",
        "checkpointing_steps=300",
        "dataloader_num_workers=0",
        "validation_prompts=[a red star, a blue circle, a green moon]",
    ]


def test_it_says_what_the_run_takes_and_leaves_nothing(tmp_path, capsys):
    tiny_training.reset_accelerator()
    given = arguments(tmp_path)
    assert cli.main(["train", "--dry-run", *given]) == 0
    check(capsys.readouterr().out)  # how much this process grew says nothing: earlier tests may have left it the memory
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes(tmp_path):
    given = arguments(tmp_path)
    (tmp_path / "runs/one/checkpoint-1").mkdir(parents=True)  # of a run that will go on
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(ROOT / "scripts/train.py"), "--dry-run", *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert check(done.stdout) > 0
    assert "for 2 clips" in done.stdout
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["checkpoint-1"]


def check(shown: str) -> float:
    """What stands in every line; returns the GiB measured."""
    lines = [line.split()[0] for line in shown.splitlines()]
    assert lines == ["step", "memory", "checkpoint", "validation", "time", "disk"]
    assert re.search(r"^time .* for 1000 steps: .* of training, .* of checkpoints, .* of validation$", shown, re.M)
    measured, estimated = map(float, re.search(r"([\d.]+) GiB measured, ([\d.]+) GiB estimated", shown).groups())
    assert estimated > 0 and measured < 4
    return measured


FOUND = dry_run.Measured(
    steps=[{"clips_per_second": rate, "data_wait": 0.1, "mfu": 0.3, "broken_clips": 0.0} for rate in (1, 1, 4, 5, 3, 4, 9)],
    checkpoint_seconds=7.0,
    validation_seconds=5.0,
    checkpoint_bytes=1000,
    pipeline_bytes=300,
)  # fmt: skip
SETTINGS = tiny_training.make_config(
    ".",
    max_train_steps=100,
    train_batch_size=2,
    gradient_accumulation_steps=3,
    checkpointing_steps=30,
    checkpoints_total_limit=2,
    validation_steps=50,
    validation_prompts=["a", "b", "c"],
)


def test_the_prediction_is_arithmetic():
    found = dry_run.predict(SETTINGS, 2, FOUND)
    assert found.steps == 100 * (2 * 3 * 2) / 4  # the median without the warm-up
    assert found.checkpoints == 4 * 7  # after 30, 60, 90 and 100 steps
    assert found.validations == 2 * 2 * 5  # two validations, three prompts on two processes
    assert found.disk == 3 * 1000 + 300  # two stay while a third is written
    assert found.seconds == 300 + 28 + 20
    assert dry_run.predict(replace(SETTINGS, checkpoints_total_limit=None), 2, FOUND).disk == 4 * 1000 + 300
    assert (
        dry_run.predict(replace(SETTINGS, validation_prompts=[]), 2, FOUND).validations == 2 * 5
    )  # held-out clips alone


def test_what_is_wrong_is_said():
    found = replace(FOUND, steps=[{**step, "broken_clips": 2.0} for step in FOUND.steps], checkpoint_bytes=10**18)
    prediction = dry_run.predict(SETTINGS, 1, found)
    shown = "\n".join(dry_run.describe(SETTINGS, 1, found, prediction, Estimate(1, {"training": 2**30})))
    assert "2 clips could not be read" in shown
    assert "set output_dir to a larger disk" in shown


@pytest.mark.parametrize("seconds, said", [(1.5, "1.5 s"), (150, "2.5 min"), (9000, "2.5 h"), (172800, "2.0 days")])
def test_durations(seconds, said):
    assert dry_run._duration(seconds) == said


def test_only_training_has_a_dry_run(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sample", "--dry-run"])
    assert exit_.value.code == 2
    assert "--dry-run is for train" in capsys.readouterr().err


def test_a_dry_run_that_fails_leaves_nothing(tmp_path, capsys):
    tiny_training.reset_accelerator()
    given = arguments(tmp_path)
    assert cli.main(["train", "--dry-run", *given, "learning_rate=1e15", "lr_warmup_steps=0"]) == 2
    assert "the loss is nan at step" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
