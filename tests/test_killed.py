"""Runs of real processes that are killed, asked to end, or cut into parts, and come to the same end."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import tiny_lives
import tiny_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_lives import Life

from microcinema.checksums import find_fault
from microcinema.data.sprites_dataset import write_dataset
from microcinema.training.checkpoint_folders import find_checkpoints, read_progress
from microcinema.training.preemption import EXIT_STATUS

KILLS = 10
STEPS = 12
EVERY = 2  # steps between checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Eight clips of Moving Sprites: real files, and the same in four shards."""
    tiny_lives.serve()
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "clips", num_clips=8, seed=0)
    shards = tiny_lives.write_shards(folder / "clips", folder / "shards", 4)
    return {"clips": str(folder / "clips"), "shards": shards}


def history(run: Path) -> dict[int, set[float]]:
    """Every loss that was ever logged of a step: of one that was done twice, both."""
    losses: dict[int, set[float]] = {}
    for file in sorted((run / "logs/microcinema").glob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for event in events.Scalars("loss") if "loss" in events.Tags()["scalars"] else []:
            losses.setdefault(event.step, set()).add(event.value)
    return losses


def saving(run: Path) -> bool:
    return any(run.glob(".checkpoint-*.partial"))


SETTINGS = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "checkpoints_total_limit": 2}


@pytest.fixture(scope="module", params=[(1, "clips"), (2, "shards")], ids=["one-clips", "two-shards"])
def whole(request, data, tmp_path_factory):
    """A run that nothing happens to: its folder, number of processes, clips and settings."""
    processes, kind = request.param
    settings = {**SETTINGS, "train_batch_size": 2 // processes}
    run = tmp_path_factory.mktemp("whole") / "run"
    life = Life(run, data[kind], processes, **settings)
    assert life.end() == [0] * processes, life.said()
    return run, processes, data[kind], settings


def test_killed_ten_times_ends_in_the_same_bits(tmp_path, whole):
    """SIGKILL at random moments, half of them in a save."""
    whole, processes, clips, settings = whole
    chance, in_a_save, run = random.Random(processes), 0, tmp_path / "run"
    for number in range(KILLS):
        life = Life(run, clips, processes, **settings)
        if number % 2:
            reached = life.wait_until(lambda: saving(run))
            time.sleep(chance.uniform(0, 0.02))
        else:
            reached = life.wait_until_read(chance.randint(1, 2 * EVERY))  # in one of its first steps
            time.sleep(chance.uniform(0, 0.1))
        assert reached, life.said()
        in_a_save += saving(run)
        life.kill(chance.sample(range(processes), processes), chance.uniform(0, 0.05))
        assert not (run / "model_index.json").exists()
    assert in_a_save >= 2
    life = Life(run, clips, processes, **settings)
    assert life.end() == [0] * processes, life.said()
    check_equal(whole, run)
    losses = history(whole)
    assert sorted(losses) == list(range(1, STEPS + 1)) and all(len(values) == 1 for values in losses.values())
    assert history(run) == losses
    assert not list(run.glob(".*"))


def check_equal(one: Path, other: Path) -> None:
    """Weights, averages, optimiser, schedule, random states and place in the data: every file of the checkpoints, and the pipeline."""
    names = [f"checkpoint-{STEPS - EVERY}", f"checkpoint-{STEPS}"]
    for run in (one, other):
        assert [path.name for path in find_checkpoints(run)] == names
    for name in names:
        assert (one / name / "SHA256SUMS").read_bytes() == (other / name / "SHA256SUMS").read_bytes()
    a, b = (tiny_training.weights(run / "unet") for run in (one, other))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_asked_to_end_a_run_saves_and_says_so(tmp_path, whole, number):
    """The signal comes to one process of two, or to one and its worker; both end at the same step, which is no multiple of others."""
    whole, processes, clips, settings = whole
    if (processes == 2) != (number == signal.SIGUSR1):
        pytest.skip("the other signal's")
    run, rare = tmp_path / "run", {**settings, "checkpointing_steps": 100}
    life = Life(run, clips, processes, **rare, dataloader_num_workers=2 - processes)
    assert life.wait_until_read(1), life.said()
    last = psutil.Process(life.processes[-1].pid)
    for process in [*last.children(recursive=True), last]:
        process.send_signal(number)
    assert life.end() == [EXIT_STATUS] * processes, life.said()
    (checkpoint,) = find_checkpoints(run)
    assert find_fault(checkpoint) is None and 0 < read_progress(checkpoint).step < STEPS
    assert not (run / "model_index.json").exists()
    if processes == 2:
        life = Life(run, clips, processes, **settings)
        assert life.end() == [0] * processes, life.said()
        check_equal(whole, run)
