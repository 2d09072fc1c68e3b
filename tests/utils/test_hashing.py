import hashlib
import shutil
import subprocess

import pytest

from microcinema.utils.hashing import SUMS, find_fault, sha256_of, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/weights").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "empty").write_bytes(b"")
    write_checksums(tmp_path)
    return tmp_path


def test_sums_are_those_of_sha256sum(folder):
    assert sha256_of(folder / "deep/weights") == hashlib.sha256((folder / "deep/weights").read_bytes()).hexdigest()
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder).returncode == 0


def test_what_is_wrong_is_named(folder):
    assert find_fault(folder) is None
    (folder / "new").write_text("no part of it")
    assert find_fault(folder) is None
    (folder / "empty").write_text("no longer")
    assert find_fault(folder) == "empty is not as it was written"
    (folder / "deep/weights").unlink()
    assert find_fault(folder) == "deep/weights: No such file or directory"
    write_checksums(folder)  # which are not among themselves
    assert find_fault(folder) is None
