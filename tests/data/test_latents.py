"""Encoded clips on disk: a real (tiny) VAE and text encoder over real mp4 files, and the shards that come of it."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from torch.utils.data import DataLoader

from fixtures import broken_videos, tiny
from fixtures.tiny_training import encode_clips, pipeline
from microcinema.data import video_writer
from microcinema.data.clips import ClipDataset
from microcinema.data.joint import JointDataset
from microcinema.data.latents import FINGERPRINT, INDEX, QUARANTINE, EncodedClips
from microcinema.data.metadata import Rows, read_rows
from microcinema.data.quarantine import read_quarantine
from microcinema.data.shards import ShardDataset
from microcinema.models.vae import encode_pixels
from microcinema.training import cached_latents_check
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.utils.errors import UserError

CHANGED = "was [0-9a-f]{12}... and is [0-9a-f]{12}..."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def vae(model):
    return model.vae


TRANSFORM = {"num_frames": 4, "fps": 8, "resolution": 32, "clip_position": "first"}


def make_world(root: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    lines = ["videoid,name,description,motion"]
    for k in range(count):
        frames = rng.integers(0, 256, (10, 32, 40, 3), dtype=np.uint8)
        video_writer.write_video(root / f"{k:06}.mp4", frames, fps=8)
        lines.append(f"{k:06},a star {k},a red star {k},to the left {k}")
    (root / "clips.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def clips(root: Path, **arguments) -> ClipDataset:
    return ClipDataset(root / "clips.csv", root, **(TRANSFORM | arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root, model) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents"
    encode_clips(model, clips(root), path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """One's own, to be damaged."""
    path = tmp_path / "latents"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def check(folder: Path, model, world: Path, teacher: str | None = None, **arguments) -> None:
    cached_latents_check.check(
        EncodedClips(folder, ClipDataset(world / "clips.csv", **(TRANSFORM | {"root": world} | arguments))),
        model,
        teacher,
    )


