"""The generated clips of a protocol, from the sampler that the command `sample` uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from microcinema.config.sampling import DenoisingSettings, KeyframeSettings, MemorySettings, SamplingSettings
from microcinema.config.schema import Evaluate
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import Format, SampleFolder
from microcinema.pipelines.sampler import Sampler
from microcinema.utils.fingerprint import write_or_verify
from microcinema.utils.hashing import hash_json


@dataclass(frozen=True)
class Generated:
    """Generated clips of a protocol's samples. `load` returns the frames of one, uint8 (f, h, w, 3), and its key frame uint8 (h, w, 3),
    with which the frame `keyframe_index` is compared, or None. Names are those of `Clips`. The fingerprint is everything that the clips depend
    on beside them; counts are those of `generate`."""

    samples: list[PromptItem]
    names: Sequence[str]
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    fps: float
    fingerprint: dict[str, Any]
    keyframe_index: int = 0
    has_prompts: bool = True
    warnings: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def protocol_sampler(
    config: Evaluate, height: int | None, width: int | None, num_frames: int, fps: float | None, state: PartialState
) -> Sampler:
    """The sampler of a protocol's clips, with the settings of the config of `evaluate`; None: the model's own. A UserError if the model
    cannot be loaded, or settings do not work with it."""
    settings = config.evaluation
    denoising = {name: getattr(settings, name) for name in DenoisingSettings.__dataclass_fields__}
    sampling = SamplingSettings(height, width, num_frames, fps, **denoising)
    keyframe = KeyframeSettings(
        settings.keyframe_model,
        num_inference_steps=settings.keyframe_num_inference_steps,
        guidance_scale=settings.keyframe_guidance_scale,
        on_flagged="keep",  # every prompt of a protocol has a clip
    )
    memory, size, progress = MemorySettings(settings.torch_dtype), config.batch_size, state.is_main_process
    return Sampler(str(config.pipeline), sampling, keyframe, memory, state.device, size, progress, lora=config.lora)


def generate(
    sampler: Sampler,
    items: Sequence[PromptItem],
    seed: int,
    folder: Path,
    state: PartialState,
    formats: Sequence[Format] = ("frames",),
    crf: int = 18,
    **fingerprint: Any,
) -> tuple[SampleFolder, dict[str, Any], dict[str, int]]:
    """Makes the clips that the folder does not hold yet, by all processes, and waits for them.

    Returns them; their whole fingerprint, of which `fingerprint` is what they depend on beside sampler and seed; and the numbers of
    key frames that a safety checker flagged (and blackened) and of prompts that were longer than a text encoder reads.

    Raises:
        UserError: the folder holds clips with another fingerprint, or they cannot be made.
    """
    fingerprint = {**sampler.fingerprint(), "seed": seed, **fingerprint}
    write_or_verify(folder, fingerprint)
    samples = SampleFolder(folder, formats, crf)
    seeded = [replace(item, seed=seed) for item in items]
    sampler.run(seeded, samples, state.process_index, state.num_processes)
    state.wait_for_everyone()
    records: Any = [samples.record(item) for item in seeded]
    truncated = ["truncated" in {**record, **record["keyframe"]} for record in records]
    flagged = ["flagged" in record["keyframe"] for record in records]
    counts = {"flagged_keyframes": sum(flagged), "truncated_prompts": sum(truncated)}
    return samples, fingerprint, counts


def generate_clips(
    config: Evaluate, sampler: Sampler, samples: list[PromptItem], folder: Path, state: PartialState
) -> Generated:
    """Clips of the pipeline of the config, made as by `generate` if needed."""
    prompts_sha256 = hash_json([sample.prompt for sample in samples])
    clips, fingerprint, counts = generate(sampler, samples, config.seed, folder, state, prompts_sha256=prompts_sha256)

    def load(number: int) -> tuple[np.ndarray, np.ndarray | None]:
        clip = clips.load(samples[number].id)
        return clip.frames, clip.keyframe

    names, index = [sample.id for sample in samples], sampler.keyframe_index
    return Generated(samples, names, load, fingerprint["fps"], fingerprint, index, counts=counts)
