"""Broken clips: named, replaced by what the seed decides, counted; decoders that hang or crash are ended."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from fixtures import broken_videos, tiny, tiny_training
from fixtures.tiny_training import logged, pipeline, train, weights
from microcinema.data import decoder_process, video_reader
from microcinema.data.clips import ClipDataset
from microcinema.data.decoder_process import DecoderProcess
from microcinema.data.indexed import IndexedDataset
from microcinema.data.ordering import ShuffledOrder
from microcinema.data.quarantine import MAX_REPLACEMENTS, ErrorRate, Quarantine, forget_records, read_quarantine
from microcinema.data.source import ClipSource
from microcinema.training.build import first_fps
from microcinema.utils.errors import MachineError, UserError

BROKEN = {kind: reason for kind, (_, reason) in broken_videos.KINDS.items() if reason}


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Path:
    """40 sound videos and one of each of the ten kinds: a fifth is not as it should be."""
    return broken_videos.dataset(tmp_path_factory.mktemp("broken"), num_sound=40)


def clips(listing: Path, num_frames: int = tiny_training.FRAMES, **arguments) -> ClipDataset:
    return ClipDataset(listing, listing.parent, num_frames, 8.0, tiny.SIZE, **{"timeout": 60, **arguments})


def kind(name: str) -> str:
    return name.partition("-")[0]


# Training


def test_a_data_set_with_a_fifth_of_broken_files_trains_to_the_end(tmp_path, listing):
    """Each broken file is named with its reason, each sound one is used: two workers, more than one pass."""

    class Watched(ClipDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            (tmp_path / "used" / item["id"]).touch()
            return item

    (tmp_path / "used").mkdir()
    data = Watched(listing, listing.parent, tiny_training.FRAMES, 8.0, tiny.SIZE, timeout=60)
    settings = {"max_train_steps": 13, "train_batch_size": 4, "dataloader_num_workers": 2, "clip_retries": 0}
    run = train(pipeline(tmp_path), data, tmp_path / "run", max_error_rate=0.5, **settings)
    assert len(logged(run)) == 13

    records = read_quarantine(run / "quarantine")
    assert {kind(record["id"]) for record in records} == set(BROKEN)
    for record in records:
        assert BROKEN[kind(record["id"])] in record["reason"] and record["id"] in record["reason"]
        assert data.id(record["index"]) == record["id"]
    used = {path.name for path in (tmp_path / "used").iterdir()}
    assert used == {row["id"] for row in data.rows if kind(row["id"]) not in BROKEN}
    assert logged(run, "broken_clips")[13] >= len(records) >= len(BROKEN)


def test_too_many_broken_clips_stop_the_run(tmp_path, listing, capsys):
    settings = {"max_train_steps": 50, "train_batch_size": 10, "clip_retries": 0, "max_error_rate": 0.006}
    with pytest.raises(
        UserError, match=r"7 of the last \d\d clips are broken, more than max_error_rate=0.006 allows of 1000"
    ):
        train(pipeline(tmp_path), clips(listing), tmp_path / "run", **settings)
    said = capsys.readouterr().err
    assert f"5 broken clips so far; '{tmp_path / 'run' / 'quarantine'}' names them" in said  # the console does, too


def test_a_resumed_run_meets_the_same_replacements(tmp_path, listing):
    """Bit for bit, though a clip that was broken before the interruption can be read after it."""
    data = clips(listing)
    first = next(
        n for n in range(20) if data.id(ShuffledOrder(len(data), [0]).epoch_and_index(n)[1]).startswith("sound")
    )
    flaky = ShuffledOrder(len(data), [0]).epoch_and_index(first)[1]

    class Flaky(ClipDataset):
        fails = True

        def __getitem__(self, index):
            if self.fails and index == flaky:
                raise UserError("the file server is busy")
            return super().__getitem__(index)

    settings = {"checkpointing_steps": 2, "clip_retries": 0, "max_error_rate": 0.9, "train_batch_size": 5}
    settings |= {"checkpoints_total_limit": None}
    arguments = (listing, listing.parent, tiny_training.FRAMES, 8.0, tiny.SIZE)
    train(pipeline(tmp_path), Flaky(*arguments), tmp_path / "run", max_train_steps=6, **settings)
    whole, losses = weights(tmp_path / "run" / "checkpoint-6"), logged(tmp_path / "run")
    assert first in {record["sample_index"] for record in read_quarantine(tmp_path / "run" / "quarantine")}
    before = (tmp_path / "run" / "quarantine" / "rank-00000.jsonl").read_bytes()

    for name in ("checkpoint-4", "checkpoint-6"):
        for path in sorted((tmp_path / "run" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (tmp_path / "run" / name).rmdir()
    mended = Flaky(*arguments)
    mended.fails = False
    train(
        pipeline(tmp_path, seed=3),
        mended,
        tmp_path / "run",
        max_train_steps=6,
        resume_from_checkpoint="latest",
        **settings,
    )
    again = weights(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert logged(tmp_path / "run") == losses
    assert (tmp_path / "run" / "quarantine" / "rank-00000.jsonl").read_bytes() == before
    # What an earlier run wrote down is nothing to a new one.
    os.renames(tmp_path / "run" / "quarantine", tmp_path / "new" / "quarantine")
    train(
        pipeline(tmp_path), mended, tmp_path / "new", max_train_steps=1, **{**settings, "train_batch_size": first + 1}
    )
    assert not any(record["sample_index"] == first for record in read_quarantine(tmp_path / "new" / "quarantine"))


# The quarantine


class Items(ClipSource):
    """Items whose numbers are in `broken` cannot be read."""

    def __init__(self, broken: set[int], length: int = 10) -> None:
        self.broken, self.length, self.tries = broken, length, 0

    def __len__(self) -> int:
        return self.length

    def id(self, index: int) -> str:
        return f"item {index}"

    def __getitem__(self, index: int) -> dict:
        self.tries += 1
        if index in self.broken:
            raise UserError(f"item {index} is broken")
        return {"index": index}


def test_what_takes_the_place_is_decided_by_seed_and_number(tmp_path):
    one = IndexedDataset(Items({1, 2, 3}), 0, Quarantine(tmp_path / "a", retries=0))
    items = [one[number] for number in range(40)]
    other = IndexedDataset(Items({1, 2, 3}), 0, Quarantine(tmp_path / "b", retries=0))
    assert [other[number] for number in reversed(range(40))] == items[::-1]
    records = read_quarantine(tmp_path / "a")
    assert sum(item["broken"] for item in items) >= len(records) > 12  # the same replacement may be drawn twice
    assert {record["index"] for record in records} == {1, 2, 3}
    plain = IndexedDataset(Items(set()), 0, Quarantine(tmp_path / "c"))
    for item, sound in zip(items, (plain[number] for number in range(40)), strict=True):
        assert (item == sound) if item["broken"] == 0 else (sound["index"] in {1, 2, 3} != {item["index"]})
    assert not (tmp_path / "c").exists()


def test_tries_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("microcinema.data.quarantine._FIRST_PAUSE", 0)
    items = Items({0}, length=1)
    with pytest.raises(UserError, match=f"clip 0 and {MAX_REPLACEMENTS} replacements are broken .last: item 0"):
        IndexedDataset(items, 0, Quarantine(tmp_path, retries=2))[0]
    assert items.tries == 3  # its replacements are itself
    assert [record["tries"] for record in read_quarantine(tmp_path)] == [3]

    class Once(Items):
        def __getitem__(self, index):
            self.broken = set() if self.tries else {0}
            return super().__getitem__(index)

    assert IndexedDataset(Once({0}, 1), 0, Quarantine(tmp_path / "b", retries=1))[0]["broken"] == 0
    assert not (tmp_path / "b").exists()


def append(folder: Path, rank: int, first: int = 0) -> None:
    quarantine = Quarantine(folder, retries=0, rank=rank)
    for number in range(first, first + 200):
        quarantine.read(Items({0}, 2), number, 0, lambda attempt: 1)


def test_writers_do_not_get_into_each_others_way(tmp_path):
    """Two workers of each of two processes at once."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=append, args=(tmp_path, k % 2, 200 * k)) for k in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_quarantine(tmp_path)) == 800
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_cut_off_by_a_kill_is_taken_off_and_another_is_named(tmp_path):
    append(tmp_path, 0)
    path = tmp_path / "rank-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"sample_index": 17, "ind')
    Quarantine(tmp_path)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"nonsense\n")
    with pytest.raises(UserError, match=r"line 201 of '.*rank-00000.jsonl' is no record"):
        Quarantine(tmp_path)


