"""The benchmark of the start."""

import subprocess

import pytest

from benchmarks import startup


def test_the_processor_time_of_a_process_counts_and_its_failure_is_told(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    assert 0.4 < startup.processor_seconds(["-c", busy], tmp_path) < 2
    assert startup.processor_seconds(["-c", "import time; time.sleep(0.5)"], tmp_path) < 0.4
    with pytest.raises(subprocess.CalledProcessError) as failure:
        startup.processor_seconds(["-c", "raise SystemExit('no such model')"], tmp_path)
    assert failure.value.stderr.strip() == b"no such model"


@pytest.mark.slow
def test_the_first_step_of_a_video_is_reached(tmp_path):
    assert startup.processor_seconds(list(startup.COMMANDS.values())[-1], tmp_path) > 1
