"""Training runs whose processes can be killed: each is forked from one that has everything imported. Import as `import tiny_lives`.

The modules are imported in a server (multiprocessing's forkserver), so that a life costs a fraction of a second, and begins like a process
that has never done anything.
"""

import multiprocessing
import os
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import tiny

FORKS = multiprocessing.get_context("forkserver")
SECONDS = 300.0  # within which a life of a few steps ends on the busiest machine


def serve() -> None:
    """Before the first life: what the server has to find and to import."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    FORKS.set_forkserver_preload(["tiny_training", "microcinema.data.shards"])


def write_shards(clips: Path, folder: Path, count: int) -> str:
    """The clips of a folder of Moving Sprites, dealt out to tar files; returns their pattern."""
    folder.mkdir()
    for number, video in enumerate(sorted(clips.rglob("*.mp4"))):
        with tarfile.open(folder / f"{number % count:05d}.tar", "a") as tar:
            tar.add(video, f"{number:06d}.mp4")
            text = folder / "caption.txt"
            text.write_text(f"a red star {number}")
            tar.add(text, f"{number:06d}.txt")
            text.unlink()
    return str(folder / "*.tar")


class Counted:
    """A data set that counts, for another process to see, how many clips have been read."""

    def __init__(self, dataset: Any, count: "Synchronized[int]") -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.count.get_lock():
            self.count.value += 1
        return self.dataset[index]


def open_clips(where: str) -> Any:
    """A pattern of shards, or a folder of Moving Sprites."""
    import tiny_training

    from microcinema.data.clips import ClipDataset
    from microcinema.data.shards import ShardDataset

    shape = (tiny_training.FRAMES, 8.0, tiny.SIZE)
    if where.endswith(".tar"):
        return ShardDataset(where, *shape, lanes=2, cache_dir=Path(where).parent / "cache")
    return ClipDataset(Path(where) / "clips.csv", where, *shape)


def live(
    rank: int,
    port: int,
    processes: int,
    output_dir: Path,
    data: str,
    environment: Mapping[str, str],
    settings: Mapping[str, Any],
    count: "Synchronized[int]",
) -> None:
    """One process of a run, from its start to its end or to that of its life. What it says goes to `{output_dir}.{rank}.log`."""
    log = os.open(f"{output_dir}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of the loader's workers, as in a process that was started by itself
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **environment)
    if processes > 1:
        world = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    import tiny_training
    import torch
    from accelerate.utils import set_seed

    from microcinema.training import preemption, trainer
    from microcinema.training.settings import Settings

    torch.set_num_threads(1)
    set_seed(0)
    own = output_dir.with_name(f"{output_dir.name}-tokens-{rank}")
    own.mkdir(exist_ok=True)
    made = Settings(str(output_dir), **{**tiny_training.SMALL, "resume_from_checkpoint": "latest", **settings})
    if "ACCELERATE_USE_FSDP" in environment:
        shard_on_cpu()
    accelerator = tiny_training.accelerator(made)
    assert accelerator.num_processes == processes
    try:
        trainer.train(accelerator, tiny_training.pipeline(own), Counted(open_clips(data), count), made)
    except preemption.Preempted:
        sys.exit(preemption.EXIT_STATUS)


def shard_on_cpu() -> None:
    """Accelerate shards on GPUs alone, though torch does it on the CPU as well: lets it take this process for one with a GPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Life:
    """The processes of a run, begun.

    Args:
        processes: how many; `rank` is the number of one.
        data, settings, environment: of `live`.
    """

    def __init__(
        self,
        output_dir: Path,
        data: str,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output_dir = output_dir
        self.count = FORKS.Value("i", 0)
        self.processes = [
            FORKS.Process(
                target=live,
                args=(rank, port, processes, output_dir, data, environment or {}, settings, self.count),
                daemon=False,
            )
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came to that before the run ended."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if not any(process.is_alive() for process in self.processes):
                return False
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)
        return True

    def wait_until_read(self, clips: int) -> bool:
        """The same, until so many clips have been read."""
        return self.wait_until(lambda: self.count.value >= clips)

    def kill(self, order: list[int], pause: float) -> None:
        """SIGKILL to one rank after the other."""
        for rank in order:
            self.processes[rank].kill()
            time.sleep(pause)
        self.end()

    def end(self) -> list[int | None]:
        """Waits; the exit codes."""
        for process in self.processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """The last words of its processes."""
        logs = sorted(self.output_dir.parent.glob(f"{self.output_dir.name}.*.log"))
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
