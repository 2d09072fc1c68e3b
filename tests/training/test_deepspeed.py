"""ZeRO-2 and ZeRO-3 on two CPU processes, with the files of configs/accelerate/: from the start to a checkpoint, and on from there.

Run only where DeepSpeed is installed: `pip install -e ".[deepspeed]"`, then `pytest -m deepspeed`. Its one compiled operation takes a minute
the first time, and a lock that a killed build leaves in `TORCH_EXTENSIONS_DIR` makes every later one wait for ever: remove it.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fixtures import tiny_training
from microcinema.commands import cli
from microcinema.config.help import config_folder
from microcinema.pipelines.saving import load_pipeline
from microcinema.utils.hashing import checksum_error

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]
# Accelerate takes a run on CPUs for a single process unless its state is made before.
MAIN = """
import sys
from accelerate import PartialState
PartialState(cpu=True)
from microcinema.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Settings of a run on cached latents, which are refused unless the hashes of the frozen encoders are those of whole weights."""
    folder = tmp_path_factory.mktemp("data")
    clips = ["data=sprites", f"data.root={folder}/clips", "num_frames=4"]
    shape = [f"output_dir={folder}/clips", "num_videos=8", "num_frames=4", "size=64"]
    assert cli.main(["prepare", "sprites", *shape]) == 0
    assert cli.main(["prepare", "latents", *clips, f"output_dir={folder}/latents"]) == 0
    return [*clips, f"cached_latents={folder}/latents"]


def train(stage, folder, data, *arguments, mixed_precision):
    """A run of two processes in `folder`, with the DeepSpeed file of this stage; `overlap_comm` needs CUDA's streams."""
    settings = json.loads((config_folder() / f"accelerate/zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    settings["zero_optimization"]["overlap_comm"] = False
    settings["torch_autocast"]["enabled"] = mixed_precision == "bf16"
    files = {"deepspeed.json": json.dumps(settings), "main.py": MAIN}
    for name, text in files.items():
        (folder.parent / name).write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # of ninja
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder.parent / "deepspeed.json"),
    }
    steps = ["max_train_steps=3", "checkpointing_steps=1", "train_batch_size=1", "lr_warmup_steps=0"]
    ema = "false" if stage == 3 else "true"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder.parent / "main.py"), "train", f"output_dir={folder}", f"use_ema={ema}", *data, *steps]
    run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (record, *_) = json.loads((folder / "environment.json").read_text())
    assert record["launch"]["distributed_type"] == "DEEPSPEED"
    assert record["launch"]["deepspeed.zero_optimization"]["stage"] == stage
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_its_checkpoint_and_exports_whole_weights(stage, data, tmp_path):
    whole = train(stage, tmp_path / "whole", data, mixed_precision="bf16")
    shutil.copytree(whole / "checkpoint-1", tmp_path / "resumed/checkpoint-1")
    assert checksum_error(whole / "checkpoint-1") is None
    resumed = train(stage, tmp_path / "resumed", data, "resume_from_checkpoint=latest", mixed_precision="bf16")
    saved, again = (tiny_training.weights(run / "checkpoint-3/unet") for run in (whole, resumed))
    start = tiny_training.weights(whole / "checkpoint-1/unet")
    assert saved.keys() == again.keys() == start.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert any(not torch.equal(saved[name], start[name]) for name in saved)
    unet = load_pipeline(whole).unet.state_dict()  # refuses a key or a shape that is not the network's
    if stage == 3:  # without averages, which are what ZeRO-2 exports
        assert all(torch.equal(unet[name.rpartition(":")[2]], value) for name, value in saved.items())


def test_both_stages_have_the_losses_of_plain_data_parallelism(data, tmp_path):
    runs = [train(stage, tmp_path / f"zero{stage}", data, mixed_precision="no") for stage in (2, 3)]
    single = tmp_path / "single"
    steps = ["max_train_steps=3", "train_batch_size=2", "lr_warmup_steps=0"]
    assert cli.main(["train", f"output_dir={single}", *data, *steps]) == 0
    expected = tiny_training.logged(single)
    for run in runs:
        assert tiny_training.logged(run) == pytest.approx(expected, rel=1e-4)
