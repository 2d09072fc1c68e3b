"""Commands in processes of their own: what fails, fails alone, and its memory is given back."""

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

INTERRUPTED = 130  # exit status, as of a shell


class Processes:
    """Runs what Python is given, such as `-m microcinema train seed=1`, and returns its exit status; called by as many threads as there are workers.

    Args:
        workers: processes at once. They share this machine's cores, and each has one of its GPUs for itself where there are enough.
        launch: what is started, before the arguments, such as `srun --gpus=1 python`, to which cores and GPUs are left; None: this Python.
    """

    def __init__(self, workers: int, launch: Sequence[str] | None = None) -> None:
        self.launch = [sys.executable] if launch is None else list(launch)
        # The C library otherwise hands each large buffer back to the kernel and faults it in again. Progress once in a minute: it goes to a file.
        malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        self.environment = {"TQDM_MININTERVAL": "60", **malloc, **os.environ}
        self._devices: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = list(map(str, range(torch.cuda.device_count()))) if visible is None else visible.split(",")
        for worker in range(workers):
            own = {"CUDA_VISIBLE_DEVICES": devices[worker % len(devices)]} if devices and launch is None else {}
            self._devices.put(own)
        if launch is None:
            self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        """Runs one command, whose output is appended to a file."""
        if self._stopped:
            return INTERRUPTED
        device = self._devices.get()
        try:
            with log.open("ab") as file:
                # A session of its own, to which a terminal's Ctrl-C does not come: it is asked to end by SIGTERM, and saves.
                options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
                environment = self.environment | device
                process = subprocess.Popen([*self.launch, *arguments], env=environment, **options)  # type: ignore[call-overload]
                self._alive.add(process)
                if self._stopped:  # in between
                    process.terminate()
                status = process.wait()
                self._alive.discard(process)
            return int(status)
        finally:
            self._devices.put(device)

    def stop(self) -> None:
        """Asks what is running to end, and begins nothing more."""
        self._stopped = True
        for process in tuple(self._alive):
            process.terminate()
