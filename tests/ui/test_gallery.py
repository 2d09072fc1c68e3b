"""Samples as the studio finds them: the config of a record becomes the overrides that make it again."""

import pytest

from microcinema.config.compose import compose, plain
from microcinema.ui.gallery import Model, Result, keyframes, results
from microcinema.utils.errors import UserError
from microcinema.utils.files import write_json

TEXT = "a 'star' = $HOME; \"<b>\" ${seed} {{7*7}} é\n- null"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"prompt={TEXT}"],
        [
            "prompt=a",
            "motion_prompt=null",
            "pipeline=sprites-factorized-dreamer",
            "preset=fast",
            "guidance_scale=1e-05",
        ],
        ["prompt=a", "keyframes=[0:a b.png,15]", "lora=[a.safetensors:0.5]", "guidance_interval=[0.1,0.7]", "fps=1e2"],
        ["prompt=a", "keyframe.lora=[]", "memory.vae_slicing=true", "keyframe.num_inference_steps=3", "output_dir=x"],
    ],
)
def test_the_overrides_of_a_record_compose_to_its_config(overrides, tmp_path):
    config = compose("sample", overrides)
    result = Result(tmp_path / "a.json", {"config": plain(config)})
    again = compose("sample", [*result.overrides(), f"output_dir={config.output_dir}"])
    assert again == config
    names = {"run": lambda config: config, "compose": compose}
    lines = result.python.split("\n\n")[1]
    assert eval(lines, names) == compose("sample", result.overrides())


def test_a_change_keeps_the_key_frame(tmp_path):
    record = {"config": plain(compose("sample", ["prompt=a"])), "files": {"keyframe": "a_keyframe.png"}}
    result = Result(tmp_path / "a.json", record)
    assert result.overrides(seed=4) == ["prompt=a", f"image={tmp_path}/a_keyframe.png", "seed=4"]
    record["config"]["keyframes"] = ["0:a.png", "15:b.png"]  # where no place is that of the prompt's own key frame
    assert "image=" not in str(result.overrides(seed=4))


def test_models_say_what_they_can_do():
    own = Model.of("sprites-microcinema")
    assert own.place == 8 and own.is_embedded and not any(own.can.values())
    assert own.summary.startswith(
        "16 frames of 64x64 at 8 fps, key frame at frame 8. Not trained for a motion caption,"
    )
    other = Model.of("sprites-factorized-dreamer")
    assert [key for key, can in other.can.items() if can] == ["motion_prompt", "num_segments"]
    with pytest.raises(UserError, match=r"pipeline 'nothing' cannot be read \(.*\); check the name"):
        Model.of("nothing")


def test_only_whole_samples_are_in_the_gallery(tmp_path):
    config = plain(compose("sample", ["prompt=a"]))
    for number, name in enumerate(["0002", "0010", "0009"]):
        files = {"video": "a.mp4", "gif": "a.gif", "keyframe": "a_keyframe.png"}
        write_json(tmp_path / name / "a.json", {"config": config, "files": files, "prompt": str(number)})
        write_json(tmp_path / name / "a_keyframe.json", {"prompt": "a", "files": {"keyframe": "a_keyframe.png"}})
        for file in files.values():
            (tmp_path / name / file).touch()
    (tmp_path / "0009" / "a.mp4").unlink()
    (tmp_path / "0009" / "b.json").write_text("[1]")
    assert [result.file.parent.name for result in results(tmp_path)] == ["0010", "0002"]
    assert [(file.parent.name, text) for file, text in keyframes(tmp_path)][:1] == [("0009", "a")]
