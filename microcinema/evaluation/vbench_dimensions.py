"""Dimensions of VBench (arXiv 2311.17982) and VBench-I2V (arXiv 2411.13503) that are computed here: they need no weights, or weights given by path.

Formulas and preparation of frames are those of the suite's code; what it does in half precision on a GPU is done in single precision. Each takes its
networks, a video, float (f, 3, h, w) with the values of bytes, and the image that the model was given, (1, 3, 224, 224) alike, if there is one.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from microcinema.config.schema import VBenchEvaluation, Weights
from microcinema.data.images import open_image
from microcinema.evaluation.detectors import Batch, ClipScores, Measure, read_state
from microcinema.evaluation.vit import DINO, SIZE
from microcinema.evaluation.weights import weight_file
from microcinema.utils.errors import user_errors

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP
Network = Callable[..., Tensor]
Opened = tuple[Measure, dict[str, Any]]


def open_dimension(name: str, settings: VBenchEvaluation, fps: float, device: torch.device | str) -> Opened | str:
    """A measure of videos with `fps`, where key frames are the given images, and what it depends on; or why it is not computed here. A UserError
    if weights are missing or another network's."""
    if name not in _DIMENSIONS:
        return _ELSEWHERE.get(name, "its networks are in the suite's code only")
    score, *keys = _DIMENSIONS[name]
    if missing := [f"evaluation.{key}.weights" for key in keys if getattr(settings, key).weights is None]:
        return f"{' and '.join(missing)} not set"
    opened = [_open(key, getattr(settings, key), device) for key in keys]
    networks, options = [network for network, _ in opened], {"fps": fps} if score is dynamic_degree else {}

    def pixels(frames: np.ndarray) -> Tensor:
        return rearrange(torch.from_numpy(frames).to(device), "f h w c -> f c h w").float()

    @torch.inference_mode()
    def measure(batch: Batch) -> dict[str, np.ndarray]:
        images = () if batch.keyframes is None else (batch.keyframes[:, None],)
        clips = zip(batch.frames, *images, strict=True)
        return {name: np.array([float(score(*networks, *map(pixels, clip), **options)) for clip in clips])}

    return measure, {"dimension": name, **{key: sha256 for key, (_, sha256) in zip(keys, opened, strict=True)}}


def _open(key: str, given: Weights, device: torch.device | str) -> tuple[Network, str]:
    """A network and the sha256 of its weights."""
    source, place = str(given.weights), f"evaluation.{key}"
    if key in ("clip", "aesthetic_clip"):
        clip = ClipScores(source, device, place)
        return partial(_clip_features, clip.network), clip.record["sha256"]
    path, sha256 = weight_file(source, given.sha256, place)
    state = read_state(path)
    with user_errors(f"{place}.weights='{path}' cannot be opened ({{reason}}); see docs/evaluation.md"):
        network = _NETWORKS[key](state)
        network.load_state_dict(state)
    network.eval().requires_grad_(False).to(device)
    return partial(_dino_features, network) if key == "dino" else network, sha256