def test_the_items_are_those_of_the_data_set(folder, root, model):
    source, kept = clips(root), EncodedClips(folder, clips(root))
    assert len(kept) == len(source) == 5
    for k in (3, 0, 4):
        item, expected = kept[k], source[k]
        video = expected.pop("video")
        latents, text = item.pop("latents"), item.pop("text")
        assert item == expected
        assert latents.dtype == text.dtype == torch.float16
        torch.testing.assert_close(
            latents.float(), encode_pixels(model.vae, video[None] / 127.5 - 1)[0], rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(text.float(), model.encode_text([item["caption"]])[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kept.empty_tokens["text"].float(), model.encode_text([""]), rtol=1e-3, atol=1e-3)
    with pytest.raises(IndexError):
        kept[5]


def test_the_shards_are_webdataset(folder):
    """Read by the library itself, in order; and the size that docs/data.md computes."""
    shards = sorted(folder.glob("[0-9]*.tar"))
    assert [path.name for path in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False).decode())
    assert [sample["json"]["caption"] for sample in samples] == [f"a star {k}" for k in range(5)]
    tensors = [safetensors.torch.load(sample["safetensors"]) for sample in samples]
    assert {each["latents"].shape for each in tensors} == {(4, tiny.LATENT_CHANNELS, 8, 8)}
    with tarfile.open(shards[0]) as tar:
        sizes = [entry.size for entry in tar if entry.name.endswith(".safetensors")]
    numbers = sum(tensor.numel() for tensor in tensors[0].values())
    assert all(2 * numbers <= size <= 2 * numbers + 300 for size in sizes)


def test_workers_read_it_and_change_nothing(folder, root, model, tmp_path):
    kept = encode_clips(model, clips(root), tmp_path / "again", num_workers=2)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    here = torch.stack([kept[k]["latents"] for k in range(5)])  # opened and mapped before the workers start
    batch = next(iter(DataLoader(kept, batch_size=5, num_workers=1)))
    assert torch.equal(batch["latents"], here)
    assert batch["motion"][4] == "to the left 4"
    assert torch.equal(pickle.loads(pickle.dumps(kept))[2]["latents"], here[2])


def test_more_shards_than_are_held_open(folder, root, monkeypatch):
    monkeypatch.setattr("microcinema.data.latents._MAX_OPEN_SHARDS", 1)
    kept = EncodedClips(folder, clips(root))
    before = len(os.listdir("/proc/self/fd"))
    assert [kept[k]["id"] for k in (4, 0, 2, 4)] == ["000004", "000000", "000002", "000004"]
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_random_clips_have_a_position_for_each_cached_epoch(root, model, tmp_path):
    source = clips(root, clip_position="random", seed=3)
    kept = encode_clips(model, source, tmp_path / "latents", epochs_cached=2, cached_parts=[])
    for epoch in range(4):
        kept.set_epoch(epoch)
        source.set_epoch(epoch % 2)
        torch.testing.assert_close(
            kept[1]["latents"].float(),
            encode_pixels(model.vae, source[1]["video"][None] / 127.5 - 1)[0],
            rtol=1e-3,
            atol=1e-3,
        )
    second = [kept[k]["latents"] for k in range(5)]
    kept.set_epoch(0)
    assert not all(torch.equal(kept[k]["latents"], second[k]) for k in range(5))
    with pytest.raises(UserError, match=r"clips.seed was 3 and is 4"):
        check(tmp_path / "latents", model, root, clip_position="random", seed=4)


def test_broken_clips_are_named_and_not_replaced(model, tmp_path):
    listing = broken_videos.dataset(tmp_path / "world", num_sound=2)
    source = ClipDataset(listing, listing.parent, 4, 8.0, 32, clip_position="first")
    kept = encode_clips(model, source, tmp_path / "latents", max_error_rate=1.0, num_workers=1)
    wrong = {name for name, (_, reason) in broken_videos.KINDS.items() if reason}
    names = [source.id(k) for k in range(len(source))]
    records = read_quarantine(tmp_path / "latents" / QUARANTINE)
    assert {record["id"].partition("-")[0] for record in records} == wrong and len(records) == len(wrong)
    for k, name in enumerate(names):
        if name.partition("-")[0] in wrong:
            with pytest.raises(
                UserError, match=f"clip '{name}' could not be read when the latents were made: .*{name}"
            ):
                kept[k]
        else:
            assert kept[k]["id"] == name


def test_nothing_that_can_be_read(model, tmp_path):
    (tmp_path / "world").mkdir()
    world = make_world(tmp_path / "world", count=2)
    for path in world.glob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no clip of 1 of 1 shards could be read, the first is 0; see '.*quarantine'"):
        encode_clips(model, clips(world), tmp_path / "latents")
    with pytest.raises(UserError, match="are incomplete: 0 of 1"):
        EncodedClips(tmp_path / "latents", clips(world))
    with pytest.raises(UserError, match=r"none of the 2 clips could be read; see '.*quarantine'"):
        encode_clips(model, clips(world), tmp_path / "latents", max_error_rate=1)


def same_clips(one: Path, other: Path) -> bool:
    files = [{file.name: file.read_bytes() for file in folder.glob("*.[nt]*")} for folder in (one, other)]
    return files[0] == files[1]


def test_a_shard_of_which_no_clip_can_be_read_is_not_finished(folder, root, model, tmp_path):
    """The clips come back: the same command makes that shard alone, and ends with the files of a run without a fault."""
    world = shutil.copytree(root, tmp_path / "world")
    away = [world / f"{k:06}.mp4" for k in (2, 3)]
    for path in away:
        path.rename(path.with_suffix(".away"))
    for _ in range(2):  # a start that finds the same fault says so again
        with pytest.raises(
            UserError, match="no clip of 1 of 3 shards could be read, the first is 1; .* max_error_rate=1"
        ):
            encode_clips(model, clips(world), tmp_path / "latents")
        assert sorted(file.name for file in (tmp_path / "latents").glob("*.tar")) == ["000000.tar", "000002.tar"]
        assert [record["sample_index"] for record in read_quarantine(tmp_path / "latents" / QUARANTINE)] == [2, 3]
    for path in away:
        path.with_suffix(".away").rename(path)
    assert len(encode_clips(model, clips(world), tmp_path / "latents")) == 5
    assert read_quarantine(tmp_path / "latents" / QUARANTINE) == [] and same_clips(tmp_path / "latents", folder)


def test_what_was_written_while_the_disk_failed_is_made_again(root, model, tmp_path):
    """Three epochs in shards of three; from the fifth clip on nothing can be read, and the limit stops the run at the fifth broken one."""

    class Failing(ClipDataset):
        reads, until = 0, 4

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > self.until:
                raise UserError("the file server is busy")
            return super().__getitem__(index)

    def encode(data, name):
        return encode_clips(model, data, tmp_path / name, epochs_cached=3, clips_per_shard=3)

    data = Failing(root / "clips.csv", root, **TRANSFORM)
    with pytest.raises(UserError, match="5 of the last 9 clips are broken, more than max_error_rate=0.05 allows of 15"):
        encode(data, "latents")
    assert [file.name for file in (tmp_path / "latents").glob("*.tar")] == ["000000.tar"]
    data.until = 100
    encode(data, "latents")
    encode(clips(root), "whole")
    assert read_quarantine(tmp_path / "latents" / QUARANTINE) == []
    assert same_clips(tmp_path / "latents", tmp_path / "whole")


def test_too_many_that_cannot_be_read(root, model, tmp_path):
    class Broken(ClipDataset):
        def __getitem__(self, index):
            raise UserError("the file server is gone")

    source = Broken(root / "clips.csv", root, 4, 8, 32, clip_position="first")
    with pytest.raises(UserError, match="5 of the last 5 clips are broken, more than max_error_rate=0.05"):
        encode_clips(model, source, tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("[0-9]*.tar"))


def test_any_data_set_of_training(root, model, tmp_path):
    """Shards, buckets and joint data keep their own order."""
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for k in range(3):
            video = (root / f"{k:06}.mp4").read_bytes()
            writer.write({"__key__": str(k), "mp4": video, "txt": f"caption {k}"})
    tars = ShardDataset(str(tmp_path / "0.tar"), 4, 8.0, 32, clip_position="center", cache_dir=tmp_path / "cache")
    joint = JointDataset(
        {"videos": tars, "images": clips(root, num_frames=1)}, {"videos": 1.0, "images": 1.0}, bucket_run=2
    )
    kept = encode_clips(model, joint, tmp_path / "latents", clips_per_shard=3)
    assert [tuple(kept[k]["latents"].shape) for k in (0, 7)] == [(4, 4, 8, 8), (1, 4, 8, 8)]
    assert kept[1]["caption"] == "caption 1" and kept.same_shape_run == 2
    orders = [
        [order.epoch_and_index(n) for n in range(6)] for data in (kept, joint) for order, _ in data.orderings([0])
    ]
    assert orders[:2] == orders[2:]
    cached_latents_check.check(kept, model, None)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes() + bytes(512))
    with pytest.raises(UserError, match=f"do not match this run: clips.videos.files {CHANGED}; make others"):
        cached_latents_check.check(kept, model, None)


