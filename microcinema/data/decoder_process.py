"""Decoding in a child process, which can be killed when a decoder written in C hangs or crashes.

Python signals and threads cannot interrupt a C function, and killing a data loader's worker ends the run. So each worker calls the functions of
data/video_reader.py in a child process, which it keeps as long as the child answers in time. The child imports no torch: it starts in a
fraction of a second and takes some 60 MB.
"""

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from microcinema.data import video_reader
from microcinema.utils.errors import MachineError, OneLineError, UserError

_STARTUP = 120.0  # seconds until the child must have started, on the busiest machine
_GRACE = 5.0  # seconds after the timeout in which a child without a parent ends itself


def decode(function: str, source: video_reader.Source, *arguments: Any, **keywords: Any) -> Any:
    """`video_reader.<function>(source, *arguments, **keywords)`.

    Raises:
        UserError: any error of a decoder, of which this file is the cause.
        MachineError: a package is missing, or the bytes of the file cannot be read.
    """
    what = f"'{source}' cannot be read, through no fault of its own"
    try:
        return getattr(video_reader, function)(source, *arguments, **keywords)
    except ImportError as error:
        raise MachineError(f"{what} ({error}); install the package, and run the command again") from error
    except Exception as error:
        try:
            with contextlib.suppress(PermissionError):
                if isinstance(source, video_reader.TarMember):
                    source.read()
                elif os.path.isfile(source):
                    Path(source).read_bytes()
        except OSError as fault:
            raise MachineError(f"{what} ({fault}); mend the disk, and run the command again") from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"video file '{source}' cannot be decoded ({type(error).__name__}: {error})") from error


class DecoderProcess:
    """Calls functions of data/video_reader.py in a child process, at most `timeout` seconds each.

    Raises:
        UserError: the timeout is not positive; from a call, the error of the function, a timeout, or a crash of the decoder.
        MachineError: from a call, as `decode`.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._owner = 0  # process that started the child
        if not timeout > 0:
            raise UserError(f"timeout={timeout}; give a positive number of seconds, or null for none")

    def __call__(self, function: str, source: video_reader.Source, *arguments: Any, **keywords: Any) -> Any:
        """`video_reader.<function>(source, *arguments, **keywords)`."""
        self._start()
        try:
            self._connection.send((self.timeout, function, (source, *arguments), keywords))
            fault, answer = self._receive(self.timeout)
        except TimeoutError:
            self.close()
            fault = f"video file '{source}' took more than {self.timeout:g} s to decode, and its decoder was killed"
            raise UserError(f"{fault}; take it off the list, or raise timeout") from None
        except (EOFError, OSError):
            fault = f"video file '{source}' crashed its decoder ({self._exit_status()})"
            raise UserError(f"{fault}; take it off the list, or try the other decoder") from None
        if fault is not None:
            raise fault(answer)
        return answer

    def close(self) -> None:
        """Kills the child; the next call starts another."""
        child, connection, self._child, self._connection = self._child, self._connection, None, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)  # not longer: it may hang in the kernel, on a file server that is gone

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None, "_connection": None}  # a worker process starts its own

    def _start(self) -> None:
        if self._owner != os.getpid():  # forked: the child is the parent's
            self._child, self._connection, self._owner = None, None, os.getpid()
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self._connection, remote = Pipe()
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({remote.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=[remote.fileno()],
            )
            remote.close()
            try:
                self._receive(_STARTUP)
            except (TimeoutError, EOFError, OSError) as error:
                raise RuntimeError(f"the decoder's process did not start ({self._exit_status()})") from error

    def _receive(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            raise TimeoutError
        return self._connection.recv()

    def _exit_status(self) -> str:
        child = self._child
        assert child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        self.close()
        code = child.returncode
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """The child's main loop: answers calls until its parent is gone."""
    connection = Connection(descriptor)
    # The parent handles Control-C and the preemption signals that a scheduler sends to every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection.send("ready")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            timeout, function, arguments, keywords = connection.recv()
            # If the parent has died, nobody kills a child that hangs, except the alarm's default action.
            signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
            answer: tuple[type[OneLineError] | None, Any]
            try:
                answer = None, decode(function, *arguments, **keywords)
            except OneLineError as error:
                answer = type(error), str(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(answer)
