"""Real processes of a distributed run at the price of one start: a server imports everything once and forks them. Import as `import tiny_processes`.

Each child is a process as torchrun would start it, with its rank in the environment, that runs a command of `microcinema` on the CPU.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and what it said on stdout and stderr."""

    status: int
    said: str


class Processes:
    """The server. To be closed at the end.

    Args:
        folder: for what the processes say.
    """

    def __init__(self, folder: str | Path) -> None:
        # What a test patches is not patched there: the server is a fresh interpreter.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(
        self, arguments: Sequence[str], processes: int = 1, kill_after: int | None = None, within: str | Path = "."
    ) -> list[Ended]:
        """Runs `microcinema <arguments>` in so many processes; one that fails takes the others with it, as with torchrun.

        Args:
            kill_after: files, also hidden ones, that appear in the folder `within` before all processes are killed at once.
        """
        request = {
            "arguments": list(arguments),
            "processes": processes,
            "kill_after": kill_after,
            "within": str(within),
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return [Ended(**each) for each in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        self._server.kill()  # it has no children between two runs, and takes seconds to unload what it has imported
        self._server.wait()


def _serve(folder: Path) -> None:
    import torch

    from microcinema.config import compose
    from microcinema.pipelines.base import load_base

    torch.set_num_threads(1)
    load_base("sprites-base")  # what is imported late is here then
    compose("train")
    for line in sys.stdin:
        answer = _run(folder, **json.loads(line))
        os.write(_ANSWERS, (json.dumps(answer) + "\n").encode())


def _run(
    folder: Path, arguments: list[str], processes: int, kill_after: int | None, within: str
) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setsid()
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _be(folder / f"{rank}.txt", arguments)
        children[child] = rank
    status: dict[int, int] = {}
    seen: set[str] = set()
    while len(status) < processes:
        for child, rank in children.items():
            if rank not in status:
                ended, code = os.waitpid(child, os.WNOHANG)
                if ended:
                    status[rank] = os.waitstatus_to_exitcode(code)
        if kill_after is not None and os.path.isdir(within):
            seen |= set(os.listdir(within))
        if any(status.values()) or (kill_after is not None and len(seen) >= kill_after):
            for child, rank in children.items():
                if rank not in status:
                    os.killpg(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.001)
    return [{"status": status[rank], "said": (folder / f"{rank}.txt").read_text()} for rank in range(processes)]


def _be(output: Path, arguments: list[str]) -> None:
    """What a child does; it does not return."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    from microcinema.cli import main

    code = 1
    try:
        code = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _ANSWERS = os.dup(1)
    os.dup2(2, 1)  # the server's own words are no answers
    _serve(Path(sys.argv[1]))
