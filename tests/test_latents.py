"""A real (tiny) VAE over real mp4 files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from microcinema.data import video_io
from microcinema.data.clips import ClipDataset
from microcinema.data.latents import RECORDS, WEIGHTS, LatentClipDataset, encode, encode_dataset
from microcinema.errors import UserError


@pytest.fixture(scope="module")
def vae():
    return tiny.vae()


def make_world(root: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    lines = ["videoid,name,description,motion"]
    for k in range(count):
        frames = rng.integers(0, 256, (10, 32, 40, 3), dtype=np.uint8)
        video_io.write_video(root / f"{k:06}.mp4", frames, fps=8)
        lines.append(f"{k:06},a star {k},a red star {k},to the left {k}")
    (root / "clips.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def clips(root: Path, **arguments) -> ClipDataset:
    return ClipDataset(
        root / "clips.csv", root, **{"num_frames": 4, "fps": 8, "resolution": 32, "clip": "first", **arguments}
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory, root, vae) -> Path:
    path = tmp_path_factory.mktemp("caches") / "cache"
    encode_dataset(clips(root), vae, path, batch_size=2, progress=False)
    return path


@pytest.mark.parametrize("shift", [None, 0.25])
def test_encode_is_the_scaled_mean(vae, shift):
    other = tiny.vae()
    other.register_to_config(shift_factor=shift, scaling_factor=0.5)
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    latents = encode(other, video)
    assert latents.shape == (2, 3, tiny.LATENT_CHANNELS, 8, 8)
    assert not latents.requires_grad
    for b in range(2):
        for f in range(3):
            mean = other.encode(video[b, f][None]).latent_dist.mode()[0]
            torch.testing.assert_close(latents[b, f], (mean - (shift or 0.0)) * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(other, video[:, 0]), latents[:, 0], rtol=1e-4, atol=1e-5)
    pixels = other.decode(latents[0] / 0.5 + (shift or 0.0)).sample  # what a pipeline does with them
    torch.testing.assert_close(
        pixels, other.decode(other.encode(video[0]).latent_dist.mode()).sample, rtol=1e-3, atol=1e-3
    )


def test_the_cache_gives_the_items_of_the_data_set(cache, root, vae):
    source, cached = clips(root), LatentClipDataset(cache, vae, clips(root))
    assert len(cached) == len(source) == 5
    for k in (3, 0, 4):
        item, expected = cached[k], source[k]
        video = expected.pop("video")
        latents = item.pop("latents")
        assert item == expected
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents, encode(vae, video[None])[0], rtol=1e-3, atol=1e-3)  # float16
    with pytest.raises(IndexError):
        cached[5]


def test_batch_size_and_workers_change_nothing(cache, root, vae, tmp_path):
    encode_dataset(clips(root), vae, tmp_path / "b", batch_size=5, num_workers=1, progress=False)
    torch.testing.assert_close(
        load_file(tmp_path / "b" / WEIGHTS)["latents"], load_file(cache / WEIGHTS)["latents"], rtol=2e-3, atol=2e-3
    )
    assert (tmp_path / "b" / RECORDS).read_text() == (cache / RECORDS).read_text()


def test_workers_read_it(cache):
    cached = LatentClipDataset(cache)
    here = torch.stack([cached[k]["latents"] for k in range(5)])  # mapped before the workers start
    cached.set_epoch(1)
    loader = DataLoader(cached, batch_size=5, num_workers=1)
    batch = next(iter(loader))
    assert torch.equal(batch["latents"], here)
    assert batch["motion"][4] == "to the left 4"
    assert torch.equal(pickle.loads(pickle.dumps(cached))[2]["latents"], here[2])


# ------------------------------------------------------------------------------------------------ what does not match


def test_another_vae_is_refused(cache, vae):
    with pytest.raises(UserError, match=r"does not match: another VAE; encode it again"):
        LatentClipDataset(cache, vae=tiny.vae(seed=1))
    scaled = tiny.vae()
    scaled.register_to_config(scaling_factor=0.9 * vae.config.scaling_factor)
    with pytest.raises(UserError, match="another VAE"):
        LatentClipDataset(cache).check(vae=scaled)
    one_weight = tiny.vae()
    with torch.no_grad():
        one_weight.encoder.conv_out.bias[0] += 1e-3
    with pytest.raises(UserError, match="another VAE"):
        LatentClipDataset(cache, vae=one_weight)


def test_the_dtype_of_loading_is_not_another_vae(root, tmp_path):
    half = tiny.vae().half()
    encode_dataset(clips(root), half.float(), tmp_path / "cache", progress=False)
    assert len(LatentClipDataset(tmp_path / "cache", vae=half.half())) == len(clips(root))


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"num_frames": 5}, "num_frames was 4 and is 5"),
        ({"fps": 4}, "fps was 8 and is 4"),
        ({"resolution": (32, 40)}, "width was 32 and is 40"),
        ({"clip": "center"}, "clip was first and is center"),
        ({"num_frames": 3, "clip": "random"}, "num_frames was 4 and is 3, clip was first and is random"),
    ],
)
def test_another_transform_is_named(cache, root, arguments, difference):
    with pytest.raises(UserError, match=f"does not match: {difference};"):
        LatentClipDataset(cache, dataset=clips(root, **arguments))


def test_the_decoder_is_no_difference(cache, root):
    assert len(LatentClipDataset(cache, dataset=clips(root, decoder="decord"))) == len(clips(root))


def test_other_clips_are_refused(cache, tmp_path):
    changed = make_world(tmp_path)
    LatentClipDataset(cache, dataset=clips(changed))  # the same clips elsewhere
    video_io.write_video(changed / "000002.mp4", np.zeros((10, 32, 40, 3), np.uint8), fps=8)
    with pytest.raises(UserError, match="another list of clips"):
        LatentClipDataset(cache, dataset=clips(changed))


# ------------------------------------------------------------------------------------------------ bad input


def test_random_clips_are_not_cached(root, vae, tmp_path):
    with pytest.raises(UserError, match="clip='random'"):
        encode_dataset(clips(root, clip="random"), vae, tmp_path / "cache")


def test_sizes_that_do_not_divide(root, vae, tmp_path):
    with pytest.raises(UserError, match=r"30x32 do not divide by the VAE's 4"):
        encode_dataset(clips(root, resolution=(30, 32), multiple_of=2), vae, tmp_path / "cache", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_clip_leaves_the_old_cache(cache, root, vae, tmp_path):
    world = make_world(tmp_path / "world", count=3)
    path = tmp_path / "cache"
    encode_dataset(clips(world), vae, path, progress=False)
    before = (path / WEIGHTS).read_bytes()
    (world / "000002.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"000002\.mp4' is empty"):
        encode_dataset(clips(world), vae, path, batch_size=1, progress=False)
    assert (path / WEIGHTS).read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"world", "cache"}
    encode_dataset(clips(root), vae, path, progress=False)  # a sound one takes its place
    assert len(LatentClipDataset(path)) == 5


def test_a_folder_of_something_else_is_not_replaced(root, vae, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no latent cache; choose another folder"):
        encode_dataset(clips(root), vae, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_weights_that_overflow_are_named(root, tmp_path):
    broken = tiny.vae()
    broken.register_to_config(scaling_factor=1e8)
    with pytest.raises(UserError, match="000000, 000001 do not fit float16"):
        encode_dataset(clips(root), broken, tmp_path / "cache", batch_size=2, progress=False)


def test_no_cache_or_a_damaged_one(cache, tmp_path):
    with pytest.raises(UserError, match="is no latent cache"):
        LatentClipDataset(tmp_path)
    records, weights = (cache / RECORDS).read_text(), (cache / WEIGHTS).read_bytes()
    (tmp_path / RECORDS).write_text(records)
    with pytest.raises(UserError, match="is no latent cache"):
        LatentClipDataset(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="is damaged"):
        LatentClipDataset(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / RECORDS).write_text(records[:100])
    with pytest.raises(UserError, match="is damaged"):
        LatentClipDataset(tmp_path)
    (tmp_path / RECORDS).write_text(records)
    save_file({"latents": torch.zeros(4, 4, 4, 8, 8)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="4 latents for 5 clips"):
        LatentClipDataset(tmp_path)


def test_the_progress_bar_counts_clips(root, vae, tmp_path, capsys):
    encode_dataset(clips(root), vae, tmp_path / "cache")
    assert "5/5" in capsys.readouterr().err
    assert json.loads((tmp_path / "cache" / RECORDS).read_text())["clips"][1]["caption"] == "a star 1"
