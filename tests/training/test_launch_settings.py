"""Nothing that accelerate or DeepSpeed takes from its environment changes a run unsaid: it agrees with the run's config, or is refused."""

import json
from types import SimpleNamespace

import pytest
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from fixtures import tiny_training
from microcinema.commands import cli
from microcinema.training.distributed import make_accelerator
from microcinema.training.launch_settings import check_launch_settings, launch_settings
from microcinema.utils.errors import UserError

REFUSED = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation_steps to 4, but this run needs 1"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"gradient_accumulation_steps": 2}, "to 1, but this run needs 2"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"}, {}, "accelerate cannot start .*many"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend to inductor, but this run needs no"),
    ({"ACCELERATE_DYNAMO_BACKEND": "fast"}, {}, "accelerate cannot start"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "accelerate cannot start"),
    ({"ACCELERATE_MIXED_PRECISION": "fp32"}, {}, "mixed_precision to fp32, but this run needs no or fp16 or bf16"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "accelerate cannot start .*DeepSpeed is not installed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "accelerate cannot start .*Megatron"),
]
AGREED = [
    ({}, {}, "no"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {"gradient_accumulation_steps": 2}, "no"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, "no"),  # what the run says holds
    ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {}, "no"),
]


@pytest.mark.parametrize("environment, changes, words", REFUSED)
def test_an_environment_that_contradicts_the_run_is_refused(tmp_path, monkeypatch, environment, changes, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        make_accelerator(tiny_training.make_config(tmp_path, **changes))


@pytest.mark.parametrize("environment, changes, precision", AGREED)
def test_one_that_agrees_is_taken_and_recorded(tmp_path, monkeypatch, environment, changes, precision):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tiny_training.make_config(tmp_path, **changes)
    settings = launch_settings(make_accelerator(config))
    assert settings["mixed_precision"] == precision
    assert settings["gradient_accumulation_steps"] == config.gradient_accumulation_steps
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings


def test_the_command_refuses_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert cli.main(["train", f"output_dir={tmp_path}/run", f"data.root={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gradient_accumulation_steps to 4" in line


def stand_in(monkeypatch, config, plugin=None, environment=None, **state) -> SimpleNamespace:
    """An accelerator of four processes with a plugin of accelerate, which reads this environment."""
    real = tiny_training.accelerator(config)
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    plugin = plugin() if plugin else None
    deepspeed = isinstance(plugin, DeepSpeedPlugin)
    if deepspeed:
        plugin.set_mixed_precision(config.mixed_precision or "no")
        precision = next((name for name in ("fp16", "bf16") if plugin.deepspeed_config[name]["enabled"]), "no")
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED if deepspeed else DistributedType.FSDP,
        state=SimpleNamespace(
            deepspeed_plugin=plugin, fsdp_plugin=None if deepspeed else plugin, dynamo_plugin=real.state.dynamo_plugin
        ),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=precision if deepspeed else "no",
        num_processes=4,
        **state,
    )


ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "settings, environment, changes, words",
    [
        (ZERO, {}, {}, None),
        ({**ZERO, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}, {}, {}, None),
        (
            {**ZERO, "gradient_accumulation_steps": 2, "train_batch_size": 16},
            {},
            {"gradient_accumulation_steps": 2},
            None,
        ),
        (ZERO, {}, {"gradient_accumulation_steps": 2}, "deepspeed.gradient_accumulation_steps to 1, .* needs 2"),
        ({**ZERO, "gradient_clipping": 0.5}, {}, {}, "gradient_clipping to 0.5, .* needs 1.0 or auto"),
        (
            {**ZERO, "gradient_clipping": "auto"},
            {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            {},
            "gradient_clipping to 0.5",
        ),
        ({**ZERO, "train_micro_batch_size_per_gpu": 3}, {}, {}, "train_micro_batch_size_per_gpu to 3, .* needs 2"),
        ({**ZERO, "train_batch_size": 2}, {}, {}, "train_batch_size to 2, .* needs 8"),
        ({**ZERO, "optimizer": {"type": "Adam"}}, {}, {}, "deepspeed.optimizer"),
        ({**ZERO, "seed": 3}, {}, {}, "deepspeed.seed to 3"),
        ({**ZERO, "bf16": {"enabled": True}}, {}, {"mixed_precision": "no"}, "mixed_precision to bf16, .* needs no"),
        (
            {**ZERO, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            {},
            {"mixed_precision": "no"},
            "to fp16, .* needs no",
        ),
        (None, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "deepspeed.gradient_accumulation_steps to 4"),
    ],
)
def test_a_deepspeed_file_says_how_and_not_what(tmp_path, monkeypatch, settings, environment, changes, words):
    if settings is not None:
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        environment = {**environment, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    config = tiny_training.make_config(tmp_path, **changes)
    accelerator = stand_in(monkeypatch, config, DeepSpeedPlugin, environment)
    if words is None:
        check_launch_settings(accelerator, config)
        json.dumps(launch_settings(accelerator), allow_nan=False)
    else:
        with pytest.raises(UserError, match=words):
            check_launch_settings(accelerator, config)


@pytest.mark.parametrize(
    "environment, parallel, words",
    [
        ({"FSDP_VERSION": "2"}, 1, None),
        ({"FSDP_VERSION": "1"}, 1, "fsdp_version to 1, but this run needs 2"),
        ({"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, 1, "fsdp_cpu_ram_efficient_loading to True"),
        ({"FSDP_VERSION": "2"}, 2, "model_parallel_size to 2"),
    ],
)
def test_fsdp_as_training_knows_it(tmp_path, monkeypatch, environment, parallel, words):
    config = tiny_training.make_config(tmp_path)
    mesh = SimpleNamespace(non_data_parallel_size=parallel)
    accelerator = stand_in(monkeypatch, config, FullyShardedDataParallelPlugin, environment, parallelism_config=mesh)
    if words is None:
        check_launch_settings(accelerator, config)
    else:
        with pytest.raises(UserError, match=words):
            check_launch_settings(accelerator, config)
