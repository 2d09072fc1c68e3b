"""What accelerate and DeepSpeed take from environment variables, config files and launchers, held against the config of the run."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from microcinema.config.schema import Train
from microcinema.utils.device import precision_settings
from microcinema.utils.errors import UserError

_OPEN = (None, "auto")  # left to the run
# What a DeepSpeed file may decide: how a step is computed, not what (optimizer, schedule, seed, curriculum, ...).
_DEEPSPEED = (
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "torch_autocast"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing"),
    *("steps_per_print", "wall_clock_breakdown", "flops_profiler", "comms_logger", "dump_state", "fp16", "bf16"),
)


def launch_settings(accelerator: Accelerator) -> dict[str, Any]:
    """The settings in force that the environment of a run decides or could override, as JSON."""
    state, parallelism = accelerator.state, getattr(accelerator, "parallelism_config", None)
    is_deepspeed, fsdp = accelerator.distributed_type == DistributedType.DEEPSPEED, getattr(state, "fsdp_plugin", None)
    # accelerate sets steps_per_print to infinity, which JSON does not have.
    deepspeed = state.deepspeed_plugin.deepspeed_config | {"steps_per_print": None} if is_deepspeed else {}
    autocast = deepspeed.get("torch_autocast", {})
    dtype = str(autocast.get("dtype", "bfloat16")).replace("bfloat", "bf").replace("float", "fp")
    return {
        "distributed_type": accelerator.distributed_type.value,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": dtype if autocast.get("enabled") else accelerator.mixed_precision,
        **precision_settings(),
        "dynamo_backend": state.dynamo_plugin.backend.value.lower(),
        "model_parallel_size": parallelism.non_data_parallel_size if parallelism else 1,
        "fsdp_version": fsdp.fsdp_version if fsdp else None,
        "fsdp_cpu_ram_efficient_loading": bool(fsdp and fsdp.cpu_ram_efficient_loading),
        **{f"deepspeed.{key}": value for key, value in deepspeed.items()},
    }


def check_launch_settings(accelerator: Accelerator, config: Train) -> None:
    """Refuses a setting in force that contradicts the run's config, or with which training is wrong (UserError)."""
    accumulation, batch = config.gradient_accumulation_steps, config.train_batch_size
    precisions = ("no", "fp16", "bf16") if config.mixed_precision is None else (config.mixed_precision,)
    settings = launch_settings(accelerator)
    allowed: dict[str, tuple[Any, ...]] = {
        "gradient_accumulation_steps": (accumulation,),
        "mixed_precision": precisions,
        "dynamo_backend": ("no",),  # a compiled network has other names of weights
        "model_parallel_size": (1,),  # each rank has clips of its own
        "fsdp_version": (None, 2),
        "fsdp_cpu_ram_efficient_loading": (False,),  # on all ranks but one the frozen encoders would stay empty
        **{key: _OPEN for key in settings if key.startswith("deepspeed.") and key.split(".")[1] not in _DEEPSPEED},
        "deepspeed.gradient_accumulation_steps": (accumulation, *_OPEN),
        "deepspeed.gradient_clipping": (config.max_grad_norm, *_OPEN),
        "deepspeed.train_micro_batch_size_per_gpu": (batch, *_OPEN),
        "deepspeed.train_batch_size": (batch * accumulation * accelerator.num_processes, *_OPEN),
    }
    for key, values in allowed.items():
        if settings.get(key) not in values:
            fault = f"the launcher, its config file or environment (ACCELERATE_*) sets {key} to {settings[key]}"
            needed = " or ".join(str(value) for value in values if value is not None)
            raise UserError(f"{fault}, but this run needs {needed}; let the two agree, or leave it to the run")
