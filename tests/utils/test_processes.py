"""Commands in processes of their own: what they get of the machine, and that they can be ended."""

import threading
import time
from pathlib import Path

import pytest

from microcinema.utils import processes
from microcinema.utils.processes import INTERRUPTED, Processes

CODE = "import os, sys, time; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('CUDA_VISIBLE_DEVICES'), *sys.argv[1:], flush=True); "
SLEEP = CODE + "time.sleep(float(sys.argv[1])); sys.exit(2)"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six cores and three GPUs."""
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def wait_for(text: str, *logs: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(log.exists() and text in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_has_its_share_of_the_machine_and_all_end_together(tmp_path: Path):
    run, logs, ended = Processes(2), [tmp_path / "0", tmp_path / "1"], []
    threads = [threading.Thread(target=lambda log=log: ended.append(run(["-c", SLEEP, "60"], log))) for log in logs]
    for thread in threads:
        thread.start()
    wait_for("60", *logs)
    assert sorted(log.read_text() for log in logs) == ["3 0 60\n", "3 1 60\n"]
    run.stop()
    for thread in threads:
        thread.join(timeout=20)
    assert len(ended) == 2 and max(ended) < 0
    assert run(["-c", SLEEP, "60"], tmp_path / "2") == INTERRUPTED and not (tmp_path / "2").exists()


def test_gpus_are_those_that_are_visible_and_a_launcher_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,4")
    run = Processes(4)
    assert [run(["-c", SLEEP, "0"], tmp_path / "log") for _ in range(4)] == [2] * 4
    assert (tmp_path / "log").read_text() == "1 7 0\n1 4 0\n" * 2
    (tmp_path / "srun").write_text('#!/bin/sh\necho "queued $1"\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    launched = Processes(4, [str(tmp_path / "srun"), "--gpus=1", "python3"])
    assert launched(["-c", SLEEP, "0"], tmp_path / "launched") == 2
    assert (tmp_path / "launched").read_text() == "queued --gpus=1\nNone 7,4 0\n"
