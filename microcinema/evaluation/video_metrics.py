"""Measures of a single clip that need no detector. Clips are uint8 (f, h, w, 3)."""

import itertools

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from microcinema.utils.errors import UserError

STATIC_DISPLACEMENT = 1.0
"""Pixels; a clip in which nothing ever gets further than this from where it was in the first frame is static."""

_BEST_PSNR = 60.0  # dB given to identical pictures, beyond what 8 bits can tell, so that means stay finite


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio (dB, at most 60) of pixels, both uint8 and of one shape."""
    if np.array_equal(image, reference):
        return _BEST_PSNR
    return min(float(peak_signal_noise_ratio(reference, image, data_range=255)), _BEST_PSNR)


def image_fidelity(image: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """PSNR (dB, at most 60) and SSIM (Wang et al. 2004, Gaussian weights) of an image, both uint8 (h, w, 3) of one size."""
    if image.shape != reference.shape:
        raise UserError(f"images of {image.shape[:2]} and {reference.shape[:2]} pixels cannot be compared; resize one")
    ssim = structural_similarity(reference, image, channel_axis=-1, gaussian_weights=True, data_range=255)
    return psnr(image, reference), float(ssim)


def optical_flow(before: np.ndarray, after: np.ndarray, channel: str = "brightness") -> np.ndarray:
    """Forward flow (h, w, 2), pixels, (dx, dy), between two frames: polynomial expansion (Farneback 2003).

    `brightness` sees everything; `saturation` (largest minus smallest of red, green, blue) separates saturated objects from a muted
    background, and follows them more closely.
    """
    if channel == "brightness":
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    else:
        grey = [np.ptp(frame, axis=-1) for frame in (before, after)]
    return cv2.calcOpticalFlowFarneback(
        grey[0], grey[1], None, pyr_scale=0.5, levels=3, winsize=13, iterations=5, poly_n=5, poly_sigma=1.1, flags=0
    )


def clip_flow(frames: np.ndarray, channel: str = "brightness") -> np.ndarray:
    """Flow (f-1, h, w, 2) from each frame to the next."""
    return np.stack([optical_flow(a, b, channel) for a, b in itertools.pairwise(frames)])


def endpoint_error(flow: np.ndarray, truth: np.ndarray, masks: np.ndarray) -> float:
    """Mean end-point error in pixels over the object: where `masks` (f, h, w) of the first f-1 frames exceeds one half."""
    inside = masks[: len(truth)] > 0.5
    return float(np.linalg.norm(flow - truth, axis=-1)[inside].mean()) if inside.any() else float("nan")


def motion_magnitude(flow: np.ndarray) -> float:
    """Mean length of the flow (f-1, h, w, 2) over all pixels, pixels a frame."""
    return float(np.linalg.norm(flow, axis=-1).mean())


def is_static(frames: np.ndarray) -> bool:
    """Whether nothing of visible size leaves its place: the 99th percentile of the displacement from the first frame, at a
    quarter, a half, three quarters and the end of the clip, stays within `STATIC_DISPLACEMENT`."""
    later = np.unique(np.linspace(0, len(frames) - 1, 5).round().astype(int))[1:]
    lengths = (np.linalg.norm(optical_flow(frames[0], frames[k]), axis=-1) for k in later)
    return all(np.quantile(length, 0.99) < STATIC_DISPLACEMENT for length in lengths)


def frame_consistency(frames: np.ndarray, flow: np.ndarray) -> float:
    """Mean PSNR (dB) between each frame and the next one carried back along the flow: low where things flicker or dissolve."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = []
    for before, after, step in zip(frames[:-1], frames[1:], flow, strict=True):
        back = cv2.remap(after, x + step[..., 0], y + step[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        values.append(psnr(back, before))
    return float(np.mean(values)) if values else float("nan")
