"""One HTML page with everything in it: playing videos, key frames, verdicts, numbers, figures. Nothing is loaded from elsewhere."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from microcinema.evaluation.report import embedded_picture, embedded_video
from microcinema.pipelines.sample_folder import Sample
from microcinema.sprites.metrics import MEASURES
from microcinema.sprites.protocol import PARTS
from microcinema.utils.files import atomic_path
from microcinema.utils.templates import open_template

TEMPLATE = "report.html.jinja"
TITLES = {"seen": "Seen combinations", "heldout": "Held-out combinations", "image": "Real key frames"}

_SCALE = 3  # clips are enlarged before encoding: H.264 halves the resolution of colour, which 64 pixels cannot spare


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Writes the page, whole or not at all, of the content of `results.json` and its clips in the order of `results["clips"]`."""
    measures = {measure.key: measure for measure in MEASURES}
    clips = []
    for clip, sample in zip(results["clips"], samples, strict=True):
        enlarged = [cv2.resize(f, None, fx=_SCALE, fy=_SCALE, interpolation=cv2.INTER_LANCZOS4) for f in sample.frames]
        video = embedded_video(np.stack(enlarged), results["protocol"]["fps"])
        picture = embedded_picture(sample.keyframe)
        clips.append({**clip, "badges": _badges(clip), "video": video, "keyframe": picture})
    page = open_template(Path(__file__).with_name("templates") / TEMPLATE).render(
        results=results, clips=clips, measures=measures, titles=TITLES, meanings=PARTS
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _badges(clip: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, whether it is there, and what is there instead."""
    asked, judged, right = clip["asked"], clip["judged"], clip["right"]
    keys = [key for key in ("colour", "shape", "background", "motion", "speed") if key in right]
    return [{"text": asked[key], "right": right[key], "instead": judged[key] or "lost"} for key in keys]
