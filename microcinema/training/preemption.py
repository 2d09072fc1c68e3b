"""Asked to end: a run that gets SIGTERM or SIGUSR1 finishes its step, saves and exits with a status that says so."""

import os
import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
PATIENCE = 30.0  # seconds; launchers of torch kill what is there after as long


class Preempted(Exception):
    """The run has saved and has to end before it is finished."""


class Preemption:
    """Within it a signal asks the run to end, and interrupts nothing.

    A scheduler may send the signal to one process, to the launcher or to all of them, and at no two at the same time; so what
    counts is what all processes agree on.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python hears signals there alone
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked; every process must call it, after the same step. One number is summed."""
        asked = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum"))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def ignore_signals_in_worker(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: whether to end is the affair of the run, which ends its workers itself.

    A scheduler may signal every process of a job, and a worker that died would take the run with it before it has saved. But
    Python ends workers that are left over by SIGTERM, and waits for them; so a worker goes some time after it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, PATIENCE))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
