"""The command line as a user meets it: help, errors in one line, exit codes, a real command."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from microcinema import __version__
from microcinema.commands import cli
from microcinema.config.compose import COMMANDS, compose, config_folder, documented_keys, group_defaults, group_options

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "cv2", "av", "decord", "wandb"}
HEAVY |= {"hydra", "omegaconf", "pydantic", "tensorboard"}


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **more)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", shown, re.MULTILINE) for command in COMMANDS)
    assert set(cli.BODIES) == set(COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_every_key_with_default_and_meaning(command: str, capsys: pytest.CaptureFixture):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for key in compose(command):
        assert re.search(rf"^  {key}[=.].* \w+", shown, re.MULTILINE) or key in group_defaults(command), key
    for group in group_defaults(command):
        assert re.search(rf"^  {group}=\S+ +\w.*: .*{group_options(group)[0]}", shown, re.MULTILINE), group


FILES = sorted(path.relative_to(config_folder()).with_suffix("") for path in config_folder().rglob("*.yaml"))


@pytest.mark.parametrize(
    "name", [str(name) for name in FILES if name.parts[0] not in ("ablation", "accelerate", "experiment")]
)
def test_every_key_in_every_file_has_a_meaning(name: str):
    assert [key for key, _, meaning in documented_keys(name) if not meaning] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import microcinema; from microcinema.commands import cli; from microcinema.config.compose import COMMANDS;"
        "[cli.main([*command, '--help']) for command in ([], *([name] for name in COMMANDS))];"
        f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = run("-c", code)
    assert done.stdout.splitlines()[-1].strip() == "loaded:", done.stdout[-200:] + done.stderr


def test_version(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--no-such-option"]])
def test_what_argparse_refuses_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["prepare", "num_video=3"], "did you mean 'num_videos'?"),
        (["prepare", "num_videos=three"], "'three'"),
        (["train", "model=nothing"], "there are"),
        (["sample", "num_frames=0"], "num_frames is 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_traceback_on_request(capsys: pytest.CaptureFixture):
    assert cli.main(["prepare", "num_videos=three", "--traceback", "seed=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(_):
        raise KeyboardInterrupt

    body = types.SimpleNamespace(run=interrupted)
    monkeypatch.setitem(
        sys.modules, "microcinema.commands.prepare_sprites", body
    )  # as if control-C were pressed in the command
    assert cli.main(["prepare"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "prepare"])  # those for `accelerate launch`
def test_a_script_is_the_command(command: str):
    done = run(str(ROOT / "scripts" / f"{command}.py"), "no_such_key=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown key 'no_such_key'")