# What does not match


def test_another_vae_or_text_encoder_is_refused(folder, root, model, tmp_path):
    check(folder, model, root)
    other = pipeline(tmp_path)
    scale = other.vae.config.scaling_factor
    other.vae.register_to_config(scaling_factor=0.9 * scale)
    with pytest.raises(UserError, match=f"do not match this run: vae.sha256 {CHANGED}; make others"):
        check(folder, other, root)
    other.vae.register_to_config(scaling_factor=scale)
    check(folder, other, root)
    with torch.no_grad():
        other.vae.encoder.conv_out.bias[0] += 1e-3
        next(other.text_encoder.parameters())[0] += 1e-3
    with pytest.raises(UserError, match=f"vae.sha256 {CHANGED}, text.sha256 {CHANGED}; make others"):
        check(folder, other, root)


def test_the_dtype_of_loading_is_not_another_vae(root, tmp_path):
    half = pipeline(tmp_path)
    half.vae.half()
    half.text_encoder.half()
    before = cached_latents_check.fingerprint(half, clips(root), None)
    half.vae.float()
    half.text_encoder.float()
    assert cached_latents_check.fingerprint(half, clips(root), None) == before


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"num_frames": 5}, "clips.num_frames was 4 and is 5"),
        ({"fps": 4}, "clips.fps was 8 and is 4"),
        ({"resolution": (32, 40)}, "clips.width was 32 and is 40"),
        ({"clip_position": "center"}, "clips.clip_position was first and is center"),
        (
            {"num_frames": 3, "clip_position": "random"},
            "clips.num_frames was 4 and is 3, clips.clip_position was first and is random, clips.seed was null and is 0",
        ),
        ({"watermark": {"action": "tag", "box": [0, 0, 1, 1]}}, "clips.watermark.* was null and is .*"),
        ({"columns": {"id": "videoid", "caption": "motion"}}, f"clips.list {CHANGED}"),
    ],
)
def test_another_transform_is_named(folder, model, root, arguments, difference):
    with pytest.raises(UserError, match=f"do not match this run: {difference}; make others"):
        check(folder, model, root, **arguments)


