"""Decoding in a process of its own, which can be killed: what a decoder in C that hangs, or crashes, cannot escape.

A Python signal or thread cannot interrupt a C function, and a data loader's worker that is killed takes the run with it. So the functions of
data/video_reader.py are called in a child process, one for each worker, which is used again for as long as it answers in time. It imports no torch:
it starts in a fraction of a second and takes some 60 MB.
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

_STARTUP = 120.0  # seconds within which the child has to be there, on the busiest machine
_GRACE = 5.0  # seconds after which a child that nobody waits for ends itself
_LENGTH = struct.Struct("<Q")


class DecoderProcess:
    """Calls functions of data/video_reader.py in a child process, at most `timeout` seconds each.

    Raises:
        UserError: the timeout is not positive; from a call: what the function raised, that it took too long, or that the decoder crashed.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        if not timeout > 0:
            raise UserError(f"timeout={timeout}; give a positive number of seconds, or null for none")

    def __call__(self, function: str, source: video_reader.Source, *arguments: Any, **more: Any) -> Any:
        """`video_reader.<function>(source, *arguments, **more)`."""
        child = self._running()
        try:
            _send(child.stdin.fileno(), (self.timeout, function, (source, *arguments), more))  # type: ignore[union-attr]
            fine, answer = self._receive(child, self.timeout)
        except TimeoutError:
            self.close()
            raise UserError(
                f"video file '{source}' took more than {self.timeout:g} s to decode, and its decoder was ended; "
                "take it off the list, or raise timeout"
            ) from None
        except (EOFError, OSError):
            code = self._ended(child)
            raise UserError(
                f"video file '{source}' ended its decoder ({code}); take it off the list, or try the other decoder"
            ) from None
        if not fine:
            raise UserError(answer)
        return answer

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)  # one that hangs in the kernel, on a file server that is gone, is not waited for

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
                code = self._ended(self._child)
                raise RuntimeError(f"the decoder's process did not start ({code})") from error
        return self._child

    def _ended(self, child: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        code = child.returncode
        self.close()
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    @staticmethod
    def _receive(child: subprocess.Popen[bytes], timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        descriptor = child.stdout.fileno()  # type: ignore[union-attr]

        def exactly(count: int) -> bytearray:
            data = bytearray()
            while len(data) < count:
                if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                part = os.read(descriptor, min(count - len(data), 1 << 20))
                if not part:
                    raise EOFError
                data += part
            return data

        return pickle.loads(exactly(_LENGTH.unpack(exactly(_LENGTH.size))[0]))


def _send(descriptor: int, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def serve() -> None:
    """What the child does: answers calls until its parent is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    # Control-C, and a scheduler that asks every process of a job to end, are the parent's affair.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    calls = os.fdopen(0, "rb")
    _send(answers, "ready")
    while header := calls.read(_LENGTH.size):
        timeout, function, arguments, more = pickle.loads(calls.read(_LENGTH.unpack(header)[0]))
        # Should the parent have died meanwhile, nobody would kill a child that hangs: the kernel does, by the alarm's default action.
        signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
        try:
            answer = True, getattr(video_reader, function)(*arguments, **more)
        except UserError as error:
            answer = False, str(error)
        except Exception as error:  # a decoder's own: whatever it is, this file is the cause
            answer = False, f"video file '{arguments[0]}' cannot be decoded ({type(error).__name__}: {error})"
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)
