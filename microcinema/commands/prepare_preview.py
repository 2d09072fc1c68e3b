"""The command `prepare preview`: a picture of the first clips of a training run, as the model will see them."""

from typing import TYPE_CHECKING

import numpy as np

from microcinema.data.indexed import IndexedDataset
from microcinema.data.video_writer import write_contact_sheet

if TYPE_CHECKING:
    from microcinema.config.schema import PreparePreview


def run(config: "PreparePreview") -> None:
    """TrainingNoise clips 0 to `max_samples - 1` in the order of training, with what the model is told of each under it.

    Raises:
        UserError: the data set cannot be read, or a clip of it.
    """
    clips = IndexedDataset(config.data.build(), config.seed)
    pictures, captions = [], []
    for number in range(config.max_samples):
        item = clips[number]
        video = ((item["video"].permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        frames, height, width = video.shape[:3]
        told = dict.fromkeys(item[name] for name in ("caption", "description", "motion"))  # once each
        facts = f"{frames} x {height} x {width}, {item['fps']:g} fps" if frames > 1 else f"picture, {height} x {width}"
        captions.append(f"{number}  {item['id']}  ({facts}): {' | '.join(told)}")
        pictures.append(video)
    write_contact_sheet(config.output, pictures, captions, columns=config.columns, below=True)
    print(config.output)
