"""The judges of Moving Sprites clips: a classifier names the object, tracking the motion, optical flow the rest."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from microcinema.evaluation import video_metrics
from microcinema.evaluation.detectors import VideoFeatures
from microcinema.pipelines.loading import ASSETS
from microcinema.pipelines.sample_folder import Sample
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.sprites.protocol import SpritesProtocol, Task
from microcinema.sprites.tracking import judge_motion
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.hashing import hash_weights

OBJECT_ATTRIBUTES = ("shape", "colour", "background", "size")


class SpriteJudge:
    """Names the attributes of clips and gives the features of the Fréchet distance; `batch_size` changes no verdict."""

    def __init__(self, classifier: SpriteClassifier, batch_size: int = 16) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.batch_size = batch_size

    @classmethod
    def load(cls, name: str | os.PathLike[str], batch_size: int = 16) -> "SpriteJudge":
        """Opens an embedded classifier by name, or one in a folder; a UserError if there is none, or it is damaged."""
        embedded = ASSETS / name / "config.json"
        folder = embedded.parent if embedded.is_file() else Path(name)
        if not (folder / "config.json").is_file():
            raise UserError(f"classifier '{name}' is neither embedded nor a folder with a config.json; check the name")
        with user_errors(f"cannot load the classifier '{folder}' ({{reason}}); get it again"):
            classifier = SpriteClassifier.from_pretrained(folder, torch_dtype=torch.float32)
        return cls(classifier, batch_size)

    @torch.inference_mode()
    def __call__(self, clips: np.ndarray) -> tuple[list[dict[str, str]], np.ndarray]:
        """Attribute names of each clip and features (n, d) float64, of clips uint8 (n, f, h, w, 3); a UserError for clips with another number
        of frames than the classifier reads."""
        names: list[dict[str, str]] = []
        features = []
        for batch in np.split(clips, range(self.batch_size, len(clips), self.batch_size)):
            video = rearrange(torch.from_numpy(batch), "b f h w c -> b f c h w").to(self.classifier.device)
            feature = self.classifier.features(video.to(self.classifier.dtype) / 127.5 - 1)
            features.append(feature.double().cpu().numpy())
            best = {key: head(feature).argmax(dim=1).tolist() for key, head in self.classifier.heads.items()}
            classes = self.classifier.config["classes"]
            names += [{key: classes[key][best[key][row]] for key in best} for row in range(len(batch))]
        return names, np.concatenate(features)


def load_video_features(weights: str, device: torch.device | str, batch_size: int) -> VideoFeatures:
    """The detector `sprites` of the zero-shot protocols: the classifier's features; errors as in `SpriteJudge.load`."""
    judge = SpriteJudge.load(weights, batch_size)
    record = {"detector": "sprites", "sha256": hash_weights(judge.classifier.to(device))}
    return VideoFeatures(lambda clips: judge(clips)[1], record)


@dataclass(frozen=True)
class Verdict:
    """Results for one clip.

    `right` has `object` for shape, colour and background together, and `speed` only if the prompt has one and the motion is right.
    """

    task: Task
    judged: dict[str, str]  # by attribute, the name that the judge gives
    right: dict[str, bool]  # by attribute, whether that is the prompt's
    measures: dict[str, float]  # in the units of `metrics.MEASURES`
    features: np.ndarray  # (d,), of the classifier

    def as_json(self) -> dict[str, object]:
        """Everything but the features."""
        truth = {key: value for key, value in asdict(self.task.sprite).items() if isinstance(value, str)}
        task = {"part": self.task.part, "index": self.task.index, "name": self.task.name, "prompt": self.task.prompt}
        return {**task, "asked": truth, "judged": self.judged, "right": self.right, "measures": self.measures}


def judge_clips(
    tasks: Sequence[Task],
    load: Callable[[Task], Sample],
    protocol: SpritesProtocol,
    judge: SpriteJudge,
    label: str,
    keyframe_index: int = 0,
) -> list[Verdict]:
    """Runs every judge on every clip.

    Args:
        load: gives the clip of a task; clips are held one batch at a time.
        label: of the progress bar; empty: no bar.
        keyframe_index: frame of a clip that is compared with its key frame.

    Raises:
        UserError: a clip of another length or size than the protocol's, or a classifier that does not know `OBJECT_ATTRIBUTES`.
    """
    if missing := set(OBJECT_ATTRIBUTES) - set(judge.classifier.config["classes"]):
        raise UserError(f"the classifier does not name {', '.join(sorted(missing))}; give one of Moving Sprites")
    expected = (protocol.num_frames, protocol.size, protocol.size, 3)
    verdicts = []
    with tqdm(total=len(tasks), desc=label, unit="clip", disable=not label) as bar:
        for start in range(0, len(tasks), judge.batch_size):
            batch = tasks[start : start + judge.batch_size]
            samples = [load(task) for task in batch]
            for task, sample in zip(batch, samples, strict=True):
                if (shape := sample.frames.shape) != expected:
                    raise UserError(f"clip {task.name} is {shape}; the protocol asks for {expected} (frames, h, w, 3)")
            attributes, features = judge(np.stack([sample.frames for sample in samples]))
            for task, sample, names, feature in zip(batch, samples, attributes, features, strict=True):
                verdicts.append(_judge_clip(task, sample, names, feature, protocol, keyframe_index))
                bar.update()
    return verdicts


def _judge_clip(
    task: Task, sample: Sample, names: dict[str, str], features: np.ndarray, protocol: SpritesProtocol, keyframe: int
) -> Verdict:
    sprite = task.sprite
    motion = judge_motion(sample.frames, protocol.fps)
    judged = {key: names[key] for key in OBJECT_ATTRIBUTES} | {"motion": motion.name, "speed": motion.speed}
    right = {key: judged[key] == getattr(sprite, key) for key in (*OBJECT_ATTRIBUTES, "motion")}
    right["object"] = right["shape"] and right["colour"] and right["background"]
    if sprite.speed and right["motion"]:
        right["speed"] = judged["speed"] == sprite.speed
    flow = video_metrics.clip_flow(sample.frames)
    psnr, ssim = video_metrics.image_fidelity(sample.frames[keyframe], sample.keyframe)
    measures = {
        "psnr": psnr,
        "ssim": ssim,
        "motion_magnitude": video_metrics.motion_magnitude(flow),
        "static": float(video_metrics.is_static(sample.frames)),
        "consistency": video_metrics.frame_consistency(sample.frames, flow),
    }
    if task.part == "image":  # the same key frame and sprite: the true flow is known
        truth = protocol.render(sprite)
        flow = video_metrics.clip_flow(sample.frames, channel="saturation")
        measures["epe"] = video_metrics.endpoint_error(flow, truth.flow, truth.masks)
        measures["epe_of_no_motion"] = video_metrics.endpoint_error(np.zeros_like(flow), truth.flow, truth.masks)
    return Verdict(task, judged, right, measures, features)