def test_the_error_rate_forgets():
    def batches(counts):
        return iter([{"broken": torch.tensor([count])} for count in counts])

    rate = ErrorRate(0.2, window=100)
    assert len(list(rate.watch(batches([0] * 200 + [1] * 20 + [0] * 100 + [1] * 20)))) == 340
    assert rate.total == 40
    message = "21 of the last 100 clips are broken, more than max_error_rate=0.2 allows of 100"
    with pytest.raises(UserError, match=message):
        list(rate.watch(batches([1] * 20)))


@pytest.mark.parametrize(
    ("max_error_rate", "window", "allowed"),
    [(0.05, 1000, 50), (0.05, 60, 4), (0.05, 5, 4), (0, 1000, 0), (1, 1000, 1000)],
)
def test_the_limit_holds_from_the_first_clip_on(max_error_rate, window, allowed):
    """The documented one, of the window, whatever has been read; a few broken clips stop no run that admits any."""
    rate = ErrorRate(max_error_rate, window=window)
    for _ in range(allowed):
        rate.count(1, 0)
    if max_error_rate < 1:
        with pytest.raises(UserError, match=f"{allowed + 1} of the last"):
            rate.count(1, 0)


def test_the_console_tells_of_broken_clips_at_every_doubling(tmp_path, capsys):
    rate = ErrorRate(1, tmp_path)
    for _ in range(50):
        rate.count(1, 3)
    assert [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()] == [5, 11, 23, 47]


