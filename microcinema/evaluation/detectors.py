"""Detectors: networks and plain computations that map batches of clips to features or scores (I3D, C3D, CLIP, Inception v3, optical flow)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from microcinema.config.schema import Weights
from microcinema.config.types import Name, PathText, Positive, Sha256
from microcinema.evaluation import video_metrics
from microcinema.evaluation.i3d import I3D, MIN_FRAMES
from microcinema.evaluation.preprocessing import PREPARATIONS
from microcinema.evaluation.vit import VJEPA, VideoMAE
from microcinema.evaluation.weights import weight_file
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.hashing import hash_weights


@dataclass(frozen=True)
class Batch:
    """Clips to measure: `frames` uint8 (b, f, h, w, 3); the prompt of each, if it has one; key frames uint8 (b, h, w, 3), and the
    index of the frame that is compared with them."""

    frames: np.ndarray
    prompts: Sequence[str] | None = None
    keyframes: np.ndarray | None = None
    keyframe_index: int = 0

    def __len__(self) -> int:
        return len(self.frames)


Measure = Callable[[Batch], dict[str, np.ndarray]]
"""Maps a batch to named arrays with one entry per clip."""

DETECTORS = ("i3d", "i3d_torchscript", "videomae", "vjepa")
UCF101_CLASSES = 101


@dataclass(frozen=True)
class VideoDetectorSettings:
    """The network whose features the distance of videos compares, and the preprocessing of its frames.

    Args:
        detector: `i3d`, `i3d_torchscript`, `videomae` (for the content-debiased FVD), `vjepa` (for JEDi), or one that the command adds.
        weights: path or URL; a name or folder for some added detectors; None: not measured.
        sha256: required for a URL, and for TorchScript, which is code.
        preparation: one of `PREPARATIONS`; `own`: by the TorchScript itself. Added detectors ignore it.
        batch_norm_eps: of `i3d`: 1e-3 for `rgb_imagenet.pt`, 1e-5 for `i3d_pretrained_400.pt`.

    Raises:
        UserError: a preparation that the detector does not have.
    """

    detector: Name
    weights: PathText | None
    sha256: Sha256 | None = None
    preparation: Literal["own", "tf_squash", "squash", "short_side_crop", "cd_fvd"] = "squash"
    batch_norm_eps: Positive = 1e-3

    def __post_init__(self) -> None:
        if self.preparation == "own" and self.detector in ("i3d", "videomae", "vjepa"):
            raise UserError(f"preparation=own is unknown to {self.detector}; use one of {', '.join(PREPARATIONS)}")

    def load(
        self,
        device: torch.device | str,
        batch_size: int,
        added: "Mapping[str, VideoDetectorLoader] | None" = None,
        probe: Weights | None = None,
    ) -> "VideoFeatures":
        """Opens the weights; `added` are further detectors by name, `probe` is of `vjepa`. A UserError if the detector is
        unknown, or its weights are missing or another network's."""
        assert self.weights is not None
        added = added or {}
        if self.detector in added:
            return added[self.detector](self.weights, device, batch_size)
        if self.detector not in DETECTORS:
            names = ", ".join((*DETECTORS, *added))
            raise UserError(f"evaluation.video.detector={self.detector} is unknown; use one of {names}")
        if self.detector == "i3d_torchscript":
            network, sha256 = load_torchscript(self.weights, self.sha256, "evaluation.video", device)
            own = self.preparation == "own"

            def features(video: Tensor) -> Tensor:
                return network(x=video, rescale=own, resize=own, return_features=True)
        else:
            path, sha256 = weight_file(self.weights, self.sha256, "evaluation.video")
            state = read_state(path)
            if self.detector == "i3d":
                features = I3D.from_state_dict(state, self.batch_norm_eps).to(device)
            elif self.detector == "videomae":
                features = VideoMAE.from_state_dict(state).to(device)
            else:
                if probe is None or probe.weights is None:
                    raise UserError("detector=vjepa needs evaluation.probe.weights too; give ssv2-probe.pth.tar")
                path, probe_sha256 = weight_file(probe.weights, probe.sha256, "evaluation.probe")
                features = VJEPA.from_state_dict(state | read_state(path)).to(device)
        record: dict[str, Any] = {"detector": self.detector, "sha256": sha256, "preparation": self.preparation}
        if self.detector == "i3d":
            record["batch_norm_eps"] = self.batch_norm_eps
        if self.detector == "vjepa":
            record["probe_sha256"] = probe_sha256
        return VideoFeatures(_with_preparation(features, self.preparation, device), record)


