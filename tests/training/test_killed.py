"""Runs of real processes that are killed, asked to end, or cut into parts, and come to the same end."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures import killed_runs, tiny_training
from fixtures.killed_runs import Life
from microcinema.models.video_unet import VideoUNet
from microcinema.sprites.dataset import write_dataset
from microcinema.training.checkpoint import load_ema
from microcinema.training.loss import TrainableModel
from microcinema.training.preemption import EXIT_STATUS
from microcinema.training.resume import find_checkpoints, read_progress
from microcinema.utils.hashing import checksum_error

pytestmark = pytest.mark.slow
KILLS = 10
STEPS = 20
EVERY = 2  # steps between checkpoints
READ = [step for step in range(1, STEPS + 1) if step % EVERY == 0 or step % 3 == 0]  # steps at which metrics are read
CLIPS = 2  # in a step


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Eight clips of Moving Sprites: real files, and the same in four shards."""
    killed_runs.serve()
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "clips", num_videos=8, seed=0)
    shards = killed_runs.write_shards(folder / "clips", folder / "shards", 4)
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
    return any(run.glob(".checkpoint-*.microcinema-partial"))


SETTINGS = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "checkpoints_total_limit": 2, "logging_steps": 3}


@pytest.fixture(scope="module", params=[(1, "clips"), (2, "shards")], ids=["one-clips", "two-shards"])
def whole(request, data, tmp_path_factory):
    """A run that nothing happens to: its folder, number of processes, clips and settings."""
    processes, kind = request.param
    settings = {**SETTINGS, "train_batch_size": CLIPS // processes}
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
        if number % 2:  # past the first checkpoint of its life, in the next
            life.wait_until_read(CLIPS * EVERY + 1)
            reached = life.wait_until(lambda: saving(run))
            time.sleep(chance.uniform(0, 0.02))
        else:  # in one of its first steps
            reached = life.wait_until_read(chance.randint(1, 3 * CLIPS))
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
    assert sorted(losses) == READ and all(len(values) == 1 for values in losses.values())
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


def test_two_processes_have_the_losses_of_one(tmp_path, whole):
    whole, processes, clips, settings = whole
    if processes == 1:
        pytest.skip("the one that the other is compared with")
    life = Life(tmp_path / "one", clips, 1, **{**settings, "train_batch_size": CLIPS})
    assert life.end() == [0], life.said()
    two, one = history(whole), history(tmp_path / "one")
    assert sorted(one) == READ
    assert all(abs(max(one[step] | two[step]) - min(one[step] | two[step])) < 1e-5 for step in one)


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
    assert checksum_error(checkpoint) is None and 0 < read_progress(checkpoint).step < STEPS
    assert not (run / "model_index.json").exists()
    if processes == 2:
        life = Life(run, clips, processes, **settings)
        assert life.end() == [0] * processes, life.said()
        check_equal(whole, run)


def test_fsdp_trains_saves_and_resumes(tmp_path, whole):
    """By the file that is shipped: the losses of DDP, and after an interruption the same bits."""
    whole, processes, clips, settings = whole
    if processes == 1:
        pytest.skip("nothing to part")
    path = str(Path(__file__).parents[2] / "configs/accelerate/fsdp.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "scripts/train.py"])
    given = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    environment = {name: value for name, value in given.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    assert environment["FSDP_VERSION"] == "2"
    few = {**settings, "mixed_precision": "no", "max_train_steps": 4}
    for name, steps in (("sharded", (4,)), ("parts", (2, 4))):
        for step in steps:
            life = Life(tmp_path / name, clips, processes, environment, **{**few, "max_train_steps": step})
            assert life.end() == [0] * processes, life.said()
    ddp, sharded, parts = (history(run) for run in (whole, tmp_path / "sharded", tmp_path / "parts"))
    assert sharded == parts and sorted(sharded) == [2, 3, 4]
    for step, (loss,) in sharded.items():
        assert loss == pytest.approx(*ddp[step], abs=1e-5)
    one, other = (tiny_training.weights(tmp_path / name) for name in ("sharded", "parts"))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    # Networks and averages are whole in a checkpoint; of the optimiser every process has written its part.
    checkpoint = tmp_path / "parts/checkpoint-4"
    unet = VideoUNet.from_pretrained(checkpoint / "unet")
    load_ema(checkpoint, TrainableModel(unet))
    saved = tiny_training.weights(tmp_path / "parts/unet")
    found = unet.state_dict()
    assert all(value.equal(found[key.partition(":")[2]]) for key, value in saved.items())
    assert len(list(checkpoint.glob("optimizer_0/*.distcp"))) == processes