def test_the_decoder_is_no_difference(folder, model, root):
    check(folder, model, root, decoder="decord")


def test_other_clips_are_refused_and_files_may_be_gone(folder, model, tmp_path):
    changed = make_world(tmp_path)
    check(folder, model, changed)  # the same clips elsewhere
    video_writer.write_video(changed / "000002.mp4", np.zeros((10, 32, 40, 3), np.uint8), fps=8)
    with pytest.raises(
        UserError, match="do not match this run: clips.files.[0-9]+ was [0-9]+ and is [0-9]+.*; make others"
    ):
        check(folder, model, changed)
    check(folder, model, changed, root=None)
    with pytest.raises(UserError, match=r"no root; set data\.root"):
        ClipDataset(changed / "clips.csv", None, **TRANSFORM)[0]
    (changed / "clips.csv").write_text((changed / "clips.csv").read_text().replace("star 3", "moon 3"))
    with pytest.raises(UserError, match=f"clips.list {CHANGED}"):
        check(folder, model, changed, root=None)


def test_the_digest_of_a_list_is_of_what_it_says(root):
    rows = read_rows(root / "clips.csv")
    parts = [rows.take([0, 1]).table, rows.take([2, 3, 4]).table]
    import pyarrow as pa

    assert Rows(pa.concat_tables(parts)).digest() == rows.digest() == Rows(rows.table.slice(0)).digest()
    assert rows.take([0, 1, 2, 4, 3]).digest() != rows.digest()
    assert Rows(rows.table.slice(1, 3)).digest() == rows.take([1, 2, 3]).digest()


# Bad input