@dataclass(frozen=True)
class VideoFeatures:
    """`features` (b, d) of clips by `network`, or `vjepa`, which have a distance of their own; `record` is everything that they depend on."""

    network: Callable[[np.ndarray], np.ndarray]
    record: dict[str, Any]

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        name = "vjepa" if self.record["detector"] == "vjepa" else "features"
        return {name: np.asarray(self.network(batch.frames), np.float32)}


VideoDetectorLoader = Callable[[str, torch.device | str, int], VideoFeatures]
"""Opens a detector from (weights, device, batch size)."""


def _with_preparation(
    network: Callable[[Tensor], Tensor], preparation: str, device: torch.device | str
) -> Callable[[np.ndarray], np.ndarray]:
    """A network of (b, 3, f, h, w) as a function of clips uint8 (b, f, h, w, 3)."""

    @torch.inference_mode()
    def features(clips: np.ndarray) -> np.ndarray:
        if clips.shape[1] < MIN_FRAMES:
            raise UserError(f"clips have {clips.shape[1]} frames; I3D needs {MIN_FRAMES} or more")
        frames = _pixels(clips, device, "b f h w c -> (b f) c h w")
        if preparation != "own":
            frames = PREPARATIONS[preparation](frames)
        video = rearrange(frames, "(b f) c h w -> b c f h w", b=len(clips))
        output = network(video)
        return output.reshape(len(clips), -1).float().cpu().numpy()  # the public TorchScript drops a batch axis of one

    return features


