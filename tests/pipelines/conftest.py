"""Fixtures of the tests of pipelines: a tiny Stable Diffusion, a video pipeline on it, and a key frame."""

import pytest

from fixtures import tiny, tiny_sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pipeline(base):
    return tiny.video_pipeline(base)


@pytest.fixture(scope="module")
def image():
    return tiny_sampling.image()
