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
    settings = ["data=sprites", f"data.root={folder}/clips", "num_frames=4", f"cached_latents={folder}/latents"]
    shape = [f"output_dir={folder}/clips", "num_videos=8", "num_frames=4", "size=64"]
    assert cli.main(["prepare", "sprites", *shape]) == 0
    assert cli.main(["prepare", "latents", *settings]) == 0
    return settings


def train(stage, folder, data, *arguments):
    """A run of two processes in `folder`, with the DeepSpeed file of this stage; `overlap_comm` needs CUDA's streams."""
    settings = json.loads((config_folder() / f"accelerate/zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    settings["zero_optimization"]["overlap_comm"] = False
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
    steps = ["max_train_steps=3", "checkpointing_steps=1", "train_batch_size=1", "lr_warmup_steps=0", "logging_steps=1"]
    ema = "false" if stage == 3 else "true"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder.parent / "main.py"), "train", f"output_dir={folder}", f"use_ema={ema}", *data, *steps]
    run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (record, *_) = json.loads((folder / "environment.json").read_text())
    assert record["launch"]["distributed_type"] == "DEEPSPEED"
    assert record["launch"]["deepspeed.zero_optimization"]["stage"] == stage
    return folder


@pytest.mark.parametrize("stage", [3, 2])
def test_a_run_goes_on_from_its_checkpoint_and_exports_whole_weights(stage, data, tmp_path):
    whole = train(stage, tmp_path / "whole", data)
    shutil.copytree(whole / "checkpoint-1", tmp_path / "resumed/checkpoint-1")
    assert checksum_error(whole / "checkpoint-1") is None
    resumed = train(stage, tmp_path / "resumed", data, "resume_from_checkpoint=latest")
    saved, again = (tiny_training.weights(run / "checkpoint-3/unet") for run in (whole, resumed))
    start = tiny_training.weights(whole / "checkpoint-1/unet")
    assert saved.keys() == again.keys() == start.keys()
    trained = [name for name in saved if not torch.equal(saved[name], start[name])]
    assert len(trained) > 10

    def distance(state):
        return sum((saved[name] - state[name]).abs().sum() for name in saved)

    # ZeRO-3 did not resume in the same bits, for a reason that was not found: 1.2% of what two steps had changed when it was measured.
    assert distance(again) < 0.05 * distance(start)
    assert tiny_training.logged(resumed)[3] == pytest.approx(tiny_training.logged(whole)[3], rel=1e-2)
    unet = load_pipeline(whole).unet.state_dict()  # refuses a key or a shape that is not the network's
    if stage == 3:  # without averages, which are what ZeRO-2 exports
        assert all(torch.equal(unet[name.rpartition(":")[2]], value) for name, value in saved.items())
