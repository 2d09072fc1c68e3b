import hashlib

import pytest

from microcinema.evaluation.weights import CACHE_VARIABLE, hash_file, weight_file
from microcinema.utils.errors import UserError


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "there" / "net.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights" * 1000)
    return path


def test_a_path_is_taken_as_it_is_and_held_against_its_sha256(file):
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert hash_file(file) == sha256
    assert weight_file(str(file), None, "k") == weight_file(str(file), sha256.upper(), "k") == (file, sha256)
    with pytest.raises(UserError, match=rf"sha256 {sha256}, not {'0' * 64}.*k\.sha256"):
        weight_file(str(file), "0" * 64, "k")
    with pytest.raises(UserError, match=r"k\.weights='gone\.pt' is no file"):
        weight_file("gone.pt", None, "k")


def test_a_url_is_fetched_once(file, tmp_path):
    url, sha256 = file.as_uri(), hash_file(file)
    with pytest.raises(UserError, match=r"k\.sha256"):
        weight_file(url, None, "k")
    assert not (tmp_path / "cache").exists()
    path, found = weight_file(url, sha256, "k")
    assert path.read_bytes() == file.read_bytes() and found == sha256 and path.is_relative_to(tmp_path / "cache")
    file.unlink()
    assert weight_file(url, sha256, "k") == (path, sha256)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot fetch"):
        weight_file(url, sha256, "k")


def test_another_file_at_the_address_is_not_kept(file, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch k\.weights.*hash"):
        weight_file(file.as_uri(), "0" * 64, "k")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