# Faults of the machine


def test_a_fault_of_the_machine_is_no_clips_fault(tmp_path, listing, monkeypatch):
    """A disk that is gone, bytes that it does not give, a package that is missing: the run ends, and no clip is recorded."""
    quarantine = Quarantine(tmp_path / "quarantine", retries=0)

    def fails(data: ClipDataset, message: str) -> None:
        with pytest.raises(MachineError, match=message):
            quarantine.try_read(data, 0, 0)
        assert not (tmp_path / "quarantine").exists()

    root = tmp_path / "mounted"
    root.mkdir()
    (root / "sound0.mp4").symlink_to(listing.parent / "sound0.mp4")
    data = ClipDataset(listing, root, tiny_training.FRAMES, 8.0, tiny.SIZE)
    (root / "sound0.mp4").unlink()
    fails(data, "root '.*mounted' is gone or empty; mount its disk, and run the command again")
    root.rmdir()
    fails(data, "root '.*mounted' is gone or empty")
    monkeypatch.setitem(sys.modules, "decord", None)
    fails(
        clips(listing, decoder="decord", timeout=None),
        "sound0.mp4' cannot be read, through no fault of its own .*decord",
    )

    def dying(*_):
        raise OSError(errno.EIO, "Input/output error")

    # A decoder says of such bytes that they are damaged.
    data = clips(listing, timeout=None, num_frames=1000)
    monkeypatch.setattr(Path, "read_bytes", dying)
    fails(data, "sound0.mp4' cannot be read, through no fault of its own .*Input/output error.*; mend the disk")


def test_an_error_of_the_disk_ends_a_worker_and_is_not_recorded(tmp_path):
    class Unplugged(Items):
        def __getitem__(self, index):
            raise OSError(errno.EIO, "Input/output error", "/data/clip.mp4")

    data = IndexedDataset(Unplugged(set()), 0, Quarantine(tmp_path / "quarantine"))
    with pytest.raises(OSError, match=r"Input/output error: '/data/clip.mp4'"):
        list(DataLoader(data, sampler=range(3), num_workers=1))
    assert not (tmp_path / "quarantine").exists()


def test_records_are_forgotten_across_processes(tmp_path):
    append(tmp_path, 0)
    append(tmp_path, 1, first=200)
    forget_records(tmp_path, lambda number: number % 2 == 0)
    assert [record["sample_index"] for record in read_quarantine(tmp_path)] == list(range(1, 400, 2))


def test_a_run_takes_its_frame_rate_from_a_clip_that_can_be_read():
    class Clips(Items):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "fps": 12.5}

    assert first_fps(Clips({0, 1, 2})) == 12.5
    with pytest.raises(UserError, match="item 0 is broken"):
        first_fps(Clips(set(range(10))))


# The decoder's own process


