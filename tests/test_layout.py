"""Every module of the package has a test file of its name, or a place where it is tested; tests import no other test file."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "microcinema"
TESTED_IN = {
    "commands/prepare_preview": "data/test_watermark.py",
    "commands/train": "training/test_trainer.py",
    "models/lora": "training/test_lora.py",
    "commands/ui": "ui/test_page.py",
    "config/help": "commands/test_cli.py",
    "config/instantiate": "config/test_compose.py",
    "config/network": "models/test_video_unet.py",
    "config/sampling": "pipelines/test_image_to_video.py",
    "config/schema": "config/test_compose.py",
    "config/types": "config/test_compose.py",
    "data/buckets": "data/test_ordering.py",
    "data/clip_reader": "data/test_clips.py",
    "data/decoder_process": "data/test_quarantine.py",
    "data/keyframe_index": "diffusion/test_diffusion.py",
    "data/latent_writer": "data/test_latents.py",
    "data/manifest": "commands/test_prepare_check.py",
    "data/quality_check": "commands/test_prepare_check.py",
    "data/quality_report": "commands/test_prepare_check.py",
    "data/source": "data/test_indexed.py",
    "data/video_writer": "data/test_video_reader.py",
    "diffusion/guidance": "diffusion/test_diffusion.py",
    "diffusion/losses": "diffusion/test_diffusion.py",
    "diffusion/noise_prior": "diffusion/test_diffusion.py",
    "diffusion/rng": "diffusion/test_diffusion.py",
    "diffusion/schedule": "diffusion/test_diffusion.py",
    "evaluation/generate": "commands/test_evaluate_zero_shot.py",
    "evaluation/report": "commands/test_evaluate_zero_shot.py",
    "evaluation/sweep_table": "commands/test_sweep.py",
    "evaluation/videos": "evaluation/test_protocol.py",
    "evaluation/zero_shot": "commands/test_evaluate_zero_shot.py",
    "models/attention": "models/test_temporal.py",
    "models/image_adapter": "models/test_factorized.py",
    "models/pixel_attention": "models/test_factorized.py",
    "models/predict_net": "models/test_factorized.py",
    "models/unet2d": "models/test_video_unet.py",
    "models/unet3d": "models/test_appearance.py",
    "models/weights": "models/test_video_unet.py",
    "pipelines/clip_sampler": "pipelines/test_keyframe_places.py",
    "pipelines/components": "pipelines/test_base_model.py",
    "pipelines/encoders": "pipelines/test_factorized_pipeline.py",
    "pipelines/loading": "pipelines/test_base_model.py",
    "pipelines/sample_folder": "commands/test_sample.py",
    "sprites/backgrounds": "sprites/test_portable_math.py",
    "sprites/dataset": "sprites/test_scene.py",
    "sprites/flow": "sprites/test_scene.py",
    "sprites/metrics": "sprites/test_evaluate.py",
    "training/batch_encoder": "data/test_latents.py",
    "training/build": "profiling/test_memory_estimate.py",
    "training/cached_latents_check": "data/test_latents.py",
    "training/distributed": "training/test_launching.py",
    "training/ema": "training/test_checkpoint.py",
    "training/preemption": "training/test_killed.py",
    "training/resume": "training/test_checkpoint.py",
    "utils/logging": "commands/test_sample.py",
    "utils/templates": "commands/test_export.py",
}
"""Modules without a test file of their own, and the file that tests them through what they are part of."""


def modules() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(path.as_posix() for path in files if not path.name.startswith("__"))


@pytest.mark.parametrize("module", modules())
def test_module_is_tested(module: str):
    folder, _, name = module.rpartition("/")
    own = TESTS / folder / f"test_{name}.py"
    assert own.is_file() != (module in TESTED_IN), "give the module a test file, or name the file that tests it here"
    assert own.is_file() or (TESTS / TESTED_IN[module]).is_file()


def test_table_names_modules_that_exist():
    assert set(TESTED_IN) <= set(modules())


def test_tests_import_no_other_test_file():
    files = [*TESTS.rglob("*.py")]
    imports = re.compile(r"^\s*(?:from|import) .*\b(?:tests\.|test_\w+)", re.MULTILINE)
    assert [path.name for path in files if imports.search(path.read_text(encoding="utf-8"))] == []


def test_each_module_of_fixtures_is_used():
    text = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py"))
    names = [path.stem for path in (TESTS / "fixtures").glob("*.py")]
    assert [
        name for name in names if not re.search(rf"from fixtures(\.{name} import|\s+import .*\b{name}\b)", text)
    ] == []
