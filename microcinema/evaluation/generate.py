"""Generating the clips of a protocol, by the same sampler as the command `sample`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from microcinema.pipelines.memory import MemorySettings
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.pipelines.sampler import Sampler
from microcinema.pipelines.sampling_settings import KeyframeSettings, SamplingSettings
from microcinema.utils.fingerprint import write_or_verify

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Share:
    """The batches of one process: every `of`-th from `rank`, so that batches do not depend on the number of processes."""

    rank: int = 0
    of: int = 1

    def batches(self, count: int, batch_size: int) -> Iterator[range]:
        """The indices of each batch."""
        starts = range(0, count, batch_size)[self.rank :: self.of]
        return (range(start, min(start + batch_size, count)) for start in starts)


def protocol_sampler(
    config: "DictConfig", height: int | None, width: int | None, num_frames: int, fps: float | None, state: PartialState
) -> Sampler:
    """The sampler of a protocol's clips, with the settings of the config of `evaluate`.

    Args:
        height, width, num_frames, fps: of the clips; None: the model's own.

    Raises:
        UserError: a model that cannot be loaded, or settings that do not work with it.
    """
    settings = config.evaluation
    steps, guidance = settings.num_inference_steps, settings.guidance_scale
    return Sampler(
        str(config.pipeline),
        SamplingSettings(height, width, num_frames, fps, steps, guidance, settings.image_guidance_scale),
        KeyframeSettings(
            settings.keyframe_model,
            num_inference_steps=settings.keyframe_num_inference_steps,
            guidance_scale=settings.keyframe_guidance_scale,
        ),
        MemorySettings(settings.torch_dtype),
        state.device,
        batch_size=config.batch_size,
        progress=state.is_main_process,
    )


def generate(
    sampler: Sampler,
    items: Sequence[PromptItem],
    seed: int,
    folder: str | os.PathLike[str],
    state: PartialState,
    **fingerprint: Any,
) -> tuple[SampleFolder, dict[str, Any]]:
    """Makes the clips that the folder does not hold yet, by all processes, and waits for them.

    Args:
        seed: of all items.
        fingerprint: what the clips depend on beside sampler and seed.

    Returns:
        the folder of clips, and their fingerprint.

    Raises:
        UserError: the folder holds clips with another fingerprint, or they cannot be made.
    """
    fingerprint = {**sampler.fingerprint(), "seed": seed, **fingerprint}
    write_or_verify(folder, fingerprint)
    samples = SampleFolder(folder, ("frames",))
    seeded = [replace(item, seed=seed) for item in items]
    sampler.run(seeded, samples, state.process_index, state.num_processes)
    state.wait_for_everyone()
    return samples, fingerprint
