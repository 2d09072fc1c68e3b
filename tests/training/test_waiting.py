"""Between two readings a training step waits for nothing that its device computes.

The step runs on torch's `meta` device, which computes nothing: to read a number of it is an error, whoever does it. Copies to it that would
wait, as one from memory that is not pinned does on a GPU, are counted.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures import tiny, tiny_training
from fixtures.tiny_training import LatentClips
from microcinema.data.source import ClipSource
from microcinema.diffusion.rng import generator
from microcinema.training import trainer as training
from microcinema.training.trainer import Trainer

META = torch.device("meta")


class BlockingCopies(TorchDispatchMode):
    """Counts the copies to the device that do not say `non_blocking`, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::_to_copy", "aten::copy_") and out.device == META:
            source = args[1 if function._schema.name == "aten::copy_" else 0]
            blocking = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            self.found[tuple(source.shape)] += source.device != META and blocking
        return out


class VideoClips(ClipSource):
    """Clips as a loader of videos gives them, two captions each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        shape = tiny_training.FRAMES, 3, tiny.SIZE, tiny.SIZE
        video = torch.randint(256, shape, generator=generator(index), dtype=torch.uint8)
        captions = {"caption": "a star moving left", "description": f"a star {index}", "motion": "moving left"}
        return {"video": video, "fps": 8.0, **captions}


CASES = [
    ("microcinema", LatentClips, {}, {}),
    ("microcinema_once", VideoClips, {"snr_gamma": 5.0, "motion_weight": 1.0}, {}),
    ("factorized_dreamer", VideoClips, {}, {"noise_prior": "mixed", "noise_prior_strength": 1.0}),
]


@pytest.mark.parametrize("model, clips, changes, settings", CASES, ids=[case[0] for case in CASES])
def test_a_step_reads_nothing_of_the_device_and_waits_for_no_copy(
    tmp_path, monkeypatch, model, clips, changes, settings
):
    config = tiny_training.make_config(tmp_path / "run", report_to=None, logging_steps=100, **changes)
    pipeline = tiny.video_pipeline(tmp_path / "base", model=model, **settings)
    accelerator = tiny_training.accelerator(config)
    pipeline.to(META)
    for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        assert next(network.parameters()).device == META
    monkeypatch.setattr(Accelerator, "device", META)
    # Neither the fused AdamW, which reads nothing either, nor autocast knows the device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(training, "make_optimizer", lambda parameters, _: torch.optim.SGD(parameters, lr=0.1))
    trainer = Trainer(accelerator, pipeline, clips(), config)
    batches = trainer._micro_batches()
    trainer.step(batches)  # copies the tables, encodes the empty caption and counts operations
    with BlockingCopies() as copies:
        trainer.step(batches)
    assert not +copies.found
    with pytest.raises((RuntimeError, NotImplementedError)):  # a meta tensor has no numbers: every reading fails
        trainer.finish_interval()
    with BlockingCopies() as copies:
        torch.zeros(3).to(META)
        torch.zeros(4, device=META).copy_(torch.zeros(4))
        torch.zeros(5).to(META, non_blocking=True)
    assert dict(+copies.found) == {(3,): 1, (4,): 1}
