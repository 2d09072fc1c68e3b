import json
from collections.abc import Sequence

import numpy as np
import pytest

from microcinema.evaluation.generate import Sample, generate, load_sample, sample_path
from microcinema.sprites.protocol import SpritesProtocol, Task
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import FINGERPRINT

PROTOCOL = SpritesProtocol(5, 0, 1, num_frames=2, size=16)


class Renderer:
    """Makes real clips and remembers what it was asked for."""

    def __init__(self, stop_after: int | None = None):
        self.made: list[str] = []
        self.stop_after = stop_after

    def __call__(self, tasks: Sequence[Task]) -> list[Sample]:
        if self.stop_after is not None and len(self.made) >= self.stop_after:
            raise KeyboardInterrupt
        self.made += [task.name for task in tasks]
        clips = [PROTOCOL.render(task.sprite).frames for task in tasks]
        return [Sample(frames, frames[0]) for frames in clips]


def test_clips_come_back_exactly(tmp_path):
    tasks = PROTOCOL.tasks()
    assert generate(tasks, Renderer(), tmp_path, {"seed": 0}, batch_size=4, progress=False) == 6
    for task in tasks:
        sample = load_sample(tmp_path, task)
        np.testing.assert_array_equal(sample.frames, PROTOCOL.render(task.sprite).frames)
        np.testing.assert_array_equal(sample.keyframe, sample.frames[0])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    tasks = PROTOCOL.tasks()
    with pytest.raises(KeyboardInterrupt):
        generate(tasks, Renderer(stop_after=4), tmp_path, {"seed": 0}, batch_size=2, progress=False)
    rest = Renderer()
    assert generate(tasks, rest, tmp_path, {"seed": 0}, batch_size=2, progress=False) == 2
    assert rest.made == [task.name for task in tasks[4:]]
    assert generate(tasks, rest, tmp_path, {"seed": 0}, progress=False) == 0


def test_clips_of_another_model_are_refused(tmp_path):
    generate(PROTOCOL.tasks(), Renderer(), tmp_path, {"seed": 0, "steps": 5}, progress=False)
    with pytest.raises(UserError, match=r"steps was 5 and is 6.*output_dir"):
        generate(PROTOCOL.tasks(), Renderer(), tmp_path, {"seed": 0, "steps": 6}, progress=False)
    assert json.loads((tmp_path / FINGERPRINT).read_text()) == {"seed": 0, "steps": 5}


def test_missing_and_damaged_clips_are_named(tmp_path):
    task = PROTOCOL.tasks()[0]
    with pytest.raises(UserError, match="seen-00000"):
        load_sample(tmp_path, task)
    with atomic_path(sample_path(tmp_path, task)) as path:
        path.write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="seen-00000"):
        load_sample(tmp_path, task)
