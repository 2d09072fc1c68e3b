"""MicroCinema and Factorized-Dreamer: text to key frame, key frame to video. Public names are imported on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "UserError": "microcinema.utils.errors",
    "VideoUNet": "microcinema.models.video_unet",
    "AppearNet": "microcinema.models.appearance",
    "ReferenceNet": "microcinema.models.appearance",
    "Conditions": "microcinema.models.conditioning",
    "NoisePrior": "microcinema.diffusion.noise_prior",
    "KeyframePipeline": "microcinema.pipelines.keyframe",
    "ImageToVideoPipeline": "microcinema.pipelines.image_to_video",
    "TextToVideoPipeline": "microcinema.pipelines.text_to_video",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
