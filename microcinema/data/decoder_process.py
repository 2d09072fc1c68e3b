"""Decoding in a child process, which can be killed when a decoder written in C hangs or crashes.

Python signals and threads cannot interrupt a C function, and killing a data loader's worker ends the run. So each worker calls the functions of
data/video_reader.py in a child process, which it keeps as long as the child answers in time. The child imports no torch: it starts in a
fraction of a second and takes some 60 MB.
"""

import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any

from microcinema.data import video_reader
from microcinema.utils.errors import UserError

_STARTUP = 120.0  # seconds until the child must have started, on the busiest machine
_GRACE = 5.0  # seconds after the timeout in which a child without a parent ends itself
_LENGTH = struct.Struct("<Q")


class DecoderProcess:
    """Calls functions of data/video_reader.py in a child process, at most `timeout` seconds each.

    Raises:
        UserError: the timeout is not positive; from a call, the error of the function, a timeout, or a crash of the decoder.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        if not timeout > 0:
            raise UserError(f"timeout={timeout}; give a positive number of seconds, or null for none")

    def __call__(self, function: str, source: video_reader.Source, *arguments: Any, **keywords: Any) -> Any:
        """`video_reader.<function>(source, *arguments, **keywords)`."""
        child = self._running()
        try:
            _send(child.stdin.fileno(), (self.timeout, function, (source, *arguments), keywords))  # type: ignore[union-attr]
            succeeded, answer = self._receive(child, self.timeout)
        except TimeoutError:
            self.close()
            raise UserError(
                f"video file '{source}' took more than {self.timeout:g} s to decode, and its decoder was killed; "
                "take it off the list, or raise timeout"
            ) from None
        except (EOFError, OSError):
            status = self._exit_status(child)
            raise UserError(
                f"video file '{source}' crashed its decoder ({status}); take it off the list, or try the other decoder"
            ) from None
        if not succeeded:
            raise UserError(answer)
        return answer

    def close(self) -> None:
        """Kills the child; the next call starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)  # not longer: it may hang in the kernel, on a file server that is gone

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}  # a worker process starts its own

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # forked: the child is the parent's
            self._child, self._owner = None, os.getpid()
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                bufsize=0,
            )
            try:
                self._receive(self._child, _STARTUP)
            except (TimeoutError, EOFError, OSError) as error:
                status = self._exit_status(self._child)
                raise RuntimeError(f"the decoder's process did not start ({status})") from error
        return self._child

    def _exit_status(self, child: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        code = child.returncode
        self.close()
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    @staticmethod
    def _receive(child: subprocess.Popen[bytes], timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        descriptor = child.stdout.fileno()  # type: ignore[union-attr]

        def read(count: int) -> bytearray:
            data = bytearray()
            while len(data) < count:
                if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                chunk = os.read(descriptor, min(count - len(data), 1 << 20))
                if not chunk:
                    raise EOFError
                data += chunk
            return data

        return pickle.loads(read(_LENGTH.unpack(read(_LENGTH.size))[0]))


def _send(descriptor: int, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def serve() -> None:
    """The child's main loop: answers calls until its parent is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    # The parent handles Control-C and the preemption signals that a scheduler sends to every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    calls = os.fdopen(0, "rb")
    _send(answers, "ready")
    while header := calls.read(_LENGTH.size):
        timeout, function, arguments, keywords = pickle.loads(calls.read(_LENGTH.unpack(header)[0]))
        # If the parent has died, nobody kills a child that hangs, except the alarm's default action.
        signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
        try:
            answer = True, getattr(video_reader, function)(*arguments, **keywords)
        except UserError as error:
            answer = False, str(error)
        except Exception as error:  # any error of a decoder: this file is the cause
            answer = False, f"video file '{arguments[0]}' cannot be decoded ({type(error).__name__}: {error})"
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)
