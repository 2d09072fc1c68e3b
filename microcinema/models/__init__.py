"""Networks, nothing else. Public names are imported on first use."""

from importlib import import_module
from typing import Any

_HOME = {
    "AppearanceNet": "appearance",
    "ConditionEncoder": "conditioning",
    "Conditions": "conditioning",
    "VideoUNet": "video_unet",
    "set_trainable": "video_unet",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
