"""What a user calls. Once this is imported, diffusers' own `DiffusionPipeline.from_pretrained` opens saved video pipelines too."""

import diffusers

from microcinema.pipelines.base_model import Base, load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline, save_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline

__all__ = [
    "Base",
    "ImageToVideoPipeline",
    "KeyframePipeline",
    "TextToVideoPipeline",
    "load_base",
    "load_keyframe_pipeline",
    "load_pipeline",
    "save_pipeline",
]

# It looks the class that a model_index.json names up among its own.
diffusers.ImageToVideoPipeline = ImageToVideoPipeline
