"""What a user calls. Once this is imported, diffusers' own `DiffusionPipeline.from_pretrained` opens saved video pipelines too."""

import diffusers

from microcinema.pipelines.image_to_video import ImageToVideoPipeline

# It looks the class that a model_index.json names up among its own.
diffusers.ImageToVideoPipeline = ImageToVideoPipeline
