"""What a user calls. Public names are imported on first use."""

from importlib import import_module
from typing import Any

_HOME = {
    "Base": "base",
    "load_base": "base",
    "KeyframePipeline": "keyframe",
    "ImageToVideoPipeline": "image_to_video",
    "TextToVideoPipeline": "text_to_video",
    "load_keyframe_pipeline": "saved",
    "load_pipeline": "saved",
    "save_pipeline": "saved",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
