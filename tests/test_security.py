"""What comes from elsewhere - model folders, configs of runs, pictures, weights - and what of it may run: nothing.

Pictures are in tests/data/test_images.py, checkpoints in tests/training/test_checkpoint.py, configs of runs in tests/commands/test_export.py,
TorchScript in tests/evaluation.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from fixtures import tiny
from microcinema.config.compose import compose, plain
from microcinema.config.instantiate import Component
from microcinema.evaluation.detectors import load_torchscript
from microcinema.evaluation.weights import weight_file
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.utils.errors import UserError

ROOT = Path(__file__).parents[1]
HOSTILE = "from pathlib import Path\nPath('written').touch()\nfrom diffusers import UNet2DConditionModel as Net, StableDiffusionPipeline as Pipe\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("part", "kind", "file"),
    [
        ("unet", ["net", "Net"], "model/unet/net.py"),  # code in the component's folder
        ("unet", ["net", "Net"], "net.py"),  # in the folder where the command is started
        ("unet", ["os", "system"], "net.py"),
        ("unet", ["diffusersx.net", "Net"], "net.py"),
        ("_class_name", ["pipe", "Pipe"], "model/pipe.py"),  # a pipeline of its own
        ("text_encoder", ["transformers", "AutoModel"], "model/text_encoder/net.py"),  # asks whether it may run code
    ],
)
def test_code_in_or_beside_a_model_folder_is_never_run(base, tmp_path, monkeypatch, part, kind, file):
    folder = shutil.copytree(base, tmp_path / "model")
    (tmp_path / file).write_text(HOSTILE)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: kind}))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "net.Net"}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"the {part} of .* is a {kind[1]} of '{kind[0]}'") as error:
        KeyframePipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert not Path("written").exists()


def test_releases_of_diffusers_that_run_code_of_local_folders_are_excluded():
    bound = re.search(r'"diffusers>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, bound.groups())) >= (0, 38)  # CVE-2026-44513


@pytest.mark.parametrize(
    "target", ["net.Net", "torch.hub.load", "builtins.eval", "microcinema.data.images.os.system", ""]
)
def test_a_target_that_is_not_listed_is_not_even_imported(tmp_path, monkeypatch, target):
    (tmp_path / "net.py").write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="is not allowed"):
        Component(target, {})
    assert not Path("written").exists()


TEXTS = ["${oc.env:SECRET}", "${seed}", "a ${oc.decode:${oc.env:SECRET}} b", "???", r"\${oc.env:SECRET}"]


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", [f"validation_prompts={json.dumps(TEXTS)}"]),
        ("sample", [f"prompt={TEXTS[0]}", f"negative_prompt={TEXTS[1]}", f"keyframe.revision={TEXTS[2]}"]),
        ("train", [f"data.metadata={TEXTS[3]}", f"data.root={TEXTS[4]}", f"model.motion_encoder={TEXTS[0]}"]),
    ],
)
def test_texts_are_literal_wherever_they_stand(monkeypatch, command, overrides):
    monkeypatch.setenv("SECRET", "sesame")
    found = json.dumps(plain(compose(command, overrides)))
    texts = TEXTS if len(overrides) == 1 else [override.partition("=")[2] for override in overrides]
    assert [text for text in texts if json.dumps(text) not in found] == [] and "sesame" not in found


@pytest.mark.parametrize(
    "group", ["model.adapter={{mode: '{}', num_tokens: 16}}", "model.pixels={{block: '{}', scales: null}}"]
)
def test_texts_in_groups_that_are_set_whole_are_literal(monkeypatch, group):
    monkeypatch.setenv("SECRET", "sesame")
    with pytest.raises(UserError) as error:
        compose("train", [group.format("${oc.env:SECRET}")])
    assert "'${oc.env:SECRET}'" in str(error.value) and "sesame" not in str(error.value)


@pytest.mark.parametrize("sha256", ["", "0", "abc", "e3b0c442", " " * 64, "g" * 64, "0" * 63, "0" * 65, "\u0660" * 64])
def test_a_sha256_that_is_none_is_no_check(tmp_path, monkeypatch, sha256):
    (tmp_path / "net.pt").write_bytes(b"x")
    monkeypatch.setenv("MICROCINEMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.jit.load", lambda *_, **__: pytest.fail("it was loaded"))
    for source in (tmp_path / "net.pt", (tmp_path / "net.pt").as_uri()):
        with pytest.raises(UserError, match=r"k\.sha256='.*' is no sha256; give all of its 64"):
            weight_file(str(source), sha256, "k")
        with pytest.raises(UserError, match="is no sha256"):
            load_torchscript(str(source), sha256, "k", "cpu")
    assert not (tmp_path / "cache").exists()
