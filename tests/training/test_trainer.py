import importlib.util
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from wandb.sdk.wandb_run import Run

from fixtures import tiny, tiny_training
from fixtures.tiny_training import LatentClips, PoisonedClips, logged, pipeline, train, weights
from microcinema.commands import cli
from microcinema.config.schema import DataParallel, LoRA
from microcinema.data.clips import ClipDataset
from microcinema.diffusion.rng import generator
from microcinema.models.vae import encode_pixels
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites.dataset import write_dataset
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.training.loss import LossConfig, TrainableModel, training_loss
from microcinema.training.trainer import Trainer, make_optimizer
from microcinema.training.validation import Validation
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Six clips of Moving Sprites, 16 frames each: real mp4 files."""
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(folder, num_videos=6, seed=0)
    return folder


def clip_dataset(folder: Path, **settings) -> ClipDataset:
    return ClipDataset(
        folder / "clips.csv", folder, tiny_training.FRAMES, 8.0, tiny.SIZE, clip_position="random", **settings
    )


class BreakOff(Exception):
    pass


class Fuse:
    """Lets a data set deliver this many clips and then breaks the run off."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, index: int) -> None:
        if self.left == 0:
            raise BreakOff
        self.left -= 1


# What a run learns


def test_training_lowers_the_loss_of_the_clips_it_saw(tmp_path):
    model, dataset = pipeline(tmp_path), LatentClips(2)
    config = LossConfig(model.training_scheduler, model.noise_prior, "first", None, 0.0, None, 0.0, 0.0, 0.0, seed=99)
    encode = BatchEncoder(model, torch.device("cpu"))

    @torch.no_grad()
    def loss() -> float:
        items = torch.utils.data.default_collate([{**dataset[k % 2], "sample_index": k} for k in range(16)])
        batch = encode(items)
        noise = config.sample_noise_and_timesteps(batch.indices, batch.latents.shape[1:])
        denoiser = TrainableModel(model.unet)
        return training_loss(denoiser, batch, noise, encode.null_conditioning(), config).total.mean().item()

    before = loss()
    train(
        model,
        dataset,
        tmp_path / "run",
        max_train_steps=16,
        lr_warmup_steps=0,
        learning_rate=3e-3,
        use_ema=False,
        report_to=None,
    )
    assert loss() < 0.9 * before