def test_what_is_there_is_gone_on_with_or_refused(copy, root, model, tmp_path):
    stamps = {file.name: file.stat().st_mtime_ns for file in copy.glob("[0-9]*.tar")}
    encode_clips(model, clips(root), copy)  # nothing is left to do
    assert stamps == {file.name: file.stat().st_mtime_ns for file in copy.glob("[0-9]*.tar")}
    (copy / "000001.tar").unlink()
    encode_clips(model, clips(root), copy)  # that one alone is made
    again = {file.name: file.stat().st_mtime_ns for file in copy.glob("[0-9]*.tar")}
    assert [name for name in stamps if again[name] != stamps[name]] == ["000001.tar"]
    for changes, said in (
        ({"clips_per_shard": 3}, "clips_per_shard was 2 and is 3"),
        ({"cached_parts": []}, "text was cached"),
    ):
        with pytest.raises(UserError, match=f"holds other latents .*{said}.*; delete it, or choose another folder"):
            encode_clips(model, clips(root), copy, **changes)
    with pytest.raises(UserError, match=r"\(clips.clip_position was first and is center\)"):
        encode_clips(model, clips(root, clip_position="center"), copy)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something other than latents; choose a new folder"):
        encode_clips(model, clips(root), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_full_disk_leaves_finished_shards(copy, folder, root, model):
    (copy / "000001.tar").unlink()
    (copy / f".000001.{2**22 + 1}.microcinema-partial.tar").write_bytes(b"of a process that was killed")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            encode_clips(model, clips(root), copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(file.name for file in copy.glob("[0-9]*.tar")) == ["000000.tar", "000002.tar"]
    assert not list(copy.glob(".*"))
    encode_clips(model, clips(root), copy)
    for file in folder.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()


def test_sizes_that_do_not_divide(root, model, tmp_path):
    with pytest.raises(UserError, match=r"30x32, but VAE factor 4 needs multiples of 4"):
        encode_clips(model, clips(root, resolution=(30, 32), multiple_of=2), tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("[0-9]*.tar")) and not list((tmp_path / "latents").glob(".*"))


def test_numbers_that_overflow_are_named(root, tmp_path):
    broken = pipeline(tmp_path)
    broken.vae.register_to_config(scaling_factor=1e8)
    with pytest.raises(UserError, match="latents of clip '000000' overflow float16"):
        encode_clips(broken, clips(root), tmp_path / "latents")


def test_more_processes_than_shards(root, model, tmp_path):
    from types import SimpleNamespace

    from microcinema.commands import prepare_latents
    from microcinema.data.latents import Layout

    eight = SimpleNamespace(num_processes=8)
    with pytest.raises(UserError, match="8 processes and 3 shards; use at most as many processes"):
        prepare_latents.encode_clips(eight, model, clips(root), tmp_path, None, None, Layout(5, 1, 2))


def test_no_latents_or_damaged_ones(copy, root, tmp_path):
    with pytest.raises(UserError, match=r"holds no latents \(fingerprint.json is missing\)"):
        EncodedClips(tmp_path, clips(root))
    shard, index, about = copy / "000001.tar", copy / INDEX, copy / FINGERPRINT
    whole = {path: path.read_bytes() for path in (shard, index, about)}
    shard.write_bytes(whole[shard][:2000])
    with pytest.raises(UserError, match=r"000001\.tar' is cut off at 2000 bytes of"):
        EncodedClips(copy, clips(root))
    shard.unlink()
    with pytest.raises(UserError, match=r"000001\.tar' is missing; copy it again"):
        EncodedClips(copy, clips(root))
    shard.write_bytes(whole[shard].replace(b"latents", b"patents").replace(b'"dtype"', b'"dtipe"'))
    with pytest.raises(UserError, match=r"clip 2 of '.*000001\.tar' is damaged"):
        EncodedClips(copy, clips(root))[2]
    shard.write_bytes(whole[shard])
    index.unlink()
    with pytest.raises(UserError, match="are incomplete: 3 of 3 shards are"):
        EncodedClips(copy, clips(root))
    np.save(index, np.zeros(4))
    with pytest.raises(UserError, match="names 4 clips of 5"):
        EncodedClips(copy, clips(root))
    index.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        EncodedClips(copy, clips(root))
    about.write_bytes(whole[about][:100])
    with pytest.raises(UserError, match="is damaged"):
        EncodedClips(copy, clips(root))


def test_what_to_keep(root, model, tmp_path):
    kept = encode_clips(model, clips(root), tmp_path / "few", cached_parts=[])
    assert (
        set(kept[0]) == {"latents", "caption", "description", "motion", "fps", "index", "id"} and not kept.empty_tokens
    )
    with pytest.raises(UserError, match="cached_parts=motion_tokens, which this model does not read; it reads text"):
        encode_clips(model, clips(root), tmp_path / "other", cached_parts=["text", "motion_tokens"])
    batch = torch.utils.data.default_collate([{**kept[k], "sample_index": k} for k in range(2)])
    made = BatchEncoder(model, torch.device("cpu"), kept.empty_tokens)(batch)
    assert torch.equal(made.text, model.encode_text(["a star 0", "a star 1"]))  # of the captions
    assert {field.name for field in dataclasses.fields(made)} >= {"latents", "text"}
    assert json.loads((tmp_path / "few" / FINGERPRINT).read_text())["contents"].keys() == {"vae", "clips"}
    with pytest.raises(UserError, match="come without flow, which this model needs"):
        check(tmp_path / "few", model, root, teacher="dis")
