"""The doctor says what a run would stumble over, line by line, and what to do about it."""

import json
import re
import shutil
import time
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from benchmarks import memory
from fixtures import tiny, tiny_training
from microcinema.commands import cli, doctor
from microcinema.commands.doctor import OK, PROBLEM, WARNING
from microcinema.config.compose import compose
from microcinema.profiling.memory_estimate import Estimate
from microcinema.sprites.dataset import write_dataset
from microcinema.utils.hashing import write_checksums

SETTINGS = compose("train", ["output_dir=runs/x", "max_train_steps=100", "mixed_precision=no"])
GIB = doctor.GIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", num_videos=2, num_frames=4, size=32)


@pytest.fixture
def arguments(folder, clips, tmp_path) -> list[str]:
    """Of a run that can start."""
    shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
    small = ["model=plain", f"resolution={tiny.SIZE}", "num_frames=4", "train_batch_size=1"]
    places = [f"data.root={tmp_path}", f"output_dir={tmp_path / 'run'}", f"base.pretrained_model_name_or_path={folder}"]
    return ["doctor", *small, *places]


def test_a_run_that_can_start(arguments, tmp_path, capsys):
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "this run can start"
    topics = [
        "versions",
        "accelerate",
        "device",
        "attention",
        "attention",
        "decoders",
        "trackers",
        "data",
        "output",
        "base",
        "disk",
        "training",
        "sampling",
    ]
    assert [re.match(r"(ok|warning) +(\w+) ", line)[2] for line in lines[:-1]] == topics
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_is_exit_code_1_and_not_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "needs", lambda *_: iter(()))
    (tmp_path / "clips.csv").unlink()
    assert cli.main([*arguments, "report_to=null"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 problem: this run cannot work here"
    (line,) = (line for line in lines if line.startswith("problem"))
    assert f"'{tmp_path / 'clips.csv'}'" in line and "set data.*" in line and "microcinema prepare" in line
    assert cli.main([*arguments, "train_batch_size=0"]) == 2
    assert cli.main(["doctor", "train_batch=1"]) == 2
    assert "did you mean 'train_batch_size'?" in capsys.readouterr().err


def test_held_out_clips_have_to_be_there(arguments, tmp_path, capsys):
    tiny_training.reset_accelerator()
    assert cli.main([*arguments, f"validation_data={{metadata: {tmp_path / 'clips.csv'}}}"]) == 0
    assert "this run can start" in capsys.readouterr().out
    assert cli.main([*arguments, f"validation_data={{metadata: {tmp_path / 'val.csv'}}}"]) == 1
    assert f"'{tmp_path / 'val.csv'}'" in capsys.readouterr().out


def test_it_takes_the_keys_of_train():
    assert cli.COMMANDS["doctor"].config == "train"
    assert cli.command_help("doctor").count("\n") == cli.command_help("train").count("\n")


def test_precision_is_that_of_accelerate_where_the_config_leaves_it_open(arguments, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "needs", lambda config, *_: iter([doctor.Finding("precision", config.mixed_precision)]))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert cli.main(arguments) == 0
    assert re.search("precision +bf16", capsys.readouterr().out)
    tiny_training.reset_accelerator()
    assert cli.main([*arguments, "mixed_precision=no"]) == 0
    assert re.search("precision +no", capsys.readouterr().out)


def test_versions_are_held_against_the_declared_ones(monkeypatch):
    assert doctor.versions().status == OK
    for name in (*doctor.LIBRARIES, "Python", "microcinema"):
        assert f"{name} " in doctor.versions().found
    monkeypatch.setattr(doctor, "version", lambda name: "2.3.1+cpu" if name == "torch" else "99.0")
    found = doctor.versions()
    (bound,) = (entry for entry in requires("microcinema") if entry.startswith("torch>="))
    assert (found.status, found.advice) == (PROBLEM, f'pip install "{bound}"')
    assert "torch 2.3.1+cpu" in found.found


def test_a_cpu_is_enough_for_small_models_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [found.status for found in doctor.devices(SETTINGS, small=True)] == [OK]
    (found,) = doctor.devices(SETTINGS, small=False)
    assert found.status == WARNING and "GPU" in found.advice and "GiB, bf16" in found.found
    (found,) = doctor.devices(replace(SETTINGS, mixed_precision="fp16"), small=True)
    assert (found.status, found.advice) == (PROBLEM, "fp16 needs a GPU; set mixed_precision=no")


def test_every_gpu_is_told_with_its_memory_and_whether_it_knows_bf16(monkeypatch):
    cards = [SimpleNamespace(name="old", total_memory=16 * GIB, major=7, minor=5)]
    cards += [SimpleNamespace(name="new", total_memory=80 * GIB, major=9, minor=0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    old, new = doctor.devices(replace(SETTINGS, mixed_precision="bf16"), small=False)
    assert (old.found, old.status) == ("0: old, 16 GiB, bf16 no", WARNING)
    assert "mixed_precision=fp16" in old.advice
    assert (new.found, new.status) == ("1: new, 80 GiB, bf16 yes", OK)
    assert [found.status for found in doctor.devices(SETTINGS, small=False)] == [OK, OK]


def test_kernels_of_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    kernels, xformers = doctor.attention()
    assert (kernels.found, kernels.status) == ("scaled-dot-product kernels: memory-efficient, math", OK)
    assert xformers.status == OK  # only asked for by another command
    assert "not installed" in xformers.found or re.match(r"xformers \d", xformers.found)
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: False)
    kernels, _ = doctor.attention()
    assert kernels.status == WARNING and "more memory" in kernels.advice


def test_a_module_counts_if_the_config_uses_it(monkeypatch):
    found = doctor.modules("decoders", doctor.DECODERS, "pyav", "data.decoder")
    assert found.status == OK and re.search(r"av [\d.]+ \(used\)", found.found)

    def broken(name):
        raise OSError("libavcodec.so.7: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = doctor.modules("decoders", doctor.DECODERS, "pyav", "data.decoder")
    assert (
        found.status == PROBLEM
        and "cannot be imported (libavcodec.so.7" in found.found
        and "and more" not in str(found)
    )
    assert found.advice.startswith("pip install av")
    assert doctor.modules("decoders", doctor.DECODERS, None, "data.decoder").status == OK  # latents need none


def test_8_bit_adam_needs_its_package(arguments, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "needs", lambda *_: iter(()))
    monkeypatch.setattr(
        doctor, "_version_of", lambda name, imported: (None, "not installed") if name == "bitsandbytes" else ("1", "")
    )
    assert cli.main([*arguments, "use_8bit_adam=true"]) == 1
    assert re.search("problem +optimizer .*pip install bitsandbytes$", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(arguments) == 0


# What train refuses at once


REFUSED = {
    "a schedule without signal": (["diffusion.scheduler.rescale_betas_zero_snr=true"], "model", "zero terminal SNR"),
    "another target of frozen layers": (
        ["diffusion.scheduler.prediction_type=v_prediction"],
        "model",
        "trained with epsilon",
    ),
    "layers that are not there": (["trainable_unet_layers=[up_blocks.99]"], "model", "up_blocks.99"),
    "no model to start from": (["init_weights_from=./gone"], "model", "gone"),
    "a size that the VAE cannot have": (["resolution=30"], "(data|model)", "30"),
    "no list": (["data.metadata={tmp}/gone.csv"], "data", "gone.csv"),
    "no latents": (["cached_latents={tmp}/gone"], "data", "gone"),
    "no held-out clips": (["validation_data={{metadata: {tmp}/gone.csv}}"], "data", "gone.csv"),
    "an earlier run": (["output_dir={tmp}/earlier"], "output", "already holds checkpoint-1"),
    "no such checkpoint": (["resume_from_checkpoint={tmp}/gone"], "output", "is not a checkpoint"),
    "a folder that cannot be": (["output_dir={tmp}/clips.csv/run"], "output", "cannot write to folder"),
    "another run's checkpoint": (
        ["resume_from_checkpoint={tmp}/earlier/checkpoint-1"],
        "model",
        "earlier/checkpoint-1'",
    ),
}


SAMPLE = ("a schedule without signal", "no latents", "an earlier run", "another run's checkpoint")  # in the quick round


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in REFUSED]
)
def test_what_train_refuses_at_once_is_a_problem(fault, arguments, tmp_path, monkeypatch, capsys):
    overrides, topic, said = REFUSED[fault]
    if topic in ("data", "output"):  # found before
        monkeypatch.setattr(doctor, "needs", lambda *_: iter(()))
    checkpoint = tmp_path / "earlier/checkpoint-1"
    checkpoint.mkdir(parents=True)
    state = {
        "progress": {"step": 1, "clips": 1},
        "trained": [],
        "run": {"fixed": {"seed": 3, "clips": None}, "free": {}},
    }
    (checkpoint / "training_state.json").write_text(json.dumps(state))
    write_checksums(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    assert cli.main([*arguments, *overrides]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("problem"))
    assert re.match(f"problem +{topic} ", line) and said in line
    tiny_training.reset_accelerator()
    assert cli.main(["train", *arguments[1:], *overrides]) == 2  # and train says the same
    shown = capsys.readouterr().err.splitlines()[-1]
    assert said in shown
    assert sorted(tmp_path.rglob("*")) == before


# The base


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no connection to it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_base_in_a_folder_or_embedded(folder, tmp_path):
    found, where = doctor.base(str(folder), None, None)
    assert (found.status, found.found, where) == (OK, f"{folder}, a folder", str(folder))
    assert doctor.base("sprites-base", None, None)[0].found == "sprites-base, embedded"
    light = shutil.copytree(
        folder, tmp_path / "light", ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors")
    )
    found, where = doctor.base(str(light), None, None)
    assert found.status == PROBLEM and "weights" in found.found
    assert where == str(light)  # what it needs can be estimated all the same
    found, where = doctor.base("nowhere", None, None)
    assert (found.status, where) == (PROBLEM, None)


def test_a_base_of_the_hub_and_whether_it_is_in_the_cache(folder, hub, tmp_path, monkeypatch):
    found, where = doctor.base("owner/name", None, None)
    assert (found.status, where) == (PROBLEM, None) and "hf download owner/name" in str(found)
    tiny.into_hub_cache(folder, hub, "owner/name")
    found, where = doctor.base("owner/name", None, None)
    assert (found.status, found.found) == (OK, "owner/name, of the hub (offline), in the cache")
    assert Path(where).is_relative_to(hub)
    found, _ = doctor.base("owner/name", None, "fp16")
    assert found.status == PROBLEM and "variant=fp16" in found.found and "hf download owner/name" in found.advice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "resolve_snapshot", None)  # what is in the cache is found without asking the hub
    found, _ = doctor.base("owner/name", None, "fp16")
    assert found.status == WARNING and "fetches them" in found.advice


# What it needs


def test_room_on_the_disk(tmp_path, monkeypatch):
    settings = replace(
        SETTINGS, output_dir=str(tmp_path / "not/yet"), checkpointing_steps=10, checkpoints_total_limit=2
    )
    needed = Estimate(GIB, {"training": 9 * GIB}, gradients=GIB, optimizer=2 * GIB, average=GIB)

    def found(free: float, **changes) -> doctor.Finding:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free * GIB))
        return doctor.disk(replace(settings, **changes), GIB, needed)

    assert "3 checkpoints of 4 GiB and the model take 13 GiB" in found(14).found  # the oldest goes last
    assert [found(free).status for free in (14, 12, 4)] == [OK, WARNING, PROBLEM]
    assert "output_dir" in found(4).advice
    assert "11 checkpoints" in found(14, checkpoints_total_limit=None).found
    assert "2 checkpoints" in found(14, max_train_steps=15).found


def test_memory_beside_what_is_free():
    needed = Estimate(4 * GIB, {"encoding": 5 * GIB, "training": 10 * GIB}, gradients=GIB, activations=2 * GIB)
    ok, tight, short = (doctor.memory("training", needed, free * GIB, PROBLEM, ["a=1", "b=2"]) for free in (12, 11, 9))
    assert [ok.status, tight.status, short.status] == [OK, WARNING, PROBLEM]
    assert ok.found == "10 GiB at most, when training (weights 4 GiB, gradients 1 GiB, activations 2 GiB), 12 GiB free"
    assert str(ok).endswith("12 GiB free") and str(short).endswith("9 GiB free; set a=1, b=2")
    assert doctor.memory("sampling", needed, 9 * GIB, WARNING, ["a=1"]).status == WARNING


def test_what_to_set_where_memory_is_short():
    needed = Estimate(GIB, {"encoding": 3 * GIB, "training": 2 * GIB})
    ways = doctor.ways_to_train_with_less(SETTINGS, needed)
    assert "use_ema=false" in ways
    assert not any("gradient_checkpointing" in way for way in ways)  # least_checkpointing tells it
    assert any("encoded" in way for way in ways) and not any("validation" in way or "train=" in way for way in ways)
    thrifty = {"gradient_checkpointing": True, "use_8bit_adam": True, "use_ema": False, "train_batch_size": 1}
    thrifty |= {"mixed_precision": "bf16", "quantization": "int8"}
    needed = Estimate(GIB, {"training": 2 * GIB})
    assert doctor.ways_to_train_with_less(replace(SETTINGS, **thrifty), needed) == ["a lower resolution or num_frames"]
    assert "trainable_parameters=temporal" in doctor.ways_to_train_with_less(
        replace(SETTINGS, trainable_parameters="all"), needed
    )


def test_sampling_that_does_not_fit_is_told_what_half_precision_and_eight_bits_take(arguments, monkeypatch):
    composed = compose("train", arguments[1:])
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    where = composed.base.pretrained_model_name_or_path
    disk, training, sampling = doctor.needs(
        replace(composed, train_batch_size=1, mixed_precision="no"), where, doctor.CPU
    )
    assert (disk.status, training.status, sampling.status) == (OK, PROBLEM, WARNING)
    least = r"memory.torch_dtype=float16 decode_chunk_size=1 memory.quantization=int8 \(([\d.]+) GiB\)"
    half = re.search(least, sampling.advice)[1]
    assert 0 < float(half) < float(sampling.found.partition(" GiB")[0])


def test_the_least_checkpointing_that_fits_is_named(monkeypatch):
    peaks = {False: 9 * GIB, "first_level": 5 * GIB, True: 2 * GIB}

    def estimate(pipeline, config, latents, device):
        return Estimate(GIB, {"training": peaks[config.gradient_checkpointing]})

    monkeypatch.setattr(doctor, "training_memory", estimate)
    monkeypatch.setattr(doctor, "empty_pipeline", lambda config: None)

    def told(free, value=False):
        config = replace(SETTINGS, gradient_checkpointing=value)
        return doctor.least_checkpointing(config, estimate(None, config, False, "cpu"), int(free * GIB) + 1, doctor.CPU)

    assert told(doctor.MARGIN * 9) == []
    assert told(doctor.MARGIN * 5) == ["gradient_checkpointing=first_level (5 GiB)"]
    assert told(doctor.MARGIN * 4) == told(1) == told(1, "first_level") == ["gradient_checkpointing=true (2 GiB)"]
    assert told(1, True) == []


@pytest.mark.slow
def test_stable_diffusion_is_answered_in_seconds_from_its_settings_alone(arguments, tmp_path, capfd):
    base = memory.settings_of("sd15", tmp_path / "sd15")
    sizes = ["resolution=512", "num_frames=16", "model=microcinema", "train_batch_size=1"]
    start = time.process_time()
    assert cli.main([*arguments, f"base.pretrained_model_name_or_path={base}", *sizes]) == 1  # it has no weights
    assert time.process_time() - start < 60  # 13 on an idle machine
    shown = capfd.readouterr()
    assert re.search("^problem +base .*has no weights", shown.out, re.MULTILINE)
    # 860M parameters of the 2D UNet, twice, and what is added; VAE 84M, text encoder 123M.
    weights = float(re.search(r"sampling .*weights ([\d.]+) GiB", shown.out)[1])
    assert 7 < weights < 8
    assert "estimating memory" in shown.err  # longer than two seconds, so with a bar
