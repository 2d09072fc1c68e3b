"""From verdicts on single clips to numbers with intervals."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.evaluation.measures import KEYFRAME_PSNR, KEYFRAME_SSIM, Measure
from microcinema.evaluation.statistics import mean, proportion
from microcinema.sprites import scene
from microcinema.sprites.judge import Verdict

MEASURES = (
    Measure("object", "Object", "shape, colour and background all as asked (classifier)", "%", "higher", 1),
    Measure("motion", "Motion", "kind and direction as asked (tracking)", "%", "higher", 1),
    Measure("speed", "Speed", "as asked, among clips whose motion is right (tracking)", "%", "higher", 1),
    Measure("shape", "Shape", "as asked (classifier)", "%", "higher", 1),
    Measure("colour", "Colour", "as asked (classifier)", "%", "higher", 1),
    Measure("background", "Background", "as asked (classifier)", "%", "higher", 1),
    Measure("size", "Size", "as asked (classifier)", "%", "higher", 1),
    KEYFRAME_PSNR,
    KEYFRAME_SSIM,
    Measure("epe", "Flow error", "end-point error on the object, against the true flow", "px", "lower"),
    Measure("epe_of_no_motion", "… of a still clip", "the same error if nothing moved", "px"),
    Measure("consistency", "Consistency", "PSNR of each frame against the next one carried back", "dB", "higher", 1),
    Measure("motion_magnitude", "Motion magnitude", "mean optical flow of all pixels, per frame", "px"),
    Measure("static", "Static clips", "clips in which nothing leaves its place", "%", digits=1),
)
FRECHET = Measure(
    "frechet",
    "Fréchet distance",
    "features of the classifier, against real clips of the same attributes",
    "",
    "lower",
    2,
)


def of(key: str, verdict: Verdict) -> float | None:
    """The value of a measure for a clip, or None where it has none."""
    value = verdict.measures.get(key, verdict.right.get(key))
    return None if value is None or np.isnan(value) else float(value)


_VALUES: dict[str, Iterable[str]] = {
    "motion": scene.MOTIONS,
    "speed": scene.SPEEDS,
    "shape": scene.SHAPES,
    "colour": scene.COLOURS,
    "background": scene.BACKGROUNDS,
    "size": scene.SIZES,
}


def measure_all(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float | int]]:
    """Every measure that at least one of the clips has."""
    result = {}
    for measure in MEASURES:
        if values := [value for v in verdicts if (value := of(measure.key, v)) is not None]:
            result[measure.key] = proportion(values) if measure.unit == "%" else mean(values)
    return result


def breakdown(verdicts: Sequence[Verdict]) -> dict[str, dict[str, dict[str, Any]]]:
    """Object, motion and speed accuracy for every value of every attribute in the prompts."""

    def accuracies(group: Sequence[Verdict]) -> dict[str, Any]:
        outcomes = {key: [v.right[key] for v in group if key in v.right] for key in ("object", "motion", "speed")}
        return {key: proportion(values) for key, values in outcomes.items() if values}

    result = {}
    for key, names in _VALUES.items():
        groups = {name: [v for v in verdicts if getattr(v.task.sprite, key) == name] for name in names}
        result[key] = {name: accuracies(group) for name, group in groups.items() if group}
    return result


def confusion(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Numbers of clips by the motion of the prompt (rows) and the judged one (columns; the last: no object could be tracked)."""
    columns = [*scene.MOTIONS, ""]
    counts = Counter((verdict.task.sprite.motion, verdict.judged["motion"]) for verdict in verdicts)
    rows = [[counts[asked, judged] for judged in columns] for asked in scene.MOTIONS]
    return {"asked": list(scene.MOTIONS), "judged": columns, "counts": rows}


def distance(features: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float | None:
    """Fréchet distance between two sets of features (d,); None with fewer than two clips in one."""
    if min(len(features), len(others)) < 2:
        return None
    return frechet_distance(Moments.of(np.stack(features)), Moments.of(np.stack(others)))