class ClassProbabilities:
    """`probabilities` (b, 101) of UCF-101's classes by C3D, from a TorchScript such as `c3d_ucf101.pt` on uint8 (b, 3, f, h, w). A UserError
    if there is no such file, or another one; from a call, if outputs are no probabilities."""

    def __init__(self, weights: str, sha256: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.network, sha256 = load_torchscript(weights, sha256, "evaluation.c3d", device)
        self.record = {"detector": "c3d", "sha256": sha256}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        video = _pixels(batch.frames, self.device, "b f h w c -> b c f h w")
        output = self.network(video).reshape(len(batch), -1).double()
        if (output < 0).any() or not torch.allclose(output.sum(dim=1), torch.ones(1).to(output), atol=1e-3):
            raise UserError("evaluation.c3d.weights gives no probabilities; give the classifier with its softmax")
        if output.shape[1] != UCF101_CLASSES:
            fault = f"evaluation.c3d.weights knows {output.shape[1]} classes, and UCF-101 has {UCF101_CLASSES}"
            raise UserError(f"{fault}; give the classifier of UCF-101")
        return {"probabilities": output.float().cpu().numpy()}


class FrameFeatures:
    """`frame_features` (b, f, d) of single frames by a TorchScript that takes uint8 (n, 3, h, w) and `return_features=True`, as NVIDIA's
    Inception v3 (`inception-2015-12-05.pt`) does. A UserError if there is no such file, or another one."""

    def __init__(self, weights: str, sha256: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.network, sha256 = load_torchscript(weights, sha256, "evaluation.inception", device)
        self.record = {"detector": "frames", "sha256": sha256}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        frames = _pixels(batch.frames, self.device, "b f h w c -> (b f) c h w")
        output = self.network(frames, return_features=True).reshape(len(frames), -1)
        return {"frame_features": rearrange(output.float().cpu().numpy(), "(b f) d -> b f d", b=len(batch))}


class ClipScores:
    """By CLIP (arXiv 2103.00020): `clipsim` (b,), the mean cosine of prompt and frame (arXiv 2104.14806), if there are prompts;
    `clip_consistency` (b,), the mean cosine of neighboring frames.

    Args:
        name: a folder, or a repository of the hub, such as `openai/clip-vit-base-patch32`; `key` of the config is for messages.

    Raises:
        UserError: not found, or not CLIP.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", key: str = "evaluation.clip") -> None:
        failure = f"cannot open {key}.weights='{name}' as CLIP ({{reason}})"
        with user_errors(f"{failure}; give a folder, or fetch it with hf download"):
            self.network = CLIPModel.from_pretrained(name).eval().requires_grad_(False).to(device)
            self.images, self.tokens = CLIPImageProcessor.from_pretrained(name), CLIPTokenizer.from_pretrained(name)
        self.device = device
        self.record = {"detector": "clip", "sha256": hash_weights(self.network)}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        frames = list(rearrange(batch.frames, "b f h w c -> (b f) h w c"))
        pixels = self.images(frames, return_tensors="pt")["pixel_values"].to(self.device)
        embedded = functional.normalize(self.network.get_image_features(pixels).pooler_output, dim=-1)
        images = rearrange(embedded, "(b f) d -> b f d", b=len(batch))
        neighbors = (images[:, 1:] * images[:, :-1]).sum(-1).mean(1)
        scores = {"clip_consistency": neighbors.float().cpu().numpy()}
        if batch.prompts is not None:
            words = self.tokens(list(batch.prompts), padding=True, truncation=True, return_tensors="pt")
            texts = functional.normalize(self.network.get_text_features(**words.to(self.device)).pooler_output, dim=-1)
            scores["clipsim"] = (images * texts[:, None]).sum(-1).mean(1).float().cpu().numpy()
        return scores


def motion(batch: Batch) -> dict[str, np.ndarray]:
    """`motion_magnitude` (b,): mean length of the optical flow, in pixels a frame."""
    values = [video_metrics.motion_magnitude(video_metrics.clip_flow(clip)) for clip in batch.frames]
    return {"motion_magnitude": np.array(values)}


def keyframe_fidelity(batch: Batch) -> dict[str, np.ndarray]:
    """`psnr` and `ssim` (b,) of the key frame's own place in the clip against the key frame; empty without key frames."""
    if batch.keyframes is None:
        return {}
    pairs = zip(batch.frames[:, batch.keyframe_index], batch.keyframes, strict=True)
    values = np.array([video_metrics.image_fidelity(frame, keyframe) for frame, keyframe in pairs])
    return {"psnr": values[:, 0], "ssim": values[:, 1]}


def load_torchscript(
    weights: str, sha256: str | None, key: str, device: torch.device | str
) -> tuple[Callable[..., Tensor], str]:
    """A TorchScript in evaluation mode, and its sha256, which is required since the file is a program. A UserError for no sha256 or another
    one, no such file, or no TorchScript."""
    path, actual = weight_file(weights, sha256, key)
    if sha256 is None:
        raise UserError(f"'{path}' is TorchScript, which is code; if you trust it, set {key}.sha256={actual}")
    with user_errors(f"'{path}' is no TorchScript ({{reason}})"):
        script = torch.jit.load(str(path), map_location=device).eval()

    def network(*inputs: Tensor, **options: Any) -> Tensor:
        with torch.jit.optimized_execution(False):  # without the fuser, which changes the numbers of the public files
            return script(*inputs, **options)

    return network, actual


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file, without what training put round their names; a UserError if there are none."""
    with user_errors(f"'{path}' holds no weights ({{reason}}); fetch it again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        keys = "model", "module", "target_encoder", "classifier"
        state = next((state[key] for key in keys if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' is not a dictionary of weights; give a file that docs/evaluation.md names")
    return {re.sub(r"^(module\.)?(backbone\.)?", "", name): value for name, value in state.items()}


def _pixels(clips: np.ndarray, device: torch.device | str, pattern: str) -> Tensor:
    return rearrange(torch.from_numpy(np.ascontiguousarray(clips)).to(device), pattern)
