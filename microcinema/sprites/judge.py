"""What every judge says of every clip of the Moving Sprites protocol."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from microcinema.evaluation import video_metrics
from microcinema.evaluation.detectors import SpriteJudge
from microcinema.evaluation.generate import Sample
from microcinema.sprites import scene
from microcinema.sprites.protocol import SpritesProtocol, Task
from microcinema.sprites.tracking import judge_motion
from microcinema.utils.errors import UserError

LOOKS = ("shape", "colour", "background", "size")


@dataclass(frozen=True)
class Verdict:
    """Of one clip.

    `judged`: attribute to the name that the judge gives it. `right`: whether that is what was asked for; `object` means shape,
    colour and background together; no `speed` where none was asked for or the motion is another one. `measures`: numbers in the
    units of `summary.MEASURES`. `features` (d,) of the classifier.
    """

    task: Task
    judged: dict[str, str]
    right: dict[str, bool]
    measures: dict[str, float]
    features: np.ndarray

    def as_json(self) -> dict[str, object]:
        """Everything but the features."""
        truth = {key: value for key, value in asdict(self.task.sprite).items() if isinstance(value, str)}
        place = {"part": self.task.part, "index": self.task.index, "name": self.task.name, "prompt": self.task.prompt}
        return {**place, "asked": truth, "judged": self.judged, "right": self.right, "measures": self.measures}


def judge_clips(
    tasks: Sequence[Task],
    load: Callable[[Task], Sample],
    protocol: SpritesProtocol,
    judge: SpriteJudge,
    label: str,
    progress: bool = True,
) -> list[Verdict]:
    """Runs every judge on every clip.

    Args:
        load: gives the clip of a task; clips are held one batch at a time.
        label: of the progress bar.

    Raises:
        UserError: a clip of another length or size than the protocol's, or a classifier that does not know `LOOKS`.
    """
    if missing := set(LOOKS) - set(judge.classifier.config["classes"]):
        raise UserError(f"the classifier does not name {', '.join(sorted(missing))}; give one of Moving Sprites")
    verdicts = []
    with tqdm(total=len(tasks), desc=label, unit="clip", disable=not progress) as bar:
        for batch in _batches(tasks, judge.batch_size):
            samples = [load(task) for task in batch]
            for task, sample in zip(batch, samples, strict=True):
                _check_shape(task, sample, protocol)
            looks, features = judge(np.stack([sample.frames for sample in samples]))
            for task, sample, look, feature in zip(batch, samples, looks, features, strict=True):
                verdicts.append(_judge_clip(task, sample, look, feature, protocol))
                bar.update()
    return verdicts


def _batches(tasks: Sequence[Task], size: int) -> Iterable[Sequence[Task]]:
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


def _check_shape(task: Task, sample: Sample, protocol: SpritesProtocol) -> None:
    wanted = (protocol.num_frames, protocol.size, protocol.size, 3)
    if sample.frames.shape != wanted:
        raise UserError(f"clip {task.name} is {sample.frames.shape}; the protocol asks for {wanted} (frames, h, w, 3)")


def _judge_clip(
    task: Task, sample: Sample, look: dict[str, str], features: np.ndarray, protocol: SpritesProtocol
) -> Verdict:
    asked = task.sprite
    motion = judge_motion(sample.frames, protocol.fps)
    judged = {key: look[key] for key in LOOKS} | {"motion": motion.name, "speed": motion.speed}
    right = {key: judged[key] == getattr(asked, key) for key in (*LOOKS, "motion")}
    right["object"] = right["shape"] and right["colour"] and right["background"]
    if asked.speed and right["motion"]:
        right["speed"] = judged["speed"] == asked.speed
    flow = video_metrics.clip_flow(sample.frames)
    psnr, ssim = video_metrics.image_fidelity(sample.frames[0], sample.keyframe)
    measures = {
        "psnr": psnr,
        "ssim": ssim,
        "motion_magnitude": video_metrics.motion_magnitude(flow),
        "static": float(video_metrics.is_static(sample.frames)),
        "consistency": video_metrics.frame_consistency(sample.frames, flow),
    }
    if task.part == "image":  # the same first frame and sprite: the true flow is known
        measures |= _flow_errors(asked, sample.frames, protocol)
    return Verdict(task, judged, right, measures, features)


def _flow_errors(sprite: scene.Sprite, frames: np.ndarray, protocol: SpritesProtocol) -> dict[str, float]:
    truth = protocol.render(sprite)
    found = video_metrics.clip_flow(frames, channel="saturation")
    return {
        "epe": video_metrics.endpoint_error(found, truth.flow, truth.masks),
        "epe_of_no_motion": video_metrics.endpoint_error(np.zeros_like(truth.flow), truth.flow, truth.masks),
    }