@pytest.mark.parametrize(
    ("which", "trainable_unet_layers"), [("temporal", []), ("temporal", ["up_blocks.1"]), ("all", [])]
)
def test_only_what_is_to_be_trained_changes(tmp_path, which, trainable_unet_layers):
    model = pipeline(tmp_path)
    before = {name: parameter.clone() for name, parameter in model.unet.named_parameters()}
    added = {id(parameter) for parameter in model.unet.new_parameters()}
    settings = {
        "trainable_parameters": which,
        "trainable_unet_layers": trainable_unet_layers,
        "max_train_steps": 2,
        "report_to": None,
    }
    train(model, LatentClips(), tmp_path / "run", **settings)
    state = torch.load(tmp_path / "run/checkpoint-2/optimizer.bin", weights_only=True)
    trained = [p for p in model.unet.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(trained)
    for name, parameter in model.unet.named_parameters():
        frozen = (
            which == "temporal" and id(parameter) not in added and not name.startswith(tuple(trainable_unet_layers))
        )
        assert parameter.requires_grad is not frozen
        if frozen:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    changed = [name for name, parameter in model.unet.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed
    if which == "all" or trainable_unet_layers:
        assert any(id(parameter) not in added for name, parameter in model.unet.named_parameters() if name in changed)


def test_gradients_of_frozen_layers_are_not_even_built(tmp_path):
    """The graph of a loss ends in what trains, and nowhere else; a weight without an end there has no gradient to compute."""
    model = pipeline(tmp_path)
    trainer = Trainer(
        tiny_training.accelerator(config := tiny_training.make_config(tmp_path / "run")), model, LatentClips(), config
    )
    pending, seen, ends = [trainer.loss(next(trainer._micro_batches())).grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            ends |= {id(node.variable)} if hasattr(node, "variable") else set()
    trained = {id(parameter) for parameter in trainer.trained.values()}
    assert ends == trained and trained < {id(parameter) for parameter in model.unet.parameters()}


def test_averages_follow_their_recurrence_and_are_what_is_saved(tmp_path):
    model = pipeline(tmp_path)
    start = {f"unet.{name}": p.clone() for name, p in model.unet.named_parameters()}
    run = train(
        model, LatentClips(), tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=None, ema_decay=0.5
    )
    name = next(
        name
        for name in json.loads((run / "checkpoint-1/training_state.json").read_text())["trained"]
        if "temporal" in name
    )
    average = start[name]
    for step in range(1, 5):
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))  # (1 + n) / (10 + n), n = step - 1
        found = weights(run / f"checkpoint-{step}")
        now = found[f"unet/diffusion_pytorch_model.safetensors:{name.removeprefix('unet.')}"]
        average = decay * average + (1 - decay) * now
        torch.testing.assert_close(found[f"ema.safetensors:{name}"], average)
    saved = load_pipeline(run)
    torch.testing.assert_close(dict(saved.unet.named_parameters())[name.removeprefix("unet.")], average)
    # The model in memory goes on from its own weights.
    assert torch.equal(dict(model.unet.named_parameters())[name.removeprefix("unet.")], now)


def test_learning_rate_warms_up_over_optimiser_steps(tmp_path):
    settings = {"max_train_steps": 4, "lr_warmup_steps": 3, "learning_rate": 3e-3, "gradient_accumulation_steps": 2}
    run = train(pipeline(tmp_path), LatentClips(), tmp_path / "run", train_batch_size=1, **settings)
    rates = logged(run, "lr")
    assert [rates[step] for step in range(1, 5)] == pytest.approx([0, 1e-3, 2e-3, 3e-3])


def test_what_is_logged(tmp_path):
    run = train(pipeline(tmp_path), LatentClips(), tmp_path / "run", max_train_steps=2, train_batch_size=8)
    loss = logged(run)[2]
    quarters = [logged(run, f"loss/t{k}").get(2) for k in range(1, 5)]
    assert min(q for q in quarters if q is not None) <= loss <= max(q for q in quarters if q is not None)
    assert logged(run, "grad_norm")[1] > 0
    assert logged(run, "clips_per_second")[2] > 0
    assert 0 <= logged(run, "data_wait")[2] <= 1
    assert 0 < logged(run, "mfu")[2] < 1
    assert 0.05 < logged(run, "peak_memory_gib")[1] <= logged(run, "peak_memory_gib")[2] < 100


def test_wandb_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent, log = [], Run.log
    monkeypatch.setattr(Run, "log", lambda run, data, *rest, **more: sent.append(data) or log(run, data, *rest, **more))
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(tmp_path / "keyframe.png")
    settings = tiny_training.make_config(tmp_path / "run", **{"max_train_steps": 1, "report_to": "wandb"})
    accelerator, keyframes = tiny_training.accelerator(settings), KeyframePipeline(tmp_path / "keyframe.png")
    validation = Validation(accelerator, pipeline(tmp_path), keyframes, ["a star"], tmp_path / "run")
    Trainer(accelerator, pipeline(tmp_path), LatentClips(), settings, validation).train()
    assert list(tmp_path.rglob("*.wandb"))
    (media,) = tmp_path.rglob("files/media/videos/validation/*.gif")
    assert media.read_bytes() == (tmp_path / "run/validation/step-1/0.gif").read_bytes()
    figures = {"loss", "grad_norm", "lr", "clips_per_second", "data_wait", "broken_clips"}
    figures |= {"mfu", "peak_memory_gib", "checkpoint_seconds", "validation_seconds", "validation/0"}
    figures |= {f"validation/{name}" for name in ("keyframe_psnr", "keyframe_ssim", "motion_magnitude")}
    assert figures <= {name for values in sent for name in values}


# Exactness


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_memory_savers_train_alike(tmp_path, changes):
    plain = train(pipeline(tmp_path), LatentClips(), tmp_path / "plain", max_train_steps=2)
    saving = train(pipeline(tmp_path), LatentClips(), tmp_path / "saving", max_train_steps=2, **changes)
    tolerance = 2e-2 if "mixed_precision" in changes else 1e-6
    for step, loss in logged(plain).items():
        assert logged(saving)[step] == pytest.approx(loss, abs=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in weights(saving / "checkpoint-2").values())


def test_frozen_weights_in_eight_bits_train_nearly_alike_and_are_saved_as_they_were(tmp_path):
    settings = {"checkpointing_steps": 2, "checkpoints_total_limit": None, "trainable_unet_layers": ["up_blocks.1"]}
    train(pipeline(tmp_path), LatentClips(), tmp_path / "plain", **settings)
    settings |= {"quantization": "int8"}
    model, plain = pipeline(tmp_path), pipeline(tmp_path).unet.state_dict()
    train(model, LatentClips(), tmp_path / "int8", **settings)
    stored = {name for name, parameter in model.unet.named_parameters() if parameter.dtype == torch.int8}
    assert len(stored) > 50 and not any(name.startswith(("up_blocks.1", "temporal_")) for name in stored)
    one, other = logged(tmp_path / "plain"), logged(tmp_path / "int8")
    assert one != other and other == pytest.approx(one, abs=5e-3)
    for folder in ("int8/checkpoint-2", "int8/checkpoint-4", "int8"):
        saved = load_file(tmp_path / folder / "unet/diffusion_pytorch_model.safetensors")
        assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in stored)
    shutil.copytree(tmp_path / "int8/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    train(pipeline(tmp_path), LatentClips(), tmp_path / "resumed", resume_from_checkpoint="latest", **settings)
    one, other = (weights(tmp_path / run / "checkpoint-4") for run in ("int8", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, clips):
    """Bit for bit: weights, averages, optimiser and losses; real files, random parts of them, a worker, over the end of an epoch."""
    settings = {"checkpointing_steps": 2, "dataloader_num_workers": 1, "checkpoints_total_limit": None}
    train(pipeline(tmp_path), clip_dataset(clips), tmp_path / "whole", **settings)

    broken = clip_dataset(clips)
    fuse = Fuse(6)
    read = broken.__class__.__getitem__

    class Breaking(ClipDataset):
        def __getitem__(self, index):
            fuse(index)
            return read(self, index)

    broken.__class__ = Breaking
    with pytest.raises(BreakOff):
        train(pipeline(tmp_path), broken, tmp_path / "parts", **{**settings, "dataloader_num_workers": 0})
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-2"]
    torch.manual_seed(12345)  # nothing may hang on the state that the resuming process happens to start in
    train(
        pipeline(tmp_path, seed=7),
        clip_dataset(clips),
        tmp_path / "parts",
        resume_from_checkpoint="latest",
        **settings,
    )
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    one, other = (weights(tmp_path / run) for run in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (
        torch.load(tmp_path / run / "checkpoint-4/optimizer.bin", weights_only=True)["state"]
        for run in ("whole", "parts")
    )
    assert all(torch.equal(one[k][name], other[k][name]) for k in one for name in one[k])


LORA = LoRA(rank=2, alpha=2.0, targets="both", dropout=0.0)


@pytest.mark.slow
def test_batch_size_accumulation_and_number_of_processes_change_no_loss(tmp_path, monkeypatch):
    """Global batches of four, also over two real processes, of which each is interrupted and resumed."""
    plain = train(pipeline(tmp_path), LatentClips(), tmp_path / "1x4", train_batch_size=4)
    parts = train(
        pipeline(tmp_path), LatentClips(), tmp_path / "2x2", train_batch_size=2, gradient_accumulation_steps=2
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Else accelerate gives each process all cores, and OpenMP's threads spin while they wait for one another.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_two_processes, (port, tmp_path), nprocs=2)
    wanted = logged(plain)
    assert len(wanted) == 4
    for run in (parts, tmp_path / "two", tmp_path / "two-parts"):
        assert logged(run) == pytest.approx(wanted, abs=1e-5), run
    settings = {"lora": LORA, "init_weights_from": "a model", "train_batch_size": 4}
    one_process = train(pipeline(tmp_path), LatentClips(), tmp_path / "lora-1", **settings)
    assert logged(tmp_path / "lora") == pytest.approx(logged(one_process), abs=1e-5)
    one, other = weights(tmp_path / "two"), weights(tmp_path / "two-parts")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    # Gradients that were averaged in fp16: other bits, alike losses.
    fp16 = weights(tmp_path / "fp16")
    assert logged(tmp_path / "fp16") == pytest.approx(wanted, abs=2e-3)
    assert any(not torch.equal(fp16[key], value) for key, value in one.items())
    # The prompts of validation were shared out, and validating changed nothing of the training.
    videos = {path.name for path in (tmp_path / "two/validation/step-4").glob("*.mp4")}
    assert videos == {"0.mp4", "1.mp4", "2.mp4"}
    # Every process left its part of the checkpoint.
    names = {path.name for path in (tmp_path / "two-parts/checkpoint-4").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "optimizer.bin", "unet"} <= names
    assert len(list((tmp_path / "poisoned/not_finite").iterdir())) == 1


def _two_processes(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        ACCELERATE_USE_CPU="true",
    )
    own = folder / f"process-{rank}"
    own.mkdir()
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(own / "keyframe.png")
    prompts = ["a red star", "a blue circle", "a green moon"]

    def run(name: str, seed: int = 0, validates: bool = False, clips: type = LatentClips, **changes: Any) -> None:
        settings = tiny_training.make_config(folder / name, **{"checkpointing_steps": 2, **changes})
        accelerator = tiny_training.accelerator(settings)
        assert accelerator.num_processes == 2
        validate = None
        if validates:
            keyframes = KeyframePipeline(own / "keyframe.png")
            validate = Validation(accelerator, pipeline(own, seed), keyframes, prompts, folder / name)
        trainer = Trainer(accelerator, pipeline(own, seed), clips(), settings, validate)
        model = trainer.model
        assert isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view
        assert model.bucket_bytes_cap == settings.ddp.bucket_cap_mb * 2**20
        trainer.train()

    run("two", validates=True)
    run("fp16", ddp=DataParallel("fp16", bucket_cap_mb=1))
    with pytest.raises(UserError, match="comm_hook=bf16 needs GPUs"):  # torch refuses it over gloo
        run("bf16", ddp=DataParallel("bf16", bucket_cap_mb=1))
    run("lora", lora=LORA, init_weights_from="a model")
    run("two-parts", max_train_steps=2)
    run("two-parts", seed=5, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="the loss is nan"):  # both, or the other would wait for ever
        run("poisoned", clips=PoisonedClips)


def test_raw_clips_train_on_the_latents_that_a_cache_would_hold(tmp_path):
    model = pipeline(tmp_path)
    vae = model.vae
    frames = torch.randint(256, (3, 2, 3, tiny.SIZE, tiny.SIZE), generator=generator(1), dtype=torch.uint8)
    video = frames / 127.5 - 1
    items = {"video": frames, "caption": ["a", "b", "c"], "fps": torch.full((3,), 8.0), "sample_index": torch.arange(3)}
    batch = BatchEncoder(model, torch.device("cpu"))(items)
    for clip, latents in zip(video, batch.latents, strict=True):
        assert torch.equal(latents, encode_pixels(vae, clip[None])[0])  # whatever the batch
    mean = vae.encode(video[0]).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(batch.latents[0], mean)
    with pytest.raises(UserError, match=r"frames of the clips are torch.float32; a data set gives them as uint8"):
        BatchEncoder(model, torch.device("cpu"))({**items, "video": video})


def test_the_captions_of_a_batch_are_encoded_together_each_once():
    asked = []

    def encode(captions):
        asked.append(captions)
        return torch.tensor([float(len(caption)) for caption in captions], dtype=torch.float16)[:, None, None]

    encoder = BatchEncoder(SimpleNamespace(uses_motion_caption=False, encode_text=encode), torch.device("cpu"))
    text = encoder.text({"caption": ["a", "bb", "a"]})
    assert text.flatten().tolist() == [1, 2, 1] and text.dtype == torch.float32
    assert encoder.null_conditioning().text.tolist() == encoder.null_conditioning().text.tolist() == [[[0.0]]]
    assert asked == [["a", "bb"], [""]]  # the empty caption is kept


# The command


def test_the_command_trains_validates_and_saves(tmp_path, clips):
    tiny.base_folder(tmp_path / "base")
    run = tmp_path / "run"
    tiny_training.reset_accelerator()
    code = cli.main(
        [
            "train",
            f"base.pretrained_model_name_or_path={tmp_path / 'base'}",
            f"data.root={clips}",
            f"output_dir={run}",
            f"resolution={tiny.SIZE}",
            "num_frames=4",
            "max_train_steps=2",
            "train_batch_size=2",
            "model=plain",
            "model.keyframe_position=center",
            "trainable_parameters=all",  # or the base's prediction type could not be changed
            "diffusion.scheduler.prediction_type=v_prediction",
            "validation_prompts=[a red star, a blue circle]",
        ]
    )
    assert code == 0
    saved = load_pipeline(run)
    assert saved.unet.options.keyframe_concat
    assert saved.training_scheduler.config["prediction_type"] == "v_prediction"
    assert (saved.keyframe_position, saved.config["num_frames"], saved.config["height"]) == ("center", 4, tiny.SIZE)
    assert yaml.safe_load((run / "config.yaml").read_text())["max_train_steps"] == 2
    assert json.loads((run / "environment.json").read_text())[0]["num_processes"] == 1
    assert {path.name for path in (run / "validation/step-2").iterdir()} == {
        "0.mp4",
        "0.gif",
        "1.mp4",
        "1.gif",
        "contact_sheet.png",
    }
    assert not list(run.glob(".*"))


def test_the_command_that_is_asked_to_end_says_so_and_goes_on(tmp_path, clips, capsys, monkeypatch):
    tiny.base_folder(tmp_path / "base")
    run = tmp_path / "run"
    small = [f"resolution={tiny.SIZE}", "num_frames=4", "max_train_steps=2", "train_batch_size=1", "model=plain"]
    where = [f"base.pretrained_model_name_or_path={tmp_path / 'base'}", f"data.root={clips}", f"output_dir={run}"]
    command = [
        "train",
        *where,
        *small,
        "dataloader_num_workers=0",
        "resume_from_checkpoint=latest",
        "report_to=null",
        "logging_steps=1",
    ]

    def call(*overrides: str) -> int:
        tiny_training.reset_accelerator()
        return cli.main([*command, *overrides])

    step = Trainer.step

    def signaled(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        step(*arguments)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "step", signaled)
        assert call() == 75
    assert "saved step 1 of 2; continue with resume_from_checkpoint=latest" in capsys.readouterr().out
    assert (run / "checkpoint-1").is_dir() and not (run / "model_index.json").exists()
    before = (run / "config.yaml").read_bytes()
    assert call("seed=1") == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before  # a run that is refused leaves no trace
    assert call() == 0
    assert (run / "model_index.json").exists()


def test_a_bad_clip_is_told_in_one_line(tmp_path, clips, capsys):
    tiny.base_folder(tmp_path / "base")
    tiny_training.reset_accelerator()
    arguments = [
        "train",
        f"base.pretrained_model_name_or_path={tmp_path / 'base'}",
        f"data.root={clips}",
        f"output_dir={tmp_path / 'run'}",
        f"resolution={tiny.SIZE}",
        "num_frames=17",
        "dataloader_num_workers=1",
    ]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and ".mp4" in message and "17" in message
    assert not (tmp_path / "run/model_index.json").exists()


# Bad input


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the command silences it
@pytest.mark.parametrize("then", ["nothing", pytest.param("a file", marks=pytest.mark.slow)])
def test_a_folder_that_vanishes_in_mid_run_is_told_as_a_failed_checkpoint_is(tmp_path, then):
    run = tmp_path / "run"

    def vanish(index):
        if (run / "logs/microcinema").is_dir():
            shutil.rmtree(run)
            if then == "a file":
                run.write_text("")

    clips = LatentClips(on_read=vanish)
    with pytest.raises(
        UserError, match=f"cannot write to '{run}' \\((No such file or|Not a) directory.*resume from the last"
    ) as error:
        train(pipeline(tmp_path), clips, run, max_train_steps=100, report_to="tensorboard", checkpointing_steps=100)
    assert "\n" not in str(error.value)


def test_a_run_that_is_refused_removes_nothing(tmp_path, capsys):
    names = ["thesis.old", ".thesis.old", ".thesis.partial", "quarantine/thesis", f".a.{2**22 + 1}.microcinema-partial"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    assert cli.main(["train", f"output_dir={tmp_path}", "base.pretrained_model_name_or_path=no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {*names}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 0},
        {"train_batch_size": 0},
        {"gradient_accumulation_steps": -1},
        {"seed": -1},
        {"text_dropout": 1.5},
        {"learning_rate": 0.0},
        {"checkpoints_total_limit": 0},
        {"timestep_logit_normal": (0.0, 0.0)},
        {"report_to": "paper"},
        {"mixed_precision": "fp8"},
    ],
)
def test_settings_that_cannot_work_are_named(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        tiny_training.make_config("x", **changes)


def test_8bit_adam_needs_its_library():
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(UserError, match="bitsandbytes"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], tiny_training.make_config("x", use_8bit_adam=True))
