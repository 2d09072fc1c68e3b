"""This project's JEDi beside that of videojedi, on the same random weights of V-JEPA and its probe, and the same videos.

pip install --no-deps videojedi vjepa && pip install scikit-learn
OMP_NUM_THREADS=1 python -m benchmarks.jedi
"""

import argparse
import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

from benchmarks.cd_fvd import relative, videos
from microcinema.evaluation.frechet import Moments, jedi_distance
from microcinema.evaluation.preprocessing import PREPARATIONS
from microcinema.evaluation.vit import FRAMES, SIZE, TUBELET, VJEPA

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as videojedi's class normalizes


def public(depth: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """V-JEPA and the classifier with its pooler, as videojedi builds them, narrower and with random weights."""
    transformers = importlib.import_module("vjepa.models.vision_transformer")
    classifiers = importlib.import_module("vjepa.models.attentive_pooler")
    torch.manual_seed(0)
    shape = {"embed_dim": 2 * VJEPA.head_width, "num_heads": 2}
    video = {"img_size": SIZE, "num_frames": FRAMES, "tubelet_size": TUBELET, "uniform_power": True}
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    encoder = transformers.VisionTransformer(**shape, **video, depth=depth, qkv_bias=True, norm_layer=norm)
    classifier = classifiers.AttentiveClassifier(**shape, depth=1, num_classes=9)
    for parameter in (*encoder.blocks.parameters(), *classifier.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval(), classifier.eval()


def mmd_poly(one: np.ndarray, other: np.ndarray) -> float:
    """The number of videojedi from features; its module is read alone, since its package wants torchvision."""
    package = importlib.util.find_spec("videojedi")
    assert package is not None and package.submodule_search_locations is not None
    module = types.ModuleType("videojedi")
    module.__path__ = [str(Path(folder)) for folder in package.submodule_search_locations]
    sys.modules.setdefault("videojedi", module)
    return importlib.import_module("videojedi.mmd_polynomial").mmd_poly(one, other, degree=2, coef0=0) * 100


@torch.inference_mode()
def compare(count: int, depth: int = 3) -> dict[str, float]:
    """Both numbers of two sets of `count` videos, and how far each step differs: features in standard deviations, distance relatively."""
    encoder, classifier = public(depth)
    ours = VJEPA.from_state_dict({**encoder.state_dict(), **classifier.state_dict()})
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    mine, theirs = [], []
    for seed in (1, 2):
        flat = torch.from_numpy(videos(seed, count, FRAMES)).flatten(0, 1).permute(0, 3, 1, 2)
        clips = PREPARATIONS["squash"](flat).unflatten(0, (count, FRAMES)).transpose(1, 2)
        mine.append(np.concatenate([ours(clip[None]).double().numpy() for clip in clips]))
        pooled = [classifier.pooler(encoder(((clip[None] + 1) / 2 - mean) / std)).squeeze(1) for clip in clips]
        theirs.append(torch.cat(pooled).double().numpy())
    here, there = jedi_distance(*map(Moments.of, mine)), mmd_poly(*theirs)
    return {
        "here": here,
        "videojedi": there,
        "end_to_end": relative(here, there),
        "features": float(np.abs(mine[0] - theirs[0]).max() / theirs[0].std()),
        "distance": relative(jedi_distance(*map(Moments.of, theirs)), there),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6, help="videos of each of two sets")
    found = compare(parser.parse_args().clips)
    print(f"JEDi {found['here']:.6f}  videojedi {found['videojedi']:.6f}  relative {found['end_to_end']:.1e}")
    print(
        f"features differ by {found['features']:.1e} standard deviations; distance of the same: {found['distance']:.1e}"
    )


if __name__ == "__main__":
    main()
