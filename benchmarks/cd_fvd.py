"""This project's I3D and Fréchet distance beside cd-fvd's, on the same random weights and the same videos: numbers, then throughput.

    pip install --no-deps cd-fvd requests
    OMP_NUM_THREADS=1 python -m benchmarks.cd_fvd

The Fréchet distance and the preparation of frames are compared as cd-fvd computes them: where it is given arrays (`squash`) and where it
reads files (`cd_fvd`).
"""

import argparse
import functools
import importlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.evaluation.i3d import I3D
from microcinema.evaluation.preprocessing import PREPARATIONS
from microcinema.evaluation.vit import FRAMES, SIZE, TUBELET, VideoMAE
from microcinema.sprites import scene

EPS = 1e-5  # of the batch norms in cd-fvd


def cd_fvd() -> dict[str, Any]:
    """Its parts that need neither torchvision nor its weights."""
    # torchvision is imported for a listing of clips that is not used here.
    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.video_utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules["torchvision.datasets.video_utils"]).setdefault("VideoClips", None)
    i3d = importlib.import_module("cdfvd.third_party.i3d.pytorch_i3d")
    utils = importlib.import_module("cdfvd.third_party.i3d.utils")
    return {
        "network": i3d.InceptionI3d,
        "prepare": utils.preprocess_i3d,
        "frechet": utils.frechet_distance,
        "read": importlib.import_module("cdfvd.utils.data_utils").preprocess,
        "statistics": importlib.import_module("cdfvd.utils.metric_utils").FeatureStats,
    }


def random_weights(network: torch.nn.Module) -> torch.nn.Module:
    """Under which clips differ: the statistics of the norms are not those of a fresh network."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif value.ndim == 5:
            torch.nn.init.kaiming_normal_(value)
    return network.eval().requires_grad_(False)


def videos(seed: int, count: int, frames: int) -> np.ndarray:
    """Real Moving Sprites clips, uint8 (count, frames, 48, 64, 3): not square, so that crops matter."""
    drawn = [scene.sample_attributes(seed, index) for index in range(count)]
    return np.stack([scene.render(sprite, frames).frames[:, 8:56] for sprite in drawn])


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def compare(count: int, frames: int) -> dict[str, Any]:
    """FVD of both by preparation, and the largest relative difference in each step.

    Returns:
        `fvd`: preparation to this project's FVD; `theirs`: to cd-fvd's, for the two that it has; `features`: largest difference of
        features from the same pixels, relative to their standard deviation; `statistics`: relative difference of the distance from the same
        features, for both divisors; `end_to_end`: of the distance from the same videos, by preparation.
    """
    other = cd_fvd()
    theirs = random_weights(other["network"](400))
    ours = I3D.from_state_dict(theirs.state_dict(), EPS)
    sets = [videos(seed, count, frames) for seed in (1, 2)]

    def read(clip: np.ndarray) -> np.ndarray:
        """As cd-fvd reads files: float, then cut off to bytes."""
        video = other["read"](torch.from_numpy(clip), 256)["video"]
        return (video * 255).byte().permute(1, 2, 3, 0).numpy()

    @torch.inference_mode()
    def features(network: torch.nn.Module, prepared: torch.Tensor) -> np.ndarray:
        return torch.cat([network(clip[None]) for clip in prepared]).double().numpy()

    def own(clips: np.ndarray, name: str) -> torch.Tensor:
        flat = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2)
        return PREPARATIONS[name](flat).unflatten(0, clips.shape[:2]).transpose(1, 2)

    def distance(one: np.ndarray, two: np.ndarray, ddof: int) -> float:
        return frechet_distance(Moments.of(one), Moments.of(two), ddof)

    found: dict[str, Any] = {"fvd": {}, "theirs": {}, "end_to_end": {}}
    for name in PREPARATIONS:
        mine = [features(ours, own(clips, name)) for clips in sets]
        found["fvd"][name] = distance(*mine, ddof=0)
        if name not in ("squash", "cd_fvd"):
            continue
        given = sets if name == "squash" else [np.stack([read(clip) for clip in clips]) for clips in sets]
        yours = [features(theirs, other["prepare"](clips)) for clips in given]
        found["theirs"][name] = _distance(yours, other["statistics"])
        found["end_to_end"][name] = relative(found["fvd"][name], found["theirs"][name])
    pixels = other["prepare"](sets[0])
    same = features(ours, pixels), features(theirs, pixels)
    found["features"] = float(np.abs(same[0] - same[1]).max() / same[1].std())
    unbiased = other["frechet"](*(torch.from_numpy(part) for part in yours)).item()
    found["statistics"] = {
        1: relative(distance(*yours, ddof=1), unbiased),
        0: relative(distance(*yours, ddof=0), found["theirs"]["cd_fvd"]),
    }
    return found


def compare_videomae() -> float:
    """Largest difference of features by VideoMAE v2 of both, from the same random weights and clips, relative to their standard deviation."""
    cd_fvd()
    public = importlib.import_module("cdfvd.third_party.VideoMAEv2.videomaev2_finetune")
    torch.manual_seed(0)
    shape = {"embed_dim": 2 * VideoMAE.head_width, "depth": 3, "num_heads": 2, "mlp_ratio": 48 / 11, "num_classes": 9}
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    fixed = {"img_size": SIZE, "patch_size": 14, "all_frames": FRAMES, "tubelet_size": TUBELET, "qkv_bias": True}
    theirs = public.VisionTransformer(**shape, **fixed, norm_layer=norm, use_mean_pooling=True, init_scale=1.0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = VideoMAE.from_state_dict(theirs.state_dict())
    clips = torch.rand(2, 3, FRAMES, SIZE, SIZE)
    with torch.inference_mode():
        same = ours(2 * clips - 1), theirs.forward_features(clips)
    return ((same[0] - same[1]).abs().max() / same[1].std()).item()


def _distance(features: Sequence[np.ndarray], statistics: Any) -> float:
    """cd-fvd's: its streaming mean and covariance (divisor n), and its formula, whose `sqrtm` scipy has changed since."""
    import scipy.linalg

    sides = []
    for part in features:
        collected = statistics(capture_mean_cov=True)
        collected.append(part)
        sides.append(collected.get_mean_cov())
    (mean, cov), (other_mean, other_cov) = sides
    root = scipy.linalg.sqrtm(cov @ other_cov)
    return float(np.square(mean - other_mean).sum() + np.trace(cov + other_cov - 2 * np.real(root)))


