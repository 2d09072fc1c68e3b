"""Every key of every command, given every kind of wrong value: one line and exit status 2 before anything is written."""

import random
import re
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hydra
import pytest
import wandb

from microcinema.commands import cli
from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, plain
from microcinema.config.help import documented_keys, group_defaults

NULL = "null"
NO_TEXT = ("", "a\0b", "\udcff")  # nothing, and what no file or file name can hold
NO_NUMBER = (".nan", ".inf", "1" + "0" * 30, "1e300", "٣", "1:30", "[.nan, 1]", '["a\\0b"]', "{a: 1}", "some text")
NEGATIVE, BOOL = "-1", "true"
VALUES = (NULL, *NO_TEXT, *NO_NUMBER, NEGATIVE, BOOL)
# Compositions whose keys are those of every group.
COMPOSITIONS = {
    "train": [[], ["data=webvid"], ["data=folder"], ["data=joint"], ["data=shards"], ["model=factorized_dreamer"]],
    "evaluate": [[], ["evaluation=ucf101"]],
    "prepare check": [["data=folder"]],
    "prepare preview": [["data=folder"]],
}
GIVEN = {
    "sample": ["prompt=a star"],
    "prepare latents": ["cached_latents=x"],
    "export": ["checkpoint=."],
    "watch": ["folder=."],
}
# Written out, not read from the schema: the keys that hold a text, by their last word, and those that may be empty or below zero.
TEXTS = [
    "beta_schedule",
    "cache_dir",
    "cached_latents",
    "caption",
    "checkpoint",
    "classifier",
    "description",
    "detector",
    "file",
    "flow_model",
    "generated_dir",
    "group",
    "host",
    "id",
    "image",
    "image_encoder",
    "images",
    "index",
    "init_weights_from",
    "keyframe_model",
    "manifest",
    "mask",
    "metadata",
    "motion",
    "motion_encoder",
    "motion_prompt",
    "name",
    "negative_prompt",
    "output",
    "output_dir",
    "page_dir",
    "pipeline",
    "pretrained_model_name_or_path",
    "preview_vae",
    "project",
    "prompt",
    "prompts",
    "ray_address",
    "real_features_dir",
    "resume_from_checkpoint",
    "revision",
    "root",
    "scheduler",
    "shards",
    "skip_real",
    "variant",
    "weights",
]
MAY_BE_NULL = {"model.appearance", "model.adapter", "model.pixels"}  # groups
MAY_BE_EMPTY = {"negative_prompt", "motion_prompt"}
MAY_BE_NEGATIVE = {"max_watermark_score", "watermark_score"}


