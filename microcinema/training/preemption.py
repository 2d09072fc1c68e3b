"""Preemption: a run that receives SIGTERM or SIGUSR1 finishes its step, saves a checkpoint and exits with status 75."""

import os
import signal
import threading
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again
PATIENCE = 30.0  # seconds; torch's launchers kill what is left after as long


class Preempted(Exception):
    """The run was preempted and has saved a checkpoint."""


class Preemption:
    """Within it the signals interrupt nothing and set a stop flag.

    A scheduler may signal one process, the launcher or all processes, at different times; so the ranks all-reduce the flag.
    """

    def __init__(self) -> None:
        self.signaled = False
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self, accelerator: Accelerator) -> bool:
        """Whether any process was signaled. Collective, after the same step on every rank; sums one number."""
        flag = torch.tensor(float(self.signaled), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum"))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signaled = True


def ignore_signals_in_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: workers ignore the signals, since one that died would end the run before it has saved.

    Python ends orphaned workers by SIGTERM and waits for them; so a worker exits some time after it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, PATIENCE))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
