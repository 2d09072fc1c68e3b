"""The command line as a user meets it: help, errors in one line, exit codes, a real command."""

import gc
import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fixtures import launched_processes
from microcinema import __version__
from microcinema.commands import cli
from microcinema.commands.cli import COMMANDS
from microcinema.config.compose import compose, load
from microcinema.config.help import config_folder, documented_keys, group_defaults, group_options

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "cv2", "av", "decord", "wandb"}
HEAVY |= {"hydra", "omegaconf", "pydantic", "tensorboard"}


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **more)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", shown, re.MULTILINE) for command in COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_every_key_with_default_and_meaning(command: str, capsys: pytest.CaptureFixture):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    command = COMMANDS[command].config or command
    for key in vars(compose(command)):
        assert re.search(rf"^  {key}[=.].* \w+", shown, re.MULTILINE) or key in group_defaults(command), key
    for group in group_defaults(command):
        assert re.search(rf"^  {group}=\S+ +\w.*: .*{group_options(group)[0]}", shown, re.MULTILINE), group


FILES = sorted(path.relative_to(config_folder()).with_suffix("") for path in config_folder().rglob("*.yaml"))


@pytest.mark.parametrize(
    "name", [str(name) for name in FILES if name.parts[0] not in ("accelerate", "experiment", "sweep")]
)
def test_every_key_in_every_file_has_a_meaning(name: str):
    assert [key for key, _, meaning in documented_keys(name) if not meaning] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import microcinema; from microcinema.commands import cli; from microcinema.commands.cli import COMMANDS;"
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
        (["prepare", "sprites", "num_video=3"], "did you mean 'num_videos'?"),
        (["prepare", "sprites", "num_videos=three"], "'three'"),
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
    assert cli.main(["prepare", "sprites", "num_videos=three", "--traceback", "seed=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(_):
        raise KeyboardInterrupt

    body = types.SimpleNamespace(run=interrupted)
    monkeypatch.setitem(
        sys.modules, "microcinema.commands.prepare_sprites", body
    )  # as if control-C were pressed in the command
    assert cli.main(["prepare", "sprites"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "prepare latents"])  # those for `accelerate launch`
def test_a_script_is_the_command(command: str):
    script, *rest = command.split()
    done = run(str(ROOT / "scripts" / f"{script}.py"), *rest, "no_such_key=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown key 'no_such_key'")


def test_prepare_alone_shows_what_there_is(capsys: pytest.CaptureFixture):
    assert cli.main(["prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("prepare sprites", "prepare check", "prepare latents"))
    assert "train" not in re.findall(r"^  (\w+)", shown, re.MULTILINE)
    assert cli.main(["prepare", "num_videos=3"]) == 2
    assert capsys.readouterr().out == shown


def test_the_module_is_the_command():
    done = run("-m", "microcinema", "sample", "no_such_key=1")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown key 'no_such_key'")


def test_config_dir_is_the_folder_of_the_files(capsys: pytest.CaptureFixture):
    assert cli.main(["--config-dir"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "accelerate" / "ddp.yaml").is_file()


def test_help_of_a_composition_has_its_keys_and_values(capsys: pytest.CaptureFixture):
    overrides = [
        "experiment=factorized_dreamer_sd15",
        "data=joint",
        "seed=7",
        "data.parts.videos.watermark={action: tag}",
    ]
    assert cli.main(["train", *overrides, "--help"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "model=factorized_dreamer +the networks",  # which the experiment chooses
        "seed=7 +\\w",
        "trainable_parameters=all ",
        "keys of diffusion=factorized_dreamer:",
        "data.parts.videos.watermark={action: tag} ",
        "data.parts.images.num_frames=1 ",
    ):
        assert re.search(line.replace("\\\\", "\\"), shown), line
    assert cli.main(["train", "model=nothing", "--help"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_print_config_prints_what_a_run_would_save(tmp_path: Path, capsys: pytest.CaptureFixture):
    overrides = ["data=webvid", "learning_rate=3e-4", f"output_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *overrides, "--print-config"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "config.yaml", "train") == compose("train", overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["sample"], "give one of prompt= and prompts="),
        (["sample", "prompt= "], "give one of prompt= and prompts="),
        (["sample", "prompt=a star", "prompts=x.csv"], "give one of prompt= and prompts="),
        (["sample", "prompts=/nowhere.csv"], "prompts '/nowhere.csv' is not there"),
        (["sample", "prompt=a star", "image=/nowhere.png"], "image '/nowhere.png' is not there"),
        (["sample", "prompt=a star", "output_dir="], "output_dir is ''"),
        (["train", "output_dir= "], "output_dir is ' '"),
        (["export"], "give checkpoint="),
        (["export", "checkpoint=/nowhere"], "checkpoint '/nowhere' is not there"),
        (["evaluate", "generated_dir=/nowhere"], "generated_dir '/nowhere' is not there"),
        (["prepare", "latents"], "give cached_latents="),
    ],
)
def test_missing_input_is_refused_at_once(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1 and shown.out == ""


def test_missing_input_is_refused_before_torch_is_imported():
    heavy = HEAVY - {"hydra", "omegaconf", "pydantic"}
    code = (
        "import sys; from microcinema.commands import cli;"
        "commands = ['sample'], ['sample', 'prompts=/no.csv'], ['train', 'output_dir='], ['export', 'checkpoint=/no'];"
        "assert [cli.main(command) for command in commands] == [2] * 4;"
        f"print('loaded:', *(name for name in {heavy} if name in sys.modules))"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "loaded:", done.stdout[-200:] + done.stderr


class SafetensorError(Exception):
    """As safetensors has it."""


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device", b"/x/events"), r"'/x/events' \(No space left on device\)"),
        (OSError("100 requested and 3 written"), r" \(100 requested and 3 written\)"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "failed writing"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_in_every_command(command, error, reason, tmp_path, monkeypatch, capsys):
    def run(config):
        raise error

    monkeypatch.setitem(
        sys.modules, f"microcinema.commands.{command.replace(' ', '_')}", types.SimpleNamespace(run=run)
    )
    folder = COMMANDS[command].folder or "output_dir"
    arguments = (
        ENOUGH.get(command, ()) if "preview" in command else [*ENOUGH.get(command, ()), f"{folder}={tmp_path}/new/out"]
    )
    arguments = [str(tmp_path)] if command == "watch" else arguments  # which has to be there
    assert cli.main([*command.split(), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: cannot read or write .*{reason}.*; free disk space", line)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "microcinema.commands.sample", types.SimpleNamespace(run=lambda config: {}["x"]))
    with pytest.raises(KeyError):
        cli.main(["sample", "prompt=a star", f"output_dir={tmp_path}"])


def test_a_disk_that_is_full_in_fact_leaves_nothing(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert (
            cli.main(["prepare", "sprites", f"output_dir={tmp_path}/new", "num_videos=1", "size=32", "num_frames=2"])
            == 2
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "(File too large); free disk space" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for arguments in (["prompt=a star", f"image={tmp_path}/pipe"], [f"prompts={tmp_path}/pipe"], ["prompts=/dev/zero"]):
        assert cli.main(["sample", *arguments]) == 2
        assert re.search("is no file; check the path", capsys.readouterr().err)


ENOUGH = {"sample": ["prompt=a star"], "export": ["checkpoint=/tmp"], "prepare latents": []}


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if entry.folder])
def test_a_folder_that_another_process_writes_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    hold = f"import time; from microcinema.utils import files; c = files.lock_folder({str(tmp_path)!r}); c.__enter__()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        before = {path: path.read_text() for path in tmp_path.iterdir()}
        arguments = [*command.split(), *ENOUGH.get(command, ()), f"{COMMANDS[command].folder}={tmp_path}"]
        assert cli.main(arguments) == 2
        assert f"error: '{tmp_path}' is in use by process {holder.pid} on" in capsys.readouterr().err
        assert {path: path.read_text() for path in tmp_path.iterdir()} == before
        holder.kill()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory):
    server = launched_processes.Processes(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "seed=x"], "seed is 'x'"),  # found in the config
        (["train", "base.pretrained_model_name_or_path=no-such-model"], "no-such-model"),  # found by the run
    ],
)
def test_an_error_of_two_processes_is_printed_once(
    arguments: list[str], said: str, processes: launched_processes.Processes, tmp_path: Path
):
    ended = processes.run([*arguments, f"output_dir={tmp_path / 'run'}"], processes=2)
    errors = [line for process in ended for line in process.said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and said in errors[0], [process.said for process in ended]
    assert ended[0].status == 2


def test_help_may_be_cut_by_its_reader():
    command = f"'{sys.executable}' -m microcinema train --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: microcinema train")


def test_a_command_is_imported_without_looking_for_garbage(tmp_path, monkeypatch):
    frozen, name = [], "a_command_of_this_test"
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text("import gc\nenabled = gc.isenabled()\n")
    (tmp_path / "broken_command.py").write_text("1 / 0")
    module = cli.import_command(name)
    assert (module.enabled, gc.isenabled(), frozen) == (False, True, [False])
    assert cli.import_command(name) is sys.modules.pop(name) and len(frozen) == 1  # later calls leave no garbage behind
    with pytest.raises(ZeroDivisionError):
        cli.import_command("broken_command")
    assert gc.isenabled()
