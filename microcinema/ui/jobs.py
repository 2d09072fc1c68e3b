"""The queue of the studio: configs of `sample`, made one after the other by a process of their own.

A job that is not done is a file in its folder, where a new server finds it. With a job that is canceled its process ends, at once and
with all memory that it holds; the next job starts another one.
"""

import base64
import io
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microcinema.utils.errors import OneLineError, UserError, disk_fault, first_line
from microcinema.utils.files import natural_key, sweep, write_json

JOB, MAX_JOBS = "job.json", 100
_PREVIEW_FRAMES, _PREVIEW_SHARE = 4, 0.2  # and of the time that they may take
Report = Callable[..., None]
"""A `StepFunction` (pipelines/sampler.py)."""


@dataclass
class Job:
    """A job that is not done: `queued`, `running`, `failed` or `canceled`, with what happens in it or the line in which it failed."""

    folder: Path
    overrides: list[str]
    state: str = "queued"
    message: str = ""
    progress: float = 0.0
    preview: str = ""  # the URL of a PNG

    @property
    def title(self) -> str:
        """What it makes, and of which prompt."""
        values = dict(override.split("=", 1) for override in self.overrides)
        return f"{'key frames' if 'keyframes_only' in values else 'video'}: {values.get('prompt', '')}"

    def save(self) -> None:
        """Writes its file, unless the disk is full, which the job will tell."""
        with suppress(OSError):
            write_json(self.folder / JOB, {"overrides": self.overrides, "state": self.state, "message": self.message})


class JobQueue:
    """Makes jobs in the order in which they came, in folders 0001, 0002, ...; those of an earlier server that waited go on waiting.

    Args:
        work: makes the samples of overrides and reports each step; a function of a module, since another process imports it.
        check: refuses overrides that are wrong with a UserError.

    Attributes:
        jobs: those that are not done, in their order.
        version: another number whenever a job has come or gone.
    """

    def __init__(self, folder: Path, work: Callable[[list[str], Report], None], check: Callable[[list[str]], Any]):
        self.folder, self.work, self.check, self.version = folder, work, check, 0
        self.jobs: list[Job] = []
        self._changed, self._closed = threading.Condition(), False
        self._process: Any = None
        self._pipe: Any = None
        for file in sorted(folder.glob(f"*/{JOB}"), key=natural_key):
            with suppress(ValueError, KeyError, TypeError, OSError):  # damaged
                record = json.loads(file.read_text(encoding="utf-8"))
                self.jobs.append(Job(file.parent, list(record["overrides"]), record["state"], record["message"]))
                if record["state"] == "running":
                    self._end(self.jobs[-1], "the server ended while it was made; make it again")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, overrides: Sequence[str]) -> Job:
        """Puts a job at the end; a UserError if it is wrong, or too many wait."""
        self.check([*overrides])
        with self._changed:
            if sum(job.state != "failed" for job in self.jobs) >= MAX_JOBS:
                raise UserError(f"{MAX_JOBS} jobs are waiting; wait, or clear the queue")
            numbers = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
            folder = self.folder / f"{max(numbers, default=0) + 1:04d}"
            self.jobs.append(Job(folder, [*overrides, f"output_dir={folder}"]))
            self.jobs[-1].save()
            self._notify()
            return self.jobs[-1]

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue, and deletes its files; the process of one that runs is killed."""
        with self._changed:
            if job.state == "running":
                self._process.kill()  # which `_run` notices
                job.state = "canceled"
            elif job in self.jobs:
                job.state = "canceled"
                self._end(job)

    def close(self) -> None:
        """Kills the process: the next server tells the job that it made as failed, and goes on with the others."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill()
            self._notify()
        self._thread.join()

    def _notify(self) -> None:
        self.version += 1
        self._changed.notify_all()

    def _end(self, job: Job, fault: str = "") -> None:
        if fault and job.state != "canceled":
            job.state, job.message, job.preview = "failed", fault, ""
            job.save()
        else:
            self.jobs.remove(job)
            (job.folder / JOB).unlink(missing_ok=True)
            if job.state == "canceled":
                shutil.rmtree(job.folder, ignore_errors=True)
        with self._changed:
            self._notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(job.state == "queued" for job in self.jobs))
                if self._closed:
                    return
                job = next(job for job in self.jobs if job.state == "queued")
                job.state, job.message = "running", "starting"
                job.save()
                if self._process is None:
                    context = multiprocessing.get_context("spawn")
                    self._pipe, other = context.Pipe()
                    self._process = context.Process(target=_serve, args=(self.work, other), daemon=True)
                    self._process.start()
                    other.close()
            fault = self._make(job)
            with self._changed:
                if self._closed:
                    return
                if job.state == "canceled" or not self._process.is_alive():
                    self._process.join()
                    self._process = None
                self._end(job, fault)

    def _make(self, job: Job) -> str:
        """The line in which a job failed, or nothing."""
        try:
            self._pipe.send(job.overrides)
            while len(news := self._pipe.recv()) > 1:
                job.message, job.progress, preview = news
                job.preview = preview or job.preview
            return news[0]
        except (EOFError, OSError):
            self._process.join()
            sweep(job.folder)
            return f"its process has ended (status {self._process.exitcode}); if memory was short, see docs/memory.md"


def _serve(work: Callable[[list[str], Report], None], pipe: Connection) -> None:
    """The process: makes the jobs that it is sent until the server is gone."""
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            fault, overrides = "", pipe.recv()
            try:
                work(overrides, _reporter(pipe))
            except BrokenPipeError:
                return
            except Exception as error:
                own = error if isinstance(error, OneLineError) else disk_fault(error, None)
                fault = " ".join(str(own or f"{type(error).__name__}: {first_line(error)}").split())
            pipe.send((fault,))


def _reporter(pipe: Connection) -> Report:
    spent, start = 0.0, time.perf_counter()

    def report(stage: str, step: int, steps: int, preview: Callable[[int], np.ndarray] | None) -> None:
        nonlocal spent
        url, before = "", time.perf_counter()
        if preview is not None and spent <= _PREVIEW_SHARE * (before - start):
            image, file = Image.fromarray(np.concatenate(list(preview(_PREVIEW_FRAMES)), axis=1)), io.BytesIO()
            image.thumbnail((1024, 512))
            image.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            spent += time.perf_counter() - before
        pipe.send((f"{stage}, step {step} of {steps}", step / steps, url))

    return report