def throughput(frames: int, batch: int, rounds: int) -> dict[str, float]:
    """Clips a second of processor time from bytes to features, the best of several rounds that take turns."""
    other = cd_fvd()
    theirs = random_weights(other["network"](400))
    ours = I3D.from_state_dict(theirs.state_dict(), EPS)
    clips = videos(1, batch, frames)

    def mine() -> torch.Tensor:
        flat = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2)
        return ours(PREPARATIONS["squash"](flat).unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous())

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "microcinema": mine,
        "cd-fvd": lambda: theirs(other["prepare"](clips)),
    }
    best = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.process_time()
                run()
                best[name] = min(best[name], time.process_time() - start)
    return {name: batch / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6, help="videos of each of two sets")
    parser.add_argument("--frames", type=int, default=16, help="frames of each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the measurement of throughput")
    options = parser.parse_args()
    found = compare(options.clips, options.frames)
    for name, value in found["fvd"].items():
        beside = f"  cd-fvd {found['theirs'][name]:.6f}" if name in found["theirs"] else ""
        apart = f"  relative difference {found['end_to_end'][name]:.1e}" if name in found["end_to_end"] else ""
        print(f"FVD {name:16} {value:.6f}{beside}{apart}")
    print(f"features of the same pixels differ by {found['features']:.1e} standard deviations")
    print(f"features of VideoMAE v2 from the same weights differ by {compare_videomae():.1e} standard deviations")
    for ddof, value in found["statistics"].items():
        print(f"distance of the same features, divisor n - {ddof}: relative difference {value:.1e}")
    for name, value in throughput(options.frames, 2, options.rounds).items():
        print(f"throughput {name:12} {value:.2f} clips a second of processor time")


if __name__ == "__main__":
    main()
