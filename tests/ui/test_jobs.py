"""The queue of the studio: one job at a time, in order; what happens to one happens to no other."""

import json
import time

import pytest

from fixtures.studio import work
from microcinema.commands.ui import check
from microcinema.config.compose import compose
from microcinema.ui import jobs
from microcinema.ui.jobs import JOB, JobQueue
from microcinema.utils.errors import UserError


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def queue(tmp_path):
    queue = JobQueue(tmp_path, work, check)
    yield queue
    queue.close()


def test_what_happens_to_a_job_happens_to_no_other(queue, tmp_path):
    """One fails, one ends its process, one is canceled while it runs and one while it waits; those between them are made, in order."""
    prompts = ["fail", "a star", "die", "a moon", "long", "a heart", "a circle"]
    added = [queue.add([f"prompt={prompt}"]) for prompt in prompts]
    assert [job.folder.name for job in added] == [f"{number:04d}" for number in range(1, 8)]
    queue.cancel(added[5])
    wait(lambda: added[4].state == "running" and added[4].message.startswith("video"))
    assert added[4].message.endswith("of 3000") and added[4].preview.startswith("data:image/png;base64,")
    start = time.monotonic()
    queue.cancel(added[4])
    wait(lambda: added[4] not in queue.jobs, 5)
    assert time.monotonic() - start < 5  # of the minutes that it takes
    wait(lambda: added[6] not in queue.jobs)
    assert [(job.title, job.state) for job in queue.jobs] == [("video: fail", "failed"), ("video: die", "failed")]
    assert queue.jobs[0].message == "the prompt says so in two lines"
    assert "(status 9)" in queue.jobs[1].message
    assert sorted(path.parent.name for path in tmp_path.glob("*/*.mp4")) == ["0002", "0004", "0007"]
    assert not added[4].folder.exists() and not added[5].folder.exists()
    order = [path.stat().st_mtime for path in sorted(tmp_path.glob("*/*.mp4"))]
    assert order == sorted(order)


def test_a_new_server_goes_on_with_the_jobs_that_waited(tmp_path):
    for number, state in (("0001", "running"), ("0002", "queued"), ("0003", "queued")):
        folder = tmp_path / number
        folder.mkdir()
        record = {"overrides": [f"prompt={number}", f"output_dir={folder}"], "state": state, "message": ""}
        (folder / JOB).write_text(json.dumps(record))
    (tmp_path / "0004").mkdir()
    (tmp_path / "0004" / JOB).write_text("{")  # of a full disk
    queue = JobQueue(tmp_path, work, check)
    try:
        assert queue.jobs[0].message == "the server ended while it was made; make it again"
        wait(lambda: len(queue.jobs) == 1)
        assert [path.parent.name for path in sorted(tmp_path.glob("*/*.mp4"))] == ["0002", "0003"]
        assert queue.add(["prompt=a star"]).folder.name == "0005"
    finally:
        queue.close()


def test_a_bad_value_is_refused_in_the_line_of_the_command(queue, tmp_path):
    with pytest.raises(UserError) as expected:
        compose("sample", ["prompt=a star", "seed=-1"])
    with pytest.raises(UserError) as refused:
        queue.add(["prompt=a star", "seed=-1"])
    assert str(refused.value) == str(expected.value) and list(tmp_path.iterdir()) == []


def test_the_queue_is_limited(queue, monkeypatch):
    assert jobs.MAX_JOBS >= 50
    monkeypatch.setattr(jobs, "MAX_JOBS", 3)
    added = [queue.add(["prompt=long"]) for _ in range(3)]
    with pytest.raises(UserError, match="3 jobs are waiting"):
        queue.add(["prompt=a star"])
    for job in reversed(added):
        queue.cancel(job)
    queue.add(["prompt=a star"])