def dotted(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if key != "_target_" and prefix + key != "evaluation.clip.sha256":  # a default of the schema, no key of a file
            yield prefix + key, value
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


@cache
def keys() -> list[tuple[str, tuple[str, ...], str, object]]:
    return list(every_key())


@cache
def cases() -> list[tuple]:
    return [(*case, value) for case in keys() for value in VALUES]


def every_key() -> Iterator[tuple[str, tuple[str, ...], str, object]]:
    """(command, its other arguments, key, default): each key once, also those of groups and the groups themselves."""
    shown: set[tuple[str, str]] = set()
    for command in (name for name, entry in COMMANDS.items() if entry.config is None):
        for options in COMPOSITIONS.get(command, [[]]):
            for key, default in dotted(plain(compose(command, options))):
                inherited = command == "prepare latents" and ("train", key) in shown
                if (command, key) not in shown and not inherited:
                    yield command, (*options, *GIVEN.get(command, ())), key, default
                shown.add((command, key))


def must_be_refused(command: str, options: tuple[str, ...], key: str, default: object, value: str) -> bool:
    """Whether a value is wrong for a key, by its default in the YAML files and the comment beside it."""
    word = key.rpartition(".")[2]
    if isinstance(default, dict) or key in group_defaults(command):
        return value != NULL or (default is not None and key not in MAY_BE_NULL)
    if value in NO_TEXT:
        return not (value.strip() == "" and word in MAY_BE_EMPTY)
    if word in TEXTS:
        return False
    if value == NULL:
        return default is not None and "null" not in meaning(command, options, key)
    return (
        value in NO_NUMBER
        or (value == NEGATIVE and word not in MAY_BE_NEGATIVE)
        or (value == BOOL and not isinstance(default, bool) and default is not None)
    )


@cache
def meaning(command: str, options: tuple[str, ...], key: str) -> str:
    """The comments on a key in the command's file and in those of its groups."""
    group, _, rest = key.partition(".")
    files = [option.replace("=", "/") for option in options if option.startswith(f"{group}=")]
    files += [f"{group}/{default}" for name, default in group_defaults(command).items() if name == group]
    texts = [text for name, _, text in documented_keys(command) if name in (key, key.rpartition(".")[2])]
    return " ".join(texts + [text for file in files for name, _, text in documented_keys(file) if name == rest])


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs a command up to where its own work would begin: (exit status, what it printed as an error)."""
    composed: dict[str, object] = {}
    original = hydra.compose

    def compose_once(name: str, options: list[str], **more) -> object:  # which takes most of the time
        if (place := f"{name} {options}") not in composed:
            composed[place] = original(name, options, **more)
        return composed[place]

    monkeypatch.setattr(hydra, "compose", compose_once)
    body = types.SimpleNamespace(run=lambda config: 0)
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=lambda name: body))
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str) -> tuple[int, str]:
        status = cli.main([command, *arguments])
        shown = capsys.readouterr()
        assert shown.out == "" and list(tmp_path.iterdir()) == []
        return status, shown.err

    return run


def check(answer, cases) -> None:
    wrong = []
    for command, options, key, default, value in cases:
        case = f"{command} {key}={value[:40]!r}"
        status, said = answer(command, *options, f"{key}={value}")
        if status not in (0, 2) or (status == 2) != (said.startswith("error: ") and said.count("\n") == 1):
            wrong.append(f"{case}: status {status}, {said!r}")
        elif status == 0 and must_be_refused(command, options, key, default, value):
            wrong.append(f"{case} is accepted")
        elif status == 2 and key.rpartition(".")[2] not in said and key.split(".")[0] not in said:
            wrong.append(f"{case}: the line does not name it: {said!r}")
        elif status == 2 and "did you mean" in said:
            wrong.append(f"{case}: {said!r}")
    assert [ascii(line) for line in wrong] == []  # half surrogates would break the report of pytest-xdist


def test_a_sample_of_all_wrong_values_is_refused(answer):
    check(answer, random.Random(0).sample(cases(), 250))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_wrong_value_of_every_key_is_refused(answer, part: int):
    check(answer, cases()[part::4])


@pytest.mark.parametrize("value", ["1" * 5000, "2024-13-45", "&a [*a]", "[" * 2000, "!!python/name:os.system", " "])
def test_yaml_that_breaks_its_reader_is_refused(answer, value: str):
    for key in ("seed", "validation_data", "timestep_logit_normal"):
        status, said = answer("train", f"{key}={value}")
        assert (status, said.count("\n")) == (2, 1) and said.startswith(f"error: {key}"), said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "trainable_parameters=all", "trainable_unet_layers=[conv_out]"], "every layer trains, not"),
        (
            ["train", "trainable_parameters=all", "quantization=int8"],
            "quantization=int8 is for frozen weights, and all train",
        ),
        (["train", "data.num_frames=8"], "data.num_frames is 8, but num_frames is 16"),
        (["train", "num_frames=33"], "model.max_frames=32"),
        (["train", "model.keyframe_position=16"], "model.keyframe_position=16"),
        (["train", "validation_prompts=['']"], "validation_prompts is ['']"),
        (["train", "trainable_unet_layers=[.nan]"], "trainable_unet_layers is [nan]"),
        (["train", "seed=4294967296"], "seed is 4294967296"),
        (["train", "adam_beta2=1"], "adam_beta2 is 1"),
        (["train", "fps=1e9"], "fps is '1e9'"),
        (["train", "diffusion.scheduler.beta_schedule=sigmoid"], "'linear', 'scaled_linear' or"),
        (["train", "data=webvid", "data.watermark={action: blur, box: [0, 0, 1, 1]}"], "'crop', 'mask' or 'tag'"),
        (["train", "data=webvid", "data.watermark={box: [0, 0, 1, 1]}"], "it lacks 'action'"),
        (["train", "data=webvid", "data.buckets=[]"], "data.buckets is []"),
        (["train", "validation_data={rot: x}"], "'validation_data' has no argument 'rot'"),
        (["train", "data=joint", "data.parts.images.timeout=-1"], "data.parts.images.timeout is -1"),
        (["train", "output_dir=null"], "output_dir is 'null'"),
        (["evaluate", "evaluation=ucf101", "evaluation.protocol.selection=every_caption"], "needs captions"),
        (["evaluate", "evaluation=ucf101", "evaluation.video.sha256=0123"], "evaluation.video.sha256 is '0123'"),
        (["train", "model.adapter={mode: concat}"], "the key 'model.adapter.num_tokens' is missing"),
        (["train", "unfreeze=[x]"], "unknown key 'unfreeze'; --help lists the keys"),
        (["train", "train=temporal"], "unknown key 'train'; --help lists the keys"),
        (["train", "data.foo=3"], "unknown key 'data.foo'; --help lists the keys"),
        (["train", "guidance_scal=3"], "did you mean 'sampling.guidance_scale'?"),
    ],
)
def test_what_contradicts_or_is_misspelled_is_named(answer, arguments: list[str], said: str):
    status, error = answer(*arguments)
    assert status == 2 and said in error and error.count("\n") == 1, error


def test_leading_zeros_are_no_octal():
    assert compose("train", ["seed=0777", "fps=08"]).seed == 777


def test_what_is_right_is_accepted(answer):
    for arguments in (
        ["train", "data=webvid", "data.buckets=[[16, 64, 64]]", "data.manifest=m.parquet"],
        ["train", "data=webvid", "data.watermark={action: crop, box: [0.2, 0.4, 0.8, 0.6]}"],
        ["train", "data=joint", "data.parts.videos.num_frames=8", "num_frames=16", "data.parts.images.fps=1"],
        ["train", "data.num_frames=8", "num_frames=8", "learning_rate=1e-4", "trainable_unet_layers=[conv_out]"],
        ["train", "data.root=7", "validation_data={clip_position: center}", "validation_prompts=['5']", "use_ema=0"],
        ["sample", "prompt=null hypothesis", "negative_prompt=", "seed=123456789012345678", "video_crf=0"],
        ["evaluate", "evaluation=ucf101", f"evaluation.video.sha256={'0' * 64}", "evaluation.protocol.fps=null"],
    ):
        assert answer(*arguments) == (0, ""), arguments


def test_a_tracker_without_a_login_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)

    def login() -> bool:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "login", login)
    assert cli.main(["train", "report_to=wandb"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: report_to=wandb: No API key configured") and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_walk_meets_every_key_that_is_documented():
    met = {(command, key) for command, _, key, _ in keys()}
    documented = {(command, key) for command in COMPOSITIONS for key, _, _ in documented_keys(command)}
    assert {(command, key) for command, key in documented - met if key != "experiment"} == set()
    assert len(keys()) > 250 and {re.sub(r".*\.", "", key) for _, _, key, _ in keys()} >= {*TEXTS}


def test_defaults_of_every_composition_are_accepted(answer):
    for command, compositions in COMPOSITIONS.items():
        for options in compositions:
            assert answer(command, *options) == (0, "")
