"""The command `prepare latents`, as one, two and three real processes that may be killed; and training from what it writes."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from fixtures import broken_videos, tiny, tiny_training
from fixtures.launched_processes import Processes
from fixtures.tiny_training import encode_clips, logged, pipeline, train, weights
from microcinema.commands import cli
from microcinema.data.clips import ClipDataset
from microcinema.data.latents import QUARANTINE
from microcinema.data.quarantine import read_quarantine

SOUND = 17  # and ten kinds of broken ones
SHARDS = 9  # of three clips


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    server = Processes(tmp_path_factory.mktemp("said"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Path:
    return broken_videos.dataset(tmp_path_factory.mktemp("world"), num_sound=SOUND)


@pytest.fixture(scope="module")
def keys(tmp_path_factory, listing) -> list[str]:
    """Of the run, the same for both commands."""
    base = tiny.base_folder(tmp_path_factory.mktemp("base"))
    return [
        f"base.pretrained_model_name_or_path={base}",
        "data=webvid",
        f"data.metadata={listing}",
        f"data.root={listing.parent}",
        "data.timeout=null",
        f"resolution={tiny.SIZE}",
        f"num_frames={tiny_training.FRAMES}",
        "dataloader_num_workers=0",
        "clip_retries=0",
        "max_error_rate=1",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, processes, keys) -> Path:
    """What one process writes that is left alone."""
    folder = tmp_path_factory.mktemp("whole") / "latents"
    (ended,) = processes.run(["prepare", "latents", *keys, f"cached_latents={folder}", "clips_per_shard=3"])
    assert ended.status == 0 and f"20 clips in {SHARDS} shards" in ended.said, ended.said
    assert "7 broken clips are in quarantine" in ended.said
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def broken(folder: Path) -> set[tuple]:
    records = read_quarantine(folder / QUARANTINE)
    found = {(record["sample_index"], record["index"], record["id"], record["reason"]) for record in records}
    assert len(found) == len(records)  # each once
    return found


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path, processes, keys, whole):
    """With one, two or three processes in each life; a shard that is finished is not touched again."""
    folder, rng = tmp_path / "latents", random.Random(0)
    command = ["prepare", "latents", *keys, f"cached_latents={folder}", "clips_per_shard=3"]
    stamps: dict[str, int] = {}
    killed = 0
    for count in (2, 1, 3):
        there = len(list(folder.iterdir())) if folder.exists() else 0
        ended = processes.run(command, count, kill_after=there + rng.randint(2, 6), within=folder)  # the lock is one
        killed += all(each.status == -9 for each in ended)
        now = {file.name: file.stat().st_mtime_ns for file in folder.glob("[0-9]*.tar")}
        assert stamps.items() <= now.items()
        stamps = now
    assert killed >= 2 and stamps, (killed, ended)
    ended = processes.run(command, 2)
    assert [each.status for each in ended] == [0, 0], ended
    assert f"20 clips in {SHARDS} shards" in ended[0].said and "clips in" not in ended[1].said
    assert stamps.items() <= {file.name: file.stat().st_mtime_ns for file in folder.glob("[0-9]*.tar")}.items()
    assert files(folder) == files(whole)
    assert broken(folder) == broken(whole)


def test_two_processes_train_from_latents_as_one_does_from_clips(tmp_path, processes, keys, whole):
    """Same loss at every step, broken clips and what stands in for them included; captions are dropped half of the time."""
    run = [
        "max_train_steps=3",
        "logging_steps=1",
        "text_dropout=0.5",
        "learning_rate=1e-3",
        "lr_warmup_steps=0",
        "checkpointing_steps=3",
    ]
    for name, count, changes in (
        ("clips", 1, ["train_batch_size=4"]),
        ("latents", 2, ["train_batch_size=2", f"cached_latents={whole}"]),
    ):
        ended = processes.run(["train", *keys, *run, *changes, f"output_dir={tmp_path / name}"], count)
        assert not any(each.status for each in ended), ended
    raw, kept = (logged(tmp_path / name) for name in ("clips", "latents"))
    assert list(kept) == [1, 2, 3]
    assert list(kept.values()) == pytest.approx(list(raw.values()), rel=1e-3)
    names = [
        {(record["sample_index"], record["id"]) for record in read_quarantine(tmp_path / name / "quarantine")}
        for name in ("clips", "latents")
    ]
    assert names[0] == names[1] != set()


def test_two_processes_train_from_shards(tmp_path, processes, keys, listing):
    """As one process does: same losses, and the same clips in quarantine, each once."""
    with open(listing, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for row in rows[shard::3]:
                video = (listing.parent / f"{row['videoid']}.mp4").read_bytes()
                writer.write({"__key__": row["videoid"], "mp4": video, "txt": row["name"]})
    own = [key for key in keys if not key.startswith("data")]
    data = ["data=shards", f"data.shards={tmp_path}/{{0..2}}.tar", "data.timeout=null", "data.parallel_shards=2"]
    data += ["dataloader_num_workers=0", f"data.cache_dir={tmp_path / 'cache'}"]
    run = ["max_train_steps=3", "logging_steps=1", "lr_warmup_steps=0", "checkpointing_steps=3"]
    losses, quarantined = [], []
    for count in (1, 2):
        output = tmp_path / str(count)
        changes = [f"train_batch_size={4 // count}", f"output_dir={output}"]
        ended = processes.run(["train", *own, *data, *run, *changes], count)
        assert not any(each.status for each in ended), ended
        losses.append(list(logged(output).values()))
        quarantined.append(broken(output))
        assert len(list((output / "quarantine").glob("rank-*.jsonl"))) == count
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert quarantined[0] == quarantined[1] != set()
    few = [f"data.shards={tmp_path}/0.tar", f"output_dir={tmp_path / 'many'}"]
    ended = processes.run(["train", *own, *data, *run, *few], 2)
    errors = {line for each in ended for line in each.said.splitlines() if line.startswith("error:")}
    assert {each.status for each in ended} <= {2, -9}
    assert errors == {"error: 2 processes and 1 shards; use at most as many processes, or make smaller shards"}


def test_a_run_refuses_latents_of_another(tmp_path, processes, keys, whole):
    """In one line, before anything is trained."""
    run = ["train", *keys, f"cached_latents={whole}", f"output_dir={tmp_path / 'run'}", "max_train_steps=1"]
    (ended,) = processes.run([*run, "data.clip_position=first", "fps=4"])
    assert ended.status == 2
    assert ended.said.splitlines()[-1].startswith(
        f"error: latents '{whole}' do not match this run: clips.fps was 8.0 and is 4.0, clips.clip_position was random and is first, clips.seed was 0 and is null; make"
    )
    assert not (tmp_path / "run" / "model_index.json").exists()
    ended = processes.run(
        ["prepare", "latents", *keys, f"cached_latents={tmp_path / 'latents'}", "clips_per_shard=30"], 2
    )
    errors = {line for each in ended for line in each.said.splitlines() if line.startswith("error:")}
    assert errors == {"error: 2 processes and 1 shards; use at most as many processes, or a smaller clips_per_shard"}
    assert not (tmp_path / "latents").exists()


def test_latents_give_the_loss_of_the_clips_in_the_trainer(tmp_path, listing, monkeypatch):
    """Within what float16 leaves; with two epochs of random clips; and without the encoders."""
    source = ClipDataset(listing, listing.parent, tiny_training.FRAMES, 8.0, tiny.SIZE)
    sound = [k for k in range(len(source)) if source.id(k).startswith("sound")][:6]
    source, _ = source.subset(sound)
    model = pipeline(tmp_path)
    kept = encode_clips(model, source, tmp_path / "latents", epochs_cached=2)
    settings = {"max_train_steps": 6, "text_dropout": 0.5, "lr_warmup_steps": 0}
    train(model, source, tmp_path / "clips", **settings)
    model = pipeline(tmp_path)
    for network in (model.vae, model.text_encoder):
        monkeypatch.setattr(network, "forward", None)
    train(model, kept, tmp_path / "kept", **settings)
    raw, cached = (list(logged(tmp_path / name).values()) for name in ("clips", "kept"))
    assert cached == pytest.approx(raw, rel=2e-3) and cached != raw
    assert np.ptp(raw) > 0.05  # the steps differ by more than that
    last = [weights(tmp_path / name / "checkpoint-6") for name in ("clips", "kept")]
    assert last[0].keys() == last[1].keys() and all(torch.isfinite(each).all() for each in last[1].values())


def test_it_wants_a_folder(capsys):
    assert cli.main(["prepare", "latents"]) == 2
    assert "give cached_latents=" in capsys.readouterr().err
    assert cli.main(["prepare", "latents", "cached_latents=x", "cached_parts=[pixels]"]) == 2
    assert "cached_parts" in capsys.readouterr().err
