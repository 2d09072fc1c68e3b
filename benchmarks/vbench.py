"""This project's dimensions of VBench beside those of the suite's own code, on the same random weights and the same videos.

    git clone https://github.com/Vchitect/VBench && pip install easydict torchvision
    PYTHONPATH=VBench OMP_NUM_THREADS=1 python -m benchmarks.vbench

Both read the same mp4 files, each with its own decoder. CLIP, DINO, the aesthetic predictor and MUSIQ are the same small networks on both sides, so that
preparation, formula and mean are compared; RAFT is the suite's here and torchvision's there. Differences are relative to one less the score.
"""

import argparse
import importlib
import re
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from benchmarks.cd_fvd import videos
from microcinema.data.video_reader import read_clip
from microcinema.data.video_writer import write_video
from microcinema.evaluation import vbench_dimensions as here
from microcinema.evaluation.vit import DINO, SIZE

FPS, FRAMES = 16, 8
_RAFT = (  # names of the suite's RAFT to those of torchvision's
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"encoder\.conv1\.", "encoder.convnormrelu.0."),
    (r"encoder\.norm1\.", "encoder.convnormrelu.1."),
    (r"(\.layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(\.layer\d\.\d)\.norm([12])\.", r"\1.convnormrelu\2.1."),
    (r"(feature|context)_encoder\.conv2\.", r"\1_encoder.conv."),
    (r"update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"\.gru\.conv([zrq])(\d)\.", r".recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


class SmallCLIP(nn.Module):
    """Called as CLIP's own code and as transformers' are; it sees small details, and so the preparation."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, stride=16)
        self.config = types.SimpleNamespace(vision_config=types.SimpleNamespace(image_size=SIZE))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).relu().mean(dim=(2, 3))

    def get_image_features(self, pixels: Tensor) -> Any:
        return types.SimpleNamespace(pooler_output=self.encode_image(pixels))


class SmallQuality(nn.Module):
    """In the place of MUSIQ: up to 100 for an image."""

    def forward(self, frame: Tensor) -> Tensor:
        return 100 * (frame.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + frame.mean(dim=(1, 2, 3))) / 2


def random_networks() -> dict[str, Any]:
    torch.manual_seed(0)
    dino, clip, head = DINO(2 * DINO.head_width, 64, 2), SmallCLIP(), nn.Linear(32, 1)
    for parameter in dino.parameters():
        nn.init.normal_(parameter, std=0.1)
    return {"dino": dino.eval(), "clip": clip.eval(), "head": head, "musiq": SmallQuality()}


def suite(*names: str) -> list[Any]:
    """Modules of the suite; what they import for their weights is not used here."""
    for name in ("clip", "pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch", "loralib", "dreamsim"):
        sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules["pyiqa.archs.musiq_arch"]).setdefault("MUSIQ", None)
    return [importlib.import_module(name) for name in names]


def write_videos(folder: Path, count: int) -> list[tuple[str, str]]:
    """(image, video): files of which no side is a multiple of a patch."""
    pairs = []
    for number, clip in enumerate(videos(3, count, FRAMES)):
        large = np.kron(clip, np.ones((1, 4, 4, 1), np.uint8))[:, :190, :250]
        noise = np.random.default_rng(number).integers(0, 60, large.shape, np.uint8)
        write_video(folder / f"{number}.mp4", large // 2 + noise, FPS, crf=10)
        Image.fromarray(np.kron(clip[0], np.ones((9, 9, 1), np.uint8))).save(folder / f"{number}.png")
        pairs.append((str(folder / f"{number}.png"), str(folder / f"{number}.mp4")))
    return pairs


@torch.no_grad()
def compare(folder: Path, count: int = 3) -> dict[str, tuple[float, float]]:
    """Of each dimension, the score here and that of the suite."""
    pairs, networks = write_videos(folder, count), random_networks()
    clip, dino, paths = networks["clip"], networks["dino"], [video for _, video in pairs]
    subject, background, aesthetic, flickering, imaging, i2v = suite(
        *(f"vbench.{name}" for name in ("subject_consistency", "background_consistency", "aesthetic_quality")),
        *("vbench.temporal_flickering", "vbench.imaging_quality", "vbench2_beta_i2v.i2v_subject"),
    )
    theirs = {
        "temporal_flickering": flickering.temporal_flickering(paths),
        "subject_consistency": subject.subject_consistency(lambda x: dino(denormalized(x)), paths, "cpu", False),
        "background_consistency": background.background_consistency(clip, None, paths, "cpu", False),
        "aesthetic_quality": aesthetic.laion_aesthetic(networks["head"], clip, paths, "cpu"),
        "imaging_quality": imaging.technical_quality(networks["musiq"], paths, "cpu"),
        "i2v_subject": i2v.i2v_subject(lambda x: dino(denormalized(x)), pairs, "cpu"),
    }
    features = {"clip": partial(here._clip_features, clip), "dino": partial(here._dino_features, dino)}
    features |= {"aesthetic": networks["head"], "aesthetic_clip": features["clip"], "musiq": networks["musiq"]}
    ours = {}
    for name in theirs.keys() - {"i2v_subject"}:
        score, *keys = here._DIMENSIONS[name]
        ours[name] = partial(score, *(features[key] for key in keys))
    scores = {name: [float(score(pixels(read_clip(path, FRAMES)))) for path in paths] for name, score in ours.items()}
    given = [(pixels(here.given_image(image)[None]), pixels(read_clip(video, FRAMES))) for image, video in pairs]
    scores["i2v_subject"] = [float(here.i2v_subject(features["dino"], video, image)) for image, video in given]
    return {name: (float(np.mean(scores[name])), float(theirs[name][0])) for name in theirs}


def pixels(frames: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(frames), "f h w c -> f c h w").float()


def denormalized(x: Tensor) -> Tensor:
    """The suite normalizes colors, and the network here does."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return x * std + mean


@torch.no_grad()
def compare_raft(folder: Path) -> dict[str, float]:
    """Largest difference of the flow of both RAFTs, relative to its largest length; the share of flows on which both decide alike, and of
    those that move."""
    (module,) = suite("vbench.dynamic_degree")
    raft_large = importlib.import_module("torchvision.models.optical_flow").raft_large
    torch.manual_seed(0)
    options = importlib.import_module("easydict").EasyDict(small=False, mixed_precision=False, alternate_corr=False)
    theirs, ours = module.RAFT(options).eval(), raft_large(weights=None).eval()
    state = {name: value for name, value in theirs.state_dict().items() if "norm3" not in name}
    for pattern, name in _RAFT:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    ours.load_state_dict(state)
    (_, path), *_ = write_videos(folder, 1)
    degree = module.DynamicDegree.__new__(module.DynamicDegree)
    degree.device, degree.model = "cpu", theirs
    frames = degree.get_frames(path)
    padded = module.InputPadder(frames[0].shape).pad(*frames[:2])
    one, other = (frame / 127.5 - 1 for frame in padded)
    flows = theirs(*padded, iters=20, test_mode=True)[1], ours(one, other, num_flow_updates=20)[-1]
    found = {"flow": float((flows[0] - flows[1]).norm(dim=1).max() / flows[0].norm(dim=1).max())}
    decisions, clip = [], pixels(read_clip(path, FRAMES))
    for factor in np.geomspace(0.02, 1, 12):  # of a flow that both compute from the difference of two frames
        degree.model = lambda a, b, iters, test_mode, f=factor: (None, f * (a - b)[:, :2])
        mine = here.dynamic_degree(lambda a, b, num_flow_updates, f=factor: [127.5 * f * (a - b)[:, :2]], clip, FPS)
        decisions.append((bool(mine), degree.infer(path)))
    return found | {"alike": float(np.mean([a == b for a, b in decisions])), "moving": np.mean(decisions)}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, (mine, yours) in compare(Path(folder)).items():
            print(f"{name:24} {mine:.6f}  VBench {yours:.6f}  relative {abs(mine - yours) / (1 - yours):.1e}")
        found = compare_raft(Path(folder))
        print(
            f"flow of RAFT differs by {found['flow']:.1e}; dynamic degree is the same in {found['alike']:.0%}, of which {found['moving']:.0%} move"
        )


if __name__ == "__main__":
    main()
