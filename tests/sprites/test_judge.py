import numpy as np

from microcinema.commands.evaluate import DETECTORS
from microcinema.evaluation.detectors import Batch, VideoDetectorSettings


def test_the_classifier_is_a_video_detector():
    detector = VideoDetectorSettings("sprites", "sprites-classifier").load("cpu", 4, DETECTORS)
    clips = np.random.default_rng(0).integers(0, 256, (3, 16, 64, 64, 3), dtype=np.uint8)
    assert detector(Batch(clips))["features"].shape == (3, 128)
    assert len(detector.record["sha256"]) == 64
