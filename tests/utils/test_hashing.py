"""Hashes of files, values, arrays and weights; checksums of folders."""

import hashlib
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from microcinema.utils import hashing
from microcinema.utils.fingerprint import canonical
from microcinema.utils.hashing import (
    SUMS,
    checksum_error,
    hash_array,
    hash_chunks,
    hash_file,
    hash_json,
    hash_networks,
    hash_weights,
    write_checksums,
)

TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/weights").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "empty").write_bytes(b"")
    write_checksums(tmp_path)
    return tmp_path


def test_checksums_are_those_of_sha256sum(folder):
    assert hash_file(folder / "deep/weights") == hashlib.sha256((folder / "deep/weights").read_bytes()).hexdigest()
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder).returncode == 0


def test_first_mismatch_of_a_folder_is_named(folder):
    assert checksum_error(folder) is None
    (folder / "new").write_text("not listed")
    assert checksum_error(folder) is None
    (folder / "empty").write_text("no longer")
    assert checksum_error(folder) == "empty does not match its checksum"
    (folder / "deep/weights").unlink()
    assert checksum_error(folder) == "deep/weights: No such file or directory"
    write_checksums(folder)  # does not list itself
    assert checksum_error(folder) is None
    (folder / SUMS).write_text("")
    assert checksum_error(folder) == "SHA256SUMS is empty"


def test_chunks_are_one_stream():
    assert hash_chunks(["a", b"b", np.frombuffer(b"c", np.uint8)]) == hashlib.sha256(b"abc").hexdigest()


def test_arrays_are_hashed_by_their_bytes_in_row_major_order():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert hash_array(pixels) == hash_array(Image.fromarray(pixels)) == hashlib.sha256(bytes(range(24))).hexdigest()
    assert hash_array(np.asfortranarray(pixels)) == hash_array(pixels) != hash_array(pixels[::-1])


def test_json_hash_ignores_key_order_and_rounding_errors():
    content = {"angle": 0.1 + 0.2, "rate": 1e-5, "names": ("a", "b"), "steps": 12345678901234567890}
    same = {"steps": 12345678901234567890, "names": ["a", "b"], "rate": 1e-5, "angle": 0.3}
    assert canonical(content) == same
    assert hash_json(content) == hash_json(same) != hash_json({**same, "rate": 1.0001e-5})
    assert hash_json(["a"]) == hashlib.sha256(b'["a"]').hexdigest()


def test_weights_hash_depends_on_values_and_dtype():
    network = torch.nn.BatchNorm1d(2)  # with an integer buffer
    before = hash_weights(network)
    assert hash_networks({"net": network, "tokenizer": object()}) == {"net": before}
    assert hash_weights(network) == before == hash_weights(network, torch.float32)
    with torch.no_grad():
        network.bias[0] += 1e-3
    after = hash_weights(network)
    assert after != before
    network.half()
    assert hash_weights(network) not in (before, after)
    assert hash_weights(network, torch.float32) == hash_weights(network.float())


def test_hashes_of_large_networks_are_kept_until_file_or_weights_change(tmp_path, monkeypatch):
    """A folder, in place of a cache that can be written, is no fault."""
    hashed, cache = [], tmp_path / "cache"
    original = hashing.hash_weights
    monkeypatch.setattr(hashing, "hash_weights", lambda network: hashed.append(network) or original(network))
    monkeypatch.setattr(hashing, "_KEPT_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    AutoencoderTiny(**TINY).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"

    def opened(dtype=torch.float32):
        return AutoencoderTiny.from_pretrained(tmp_path / "vae", torch_dtype=dtype)

    def look_up(network, is_hashed):
        hashed.clear()
        assert hash_networks({"vae": network, "other": None}) == {"vae": original(network)}
        assert len(hashed) == is_hashed

    look_up(opened(), True)
    look_up(opened(), False)
    look_up(opened(torch.float16), True)  # other weights in memory
    with torch.no_grad():
        changed = opened()
        changed.decoder.layers[0].weight[0] += 1
    look_up(changed, True)
    os.utime(file, ns=(1, 1))
    look_up(opened(), True)
    look_up(opened(), False)
    times = os.stat(file)
    changed.save_pretrained(tmp_path / "vae")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    look_up(opened(), True)
    look_up(AutoencoderTiny(**TINY), True)  # of no file
    look_up(AutoencoderTiny(**TINY), True)
    for kept in (cache / "microcinema/weights_sha256").iterdir():
        kept.write_text("damaged")
    look_up(opened(), True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    look_up(opened(), True)
