"""The files and scripts that start a run on many GPUs and nodes, as far as a machine without either can tell."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from microcinema.config.help import config_folder

ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
SCRIPTS = [ROOT / "scripts/slurm/train.sbatch", ROOT / "scripts/slurm/train_node.sh"]

# What SLURM and accelerate do of which the scripts make use. A job's processes are those that `srun` becomes, and their children.
COMMANDS = {
    "srun": 'echo $$ > "$STATE/step"; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" >> "$STATE/requeued"; fi',
    "scancel": 'pid=$(cat "$STATE/step"); kill "${1/--signal=/-}" "$pid" $(pgrep -P "$pid")',
    "accelerate": '"$PYTHON" "$WORKER" "$@" || exit 1',
}
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))  # as training does, whatever was ignored before
state = Path(os.environ["STATE"])
(state / "arguments").write_text(json.dumps(sys.argv[1:]))
if os.environ["THEN"] == "finishes":
    (state / "model_index.json").write_text("{}")
elif os.environ["THEN"] == "fails":
    sys.exit(2)
else:
    time.sleep(60)
"""


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_takes_its_files(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.num_processes >= 1
    command = path.read_text().splitlines()[0].removeprefix("# accelerate launch ").removesuffix(" ...")
    arguments = shlex.split(command.replace("$(microcinema --config-dir)", str(config_folder())).replace("<GPUs>", "8"))
    parsed = launch_command_parser().parse_args(arguments)
    assert Path(parsed.config_file) == path
    assert (parsed.module, parsed.training_script, parsed.training_script_args) == (True, "microcinema", ["train"])
    if path.stem.startswith("zero"):
        settings = json.loads(Path(parsed.deepspeed_config_file).read_text())
        assert settings["zero_optimization"]["stage"] == int(path.stem[-1])


def test_the_layers_that_fsdp_parts_are_there():
    from microcinema.models import (
        temporal,  # noqa: F401
        unet2d,  # noqa: F401
    )

    names = yaml.safe_load((ROOT / "configs/accelerate/fsdp.yaml").read_text())["fsdp_config"]
    from fixtures import tiny
    from fixtures.tiny_unet import network

    there = {type(module).__name__ for module in network(tiny.unet(), "microcinema").modules()}
    assert set(names["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= there


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.fixture
def job(tmp_path):
    """Starts the batch script as SLURM would; `then` is what the run does: it sleeps, finishes or fails."""
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(then: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "WORKER": str(tmp_path / "worker.py"),
            "STATE": str(tmp_path),
            "THEN": then,
            "OUTPUT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NODEID": "1",
        }
        started.append(subprocess.Popen(["bash", SCRIPTS[0], "seed=3"], cwd=ROOT, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_job_that_is_asked_to_end_is_queued_again(tmp_path, job, number):
    process = job("sleeps")
    wait_for(tmp_path / "arguments")
    process.send_signal(number)
    assert process.wait(60) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
    given = json.loads((tmp_path / "arguments").read_text())
    assert given.pop(0) == "launch"
    parsed = launch_command_parser().parse_args(given)
    assert (parsed.num_machines, parsed.machine_rank, parsed.num_processes) == (2, 1, 16)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("node0", 20000 + 123456 % 20000)
    assert (ROOT / parsed.config_file).is_file() and parsed.module and parsed.training_script == "microcinema"
    assert parsed.training_script_args == ["train", "seed=3", f"output_dir={tmp_path}", "resume_from_checkpoint=latest"]


@pytest.mark.parametrize("then, status", [("finishes", 0), ("fails", 1)])
def test_a_job_that_ends_by_itself_is_not(tmp_path, job, then, status):
    assert job(then).wait(60) == status
    assert not (tmp_path / "requeued").exists()