def given_image(path: Any) -> np.ndarray:
    """An image of the suite, uint8 (224, 224, 3), scaled by Pillow's bicubic and cropped; a UserError if it cannot be read."""
    image = open_image(path)
    width, height = (int(256 * length / min(image.size)) for length in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[None]
    return _cropped(torch.tensor(pixels), SIZE)[0].permute(1, 2, 0).numpy()


def _dino_features(network: Network, video: Tensor) -> Tensor:
    return F.normalize(network(video / 255), dim=-1)


def _clip_features(network: Any, video: Tensor) -> Tensor:
    """Of frames as the suite prepares them: bicubic without antialiasing, cropped."""
    side = network.config.vision_config.image_size
    pixels = _cropped(_resized(video, side, min, "bicubic"), side) / 255
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return F.normalize(network.get_image_features((pixels - mean) / std).pooler_output, dim=-1)


def consistency(features: Tensor) -> Tensor:
    """Of unit vectors (f, d): mean over the frames but the first of the cosines with the first and with the one before; negative ones count 0."""
    return ((features[1:] @ features[0]).clamp(min=0) + _neighbors(features)).mean() / 2


def _neighbors(features: Tensor) -> Tensor:
    return (features[1:] * features[:-1]).sum(-1).clamp(min=0)


def i2v_subject(dino: Network, video: Tensor, image: Tensor) -> Tensor:
    """0.4 of the largest cosine of a frame with the given image, 0.3 of the mean and 0.3 of the smallest of neighboring frames, by DINO."""
    frames = _cropped(_resized(video, 256, min, "bicubic", antialias=True), SIZE)
    neighbors = _neighbors(features := dino(frames))
    return 0.4 * (features @ dino(image)[0]).clamp(min=0).max() + 0.3 * neighbors.mean() + 0.3 * neighbors.min()


def imaging_quality(musiq: Network, video: Tensor) -> Tensor:
    """Mean over frames, of at most 512 pixels, of MUSIQ (arXiv 2108.05997) trained on SPAQ, whose scale ends at 100."""
    video = _resized(video, min(512, max(video.shape[2:])), max, "bilinear") / 255
    return torch.stack([musiq(frame[None]).mean() for frame in video]).mean() / 100


def dynamic_degree(raft: Network, video: Tensor, fps: float) -> Tensor:
    """1 if enough pairs of frames, taken at about 8 a second, move: if the 5 % longest vectors of RAFT's flow are longer than 6 pixels in 256."""
    frames = video[:: max(1, round(fps / 8))]
    least, needed = 6 * min(frames.shape[2:]) / 256, round(4 * len(frames) / 16)
    height, width = (-size % 8 for size in frames.shape[2:])
    padding = width // 2, width - width // 2, height // 2, height - height // 2
    frames = F.pad(frames, padding, mode="replicate") / 127.5 - 1
    pairs = zip(frames[:-1, None], frames[1:, None], strict=True)
    lengths = [raft(*pair, num_flow_updates=20)[-1][0].norm(dim=0).flatten() for pair in pairs]
    moving = [float(length.topk(int(0.05 * len(length))).values.mean()) > least for length in lengths]
    return torch.tensor(float(bool(moving) and sum(moving) >= needed))


def _resized(video: Tensor, side: int, of: Callable[..., int], mode: str, antialias: bool = False) -> Tensor:
    """The shorter or the longer side scaled to `side`, and the other in proportion, rounded down as torchvision does."""
    size = [int(side * length / of(video.shape[2:])) for length in video.shape[2:]]
    return F.interpolate(video, size=size, mode=mode, align_corners=False, antialias=antialias)


def _cropped(video: Tensor, side: int) -> Tensor:
    top, left = (round((length - side) / 2) for length in video.shape[2:])
    return video[:, :, top : top + side, left : left + side]


_DIMENSIONS: dict[str, tuple[Any, ...]] = {  # with the keys of their networks
    "temporal_flickering": (lambda video: 1 - video.diff(dim=0).abs().mean() / 255,),
    "subject_consistency": (lambda dino, video: consistency(dino(_resized(video, SIZE, min, "bilinear"))), "dino"),
    "background_consistency": (lambda clip, video: consistency(clip(video)), "clip"),
    "aesthetic_quality": (lambda head, clip, video: head(clip(video)).mean() / 10, "aesthetic", "aesthetic_clip"),
    "i2v_subject": (i2v_subject, "dino"),
    "imaging_quality": (imaging_quality, "musiq"),
    "dynamic_degree": (dynamic_degree, "raft"),
}
_NETWORKS: dict[str, Callable[[dict[str, Tensor]], nn.Module]] = {  # whose files are state dictionaries
    "dino": DINO.from_state_dict,
    "aesthetic": lambda state: nn.Linear(state["weight"].shape[1], 1),
    "musiq": lambda _: import_module("pyiqa.archs.musiq_arch").MUSIQ(pretrained=False),
    "raft": lambda _: import_module("torchvision.models.optical_flow").raft_large(weights=None),
}
_ELSEWHERE = {
    "motion_smoothness": "its network AMT is in no maintained library",
    "i2v_background": "its network DreamSim is in its own package only",
    "camera_motion": "its network CoTracker is in research code only",
}
