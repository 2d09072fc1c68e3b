"""What a run and a checkpoint that it goes on from must have in common."""

import json
from collections.abc import Mapping
from typing import Any

from microcinema.data.indexed import IndexedDataset
from microcinema.pipelines.image_to_video import ImageToVideoPipeline, describe_schedule
from microcinema.training.settings import Settings
from microcinema.utils.errors import UserError

Identity = dict[str, dict[str, Any]]
"""`fixed`: what has to be the same; `free`: what may differ, so that the run is no longer the one that it would have been."""

# A checkpoint brings the optimiser's own settings with it: another value would silently change nothing.
FIXED = (
    "seed",
    "learning_rate",
    "use_8bit_adam",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
)
FREE = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_grad_norm",
    "snr_gamma",
    "motion_weight",
    "timestep_logit_normal",
    "flow_weight",
    "text_dropout",
    "image_dropout",
    "use_ema",
    "ema_decay",
)
PIPELINE = (
    "num_frames",
    "height",
    "width",
    "fps",
    "noise_prior",
    "noise_prior_strength",
    "keyframe_position",
)


def identify(
    settings: Settings,
    pipeline: ImageToVideoPipeline,
    clips: IndexedDataset,
    num_processes: int,
    mixed_precision: str,
) -> Identity:
    """The identity of a run, as JSON holds it.

    Args:
        clips: the data set in its order; what a checkpoint says of it is a digest of both.
        mixed_precision: that of accelerate, which decides where the settings leave it open.
    """
    fixed = {name: getattr(settings, name) for name in FIXED}
    fixed |= {name: pipeline.config[name] for name in PIPELINE}
    fixed |= describe_schedule(pipeline.training_scheduler)
    fixed["clips"] = clips.fingerprint()
    free = {name: getattr(settings, name) for name in FREE}
    free |= {"mixed_precision": mixed_precision, "num_processes": num_processes}
    if not settings.lr_scheduler.startswith("constant"):  # the others end with the run
        free["max_train_steps"] = settings.max_train_steps
    return json.loads(json.dumps({"fixed": fixed, "free": free}, default=list))


def compare(what: str, then: Identity, now: Identity) -> list[str]:
    """Holds the identity of a run against that in a checkpoint.

    Args:
        what: the checkpoint, in messages.

    Returns:
        What may differ and does, each in words.

    Raises:
        UserError: something that may not differ does.
    """
    if differing := _differences(then["fixed"], now["fixed"]):
        others = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{what} is of another run: {'; '.join(differing[:4])}{others}; go on with the same values, "
            "or begin a new run from its weights with init_weights_from"
        )
    return _differences(then["free"], now["free"])


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if "clips" in names and "seed" in names:  # the one follows from the other
        names.remove("clips")
    return [
        "the clips, or their order, are others"
        if name == "clips"
        else f"{name} was {_short(then.get(name))} and is {_short(now.get(name))}"
        for name in names
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
