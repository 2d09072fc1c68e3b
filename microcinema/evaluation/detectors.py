"""Networks that look at clips: here, the classifier of Moving Sprites."""

import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from microcinema.errors import UserError
from microcinema.models.sprite_classifier import SpriteClassifier
from microcinema.pipelines.base import ASSETS


class SpriteJudge:
    """Names the attributes of clips and gives the features that the Fréchet distance compares.

    Args:
        classifier: in evaluation mode; clips are judged on its device.
        batch_size: clips at once; changes no verdict.
    """

    def __init__(self, classifier: SpriteClassifier, batch_size: int = 16) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.batch_size = batch_size

    @classmethod
    def load(cls, name: str | os.PathLike[str], batch_size: int = 16) -> "SpriteJudge":
        """Opens an embedded classifier by name, or one in a folder.

        Raises:
            UserError: there is none, or its files are damaged.
        """
        embedded = ASSETS / name / "config.json"
        folder = embedded.parent if embedded.is_file() else Path(name)
        if not (folder / "config.json").is_file():
            raise UserError(f"classifier '{name}' is neither embedded nor a folder with a config.json; check the name")
        try:
            classifier = SpriteClassifier.from_pretrained(folder, torch_dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"cannot load the classifier '{folder}' ({first_line}); train or fetch it again") from error
        return cls(classifier, batch_size)

    @torch.inference_mode()
    def __call__(self, clips: np.ndarray) -> tuple[list[dict[str, str]], np.ndarray]:
        """Attribute names of each clip and features (n, d) float64, of clips uint8 (n, f, h, w, 3).

        Raises:
            UserError: clips with another number of frames than the classifier reads.
        """
        names: list[dict[str, str]] = []
        features = []
        for batch in np.split(clips, range(self.batch_size, len(clips), self.batch_size)):
            video = rearrange(torch.from_numpy(batch), "b f h w c -> b f c h w").to(self.classifier.device)
            feature = self.classifier.features(video.to(self.classifier.dtype) / 127.5 - 1)
            features.append(feature.double().cpu().numpy())
            best = {key: head(feature).argmax(dim=1).tolist() for key, head in self.classifier.heads.items()}
            classes = self.classifier.config["classes"]
            names += [{key: classes[key][best[key][row]] for key in best} for row in range(len(batch))]
        return names, np.concatenate(features)
