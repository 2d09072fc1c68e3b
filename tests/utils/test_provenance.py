"""The description of the code and of the machine of a run."""

import json

from microcinema.utils import provenance


def test_description_names_versions_and_commit():
    description = provenance.describe_code()
    assert set(description) == {"microcinema", "commit", "python", *provenance.LIBRARIES}
    assert description["commit"] is None or len(description["commit"].removesuffix("-dirty")) == 40


def test_each_start_of_a_run_appends_its_environment(tmp_path):
    path = tmp_path / "environment.json"
    for num_processes in (8, 16):
        provenance.append_record(path, provenance.describe_environment(num_processes))
    starts = json.loads(path.read_text())
    assert [start["num_processes"] for start in starts] == [8, 16]
    assert starts[0].keys() >= {*provenance.describe_code(), "accelerate", "cuda", "gpus", "platform", "time"}
    path.write_text("[half")  # a damaged file is replaced
    provenance.append_record(path, {"num_processes": 4})
    assert json.loads(path.read_text()) == [{"num_processes": 4}]