def test_the_same_frames_from_another_process(listing):
    reader = DecoderProcess(60)
    path = listing.parent / "rotated-0.mp4"
    np.testing.assert_array_equal(reader("read_clip", path, 4, 8.0), video_reader.read_clip(path, 4, 8.0))
    child = reader._child.pid
    with pytest.raises(UserError, match="is empty"):
        reader("read_clip", listing.parent / "empty-0.mp4", 4)
    assert reader("probe", path) == video_reader.probe(path)
    assert reader._child.pid == child  # an error is no reason for another process


def test_a_decoder_that_hangs_is_ended_and_the_next_clip_is_read(listing):
    reader, sound = DecoderProcess(1.0), listing.parent / "sound0.mp4"
    reader("probe", sound)  # the time to start is not counted
    child = psutil.Process(reader._child.pid)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"took more than 1 s to decode, and its decoder was killed"):
        reader("probe", broken_videos.Hanging())
    assert 1 <= time.monotonic() - began < 10
    assert not child.is_running()
    assert reader("read_clip", sound, 4).shape[0] == 4


def test_training_goes_on_after_a_decoder_that_hangs(tmp_path, listing):
    class Hanging(ClipDataset):
        def __getitem__(self, index):
            if index == 3:
                self.reader.decode("probe", broken_videos.Hanging())
            return super().__getitem__(index)

    data = Hanging(listing, listing.parent, 4, 8.0, 32, timeout=2.0)
    order = ShuffledOrder(len(data), [0])
    number = next(number for number in range(len(data)) if order.epoch_and_index(number)[1] == 3)
    numbered = IndexedDataset(data, 0, Quarantine(tmp_path, retries=0))
    items = list(DataLoader(numbered, batch_size=None, num_workers=1, sampler=[number, 0 if number else 1]))
    assert (items[0]["sample_index"], items[0]["broken"]) == (number, 1)
    (record,) = [record for record in read_quarantine(tmp_path) if record["index"] == 3]
    assert (record["id"], record["sample_index"]) == ("sound3", number) and "took more than 2 s" in record["reason"]


def test_a_decoder_that_crashes_is_told(listing):
    reader = DecoderProcess(60)
    reader("probe", listing.parent / "sound0.mp4")
    os.kill(reader._child.pid, signal.SIGSEGV)
    reader._child.wait()
    assert reader("probe", listing.parent / "sound0.mp4").num_frames == 16  # found dead, replaced
    reader._child.poll = lambda: None  # dies while it is asked
    os.kill(reader._child.pid, signal.SIGSEGV)
    with pytest.raises(UserError, match="sound0.mp4' crashed its decoder .signal SIGSEGV."):
        reader("probe", listing.parent / "sound0.mp4")


def test_workers_have_their_own_and_leave_none_behind(listing):
    data = clips(listing)
    data.reader.decode("probe", listing.parent / "sound0.mp4")
    mine = data.reader.decode._child.pid
    batches = list(DataLoader(data, batch_size=2, num_workers=2, sampler=range(8)))
    assert [len(batch["id"]) for batch in batches] == [2] * 4
    torch.testing.assert_close(batches[0]["video"][0], data[0]["video"])
    time.sleep(0.5)
    serving = [
        child.pid for child in psutil.Process().children(recursive=True) if "import serve" in " ".join(child.cmdline())
    ]
    assert serving.count(mine) == 1


def test_a_child_without_a_parent_ends_itself():
    """Also in the midst of a call that hangs: by the kernel's alarm."""
    code = (
        "import os, sys; from fixtures import broken_videos; from microcinema.data import decoder_process; decoder_process._GRACE = 0.5; reader = decoder_process.DecoderProcess(1.0);"
        "reader._start(); print(reader._child.pid, flush=True);"
        "reader._connection.send((1.0, 'probe', (broken_videos.Hanging(),), {})); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    child = psutil.Process(int(started.stdout))
    child.wait(timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_time_out_that_is_none(timeout):
    with pytest.raises(UserError, match=f"timeout={timeout}"):
        decoder_process.DecoderProcess(timeout)


def test_json_lines(tmp_path):
    append(tmp_path, 3)
    record = json.loads((tmp_path / "rank-00003.jsonl").read_text().splitlines()[0])
    assert record.keys() == {"sample_index", "index", "id", "reason", "tries", "time"}
