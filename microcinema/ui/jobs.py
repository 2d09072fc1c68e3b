"""The queue of the studio: configs of `sample`, made one after the other by a process of their own.

A job that waits is a file in its folder, so that a server that was killed finds it again. The process is ended with the job that is
canceled, at once and with all memory that it holds; the next job starts another one.
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

JOB = "job.json"
"""The file of a job that is not done, in its folder."""
MAX_JOBS = 100
_PREVIEW_FRAMES, _PREVIEW_SHARE = 4, 0.2  # frames, and share of the time that they may take

Report = Callable[..., None]
Work = Callable[[list[str], Report], None]
"""Makes the samples of overrides of `sample`, and tells each step as a `StepFunction` (pipelines/sampler.py)."""


@dataclass
class Job:
    """A job that is not done.

    Attributes:
        overrides: of `sample`.
        state: `queued`, `running`, `failed` or `canceled`.
        message: what the process does, or the one line in which the job failed.
        preview: some frames of the clip as it forms, as the URL of a PNG.
    """

    folder: Path
    overrides: list[str]
    state: str = "queued"
    message: str = ""
    progress: float = 0.0
    preview: str = ""

    @property
    def title(self) -> str:
        """What it makes, and of which prompt."""
        values = dict(override.split("=", 1) for override in self.overrides)
        kind = "key frames" if values.get("keyframes_only") == "true" else "video"
        return f"{kind}: {values.get('prompt', '')}"

    def save(self) -> None:
        """Writes it, so that a new server finds it as it is."""
        write_json(self.folder / JOB, {"overrides": self.overrides, "state": self.state, "message": self.message})


class JobQueue:
    """Runs jobs in the order in which they came, in a thread of its own, until `close`.

    Args:
        folder: of all jobs, which have folders 0001, 0002, ... in it. Jobs of an earlier server that waited go on waiting; the one that was
            running is told as failed.
        work: a function of a module, since another process imports it.
        check: refuses overrides that are wrong with a UserError.

    Attributes:
        jobs: those that are not done, in their order.
        version: another number whenever a job has ended or come.
    """

    def __init__(self, folder: Path, work: Work, check: Callable[[list[str]], Any]):
        self.folder, self.work, self.check, self.version = folder, work, check, 0
        self.jobs: list[Job] = []
        self._changed = threading.Condition()
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False
        for file in sorted(folder.glob(f"*/{JOB}"), key=natural_key):
            with suppress(ValueError, KeyError, TypeError, OSError):  # damaged
                record = json.loads(file.read_text(encoding="utf-8"))
                job = Job(file.parent, list(record["overrides"]), record["state"], record["message"])
                if job.state == "running":
                    job.state, job.message = "failed", "the server ended while it was made; make it again"
                    job.save()
                self.jobs.append(job)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, overrides: Sequence[str]) -> Job:
        """Checks a job's config and puts it at the end of the queue; a UserError, in the line of `sample`, if it is wrong."""
        self.check([*overrides])
        with self._changed:
            if sum(job.state != "failed" for job in self.jobs) >= MAX_JOBS:
                raise UserError(f"{MAX_JOBS} jobs are waiting; wait, or cancel some")
            numbers = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
            folder = self.folder / f"{max(numbers, default=0) + 1:04d}"
            job = Job(folder, [*overrides, f"output_dir={folder}"])
            job.save()
            self.jobs.append(job)
            self._notify()
        return job

    def cancel(self, job: Job) -> None:
        """Takes a job that waits or has failed out of the queue, or ends the one that runs; its files are deleted."""
        with self._changed:
            if job in self.jobs:
                was, job.state = job.state, "canceled"
                if was == "running":
                    self._process.kill()  # which `_make` notices
                else:
                    self._remove(job)

    def close(self) -> None:
        """Ends the process; the job that it made is told as failed by the next server, and the others wait for it."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill()
            self._notify()
        self._thread.join()

    def _notify(self) -> None:
        self.version += 1
        self._changed.notify_all()

    def _remove(self, job: Job) -> None:
        self.jobs.remove(job)
        if job.state == "canceled":
            shutil.rmtree(job.folder, ignore_errors=True)
        (job.folder / JOB).unlink(missing_ok=True)
        self._notify()

    def _next(self) -> Job | None:
        return next((job for job in self.jobs if job.state == "queued"), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next())
                job = self._next()
                if self._closed or job is None:
                    return
                job.state, job.message = "running", "starting"
                with suppress(OSError):  # a full disk, which the job will tell
                    job.save()
                if self._process is None or not self._process.is_alive():
                    context = multiprocessing.get_context("spawn")
                    self._pipe, other = context.Pipe()
                    self._process = context.Process(target=_serve, args=(self.work, other), daemon=True)
                    self._process.start()
                    other.close()
            fault = self._make(job)
            with self._changed:
                if self._closed:
                    return
                if fault and job.state != "canceled":
                    job.state, job.message, job.preview = "failed", fault, ""
                    with suppress(OSError):
                        job.save()
                    self._notify()
                else:
                    self._remove(job)

    def _make(self, job: Job) -> str:
        """Has a job made; the line in which it failed, or nothing."""
        try:
            self._pipe.send(job.overrides)
            while (news := self._pipe.recv())[0] == "step":
                _, job.message, job.progress, preview = news
                job.preview = preview or job.preview
            return news[1]
        except (EOFError, OSError):
            self._process.join()
            sweep(job.folder)
            status = self._process.exitcode
            return (
                f"the process that made it has ended (status {status}); if the memory was too small, see docs/memory.md"
            )


def _serve(work: Work, pipe: Connection) -> None:
    """The process: makes the jobs that it is sent until the server is gone."""
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            overrides = pipe.recv()
            try:
                work(overrides, _reporter(pipe))
                pipe.send(("done", ""))
            except (BrokenPipeError, KeyboardInterrupt):
                raise
            except Exception as error:
                fault = error if isinstance(error, OneLineError) else disk_fault(error, None)
                line = str(fault or f"{type(error).__name__}: {first_line(error)}")
                pipe.send(("failed", " ".join(line.split())))


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
        pipe.send(("step", f"{stage}, step {step} of {steps}", step / steps, url))

    return report
