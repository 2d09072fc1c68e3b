"""LoRA (arXiv 2106.09685): layers of VideoUNet become `W x + alpha / rank B A x`, with a frozen W, through peft.

Those of the main branch alone. AppearNet and ReferenceNet start as copies of its 2D layers, but train on from there: they describe a key
frame, which has the style already, to injections that were trained on the features as they are.
"""

import re
from typing import Any, Literal

from torch import nn

from microcinema.models.video_unet import VideoUNet

TARGETS = {"spatial": r"(down_blocks|mid_block|up_blocks)\..*\.attn[12]\.to_(q|k|v|out\.0)", "temporal": r"temporal_.*"}


def add_lora(
    unet: VideoUNet, rank: int, alpha: float, targets: Literal["spatial", "temporal", "both"], dropout: float
) -> None:
    """Adds a LoRA that trains, and freezes all else. At initialization, with B = 0, the network is unchanged.

    Args:
        targets: `spatial`, the projections of all attentions in the 2D layers, as in diffusers' training scripts; `temporal`, all linear
            layers and convolutions of the temporal layers.
        dropout: of the input of A.
    """
    from peft import LoraConfig  # which takes long to import

    pattern = "|".join(TARGETS.values()) if targets == "both" else TARGETS[targets]
    layers = (name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    # A pattern: a list would also name AppearNet's layers, whose names end alike.
    names = "|".join(re.escape(name) for name in layers if re.fullmatch(pattern, name))
    scale: Any = alpha  # peft's annotation has whole numbers only
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=scale, target_modules=f"({names})", lora_dropout=dropout))
