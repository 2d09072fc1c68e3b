"""A data set's clips encoded by the VAE once, kept on disk with the fingerprint of everything that made them.

A cache is a folder: `latents.safetensors` (one tensor `latents`, float16, n f c h w) and `clips.json` (captions, fingerprint). What is kept
is the posterior's mean in the scale that the denoiser works in, `(mean - shift_factor) * scaling_factor`; its spread is not kept. Where asked
for there are `keyframe` (uint8, n 3 H W) and the teacher's `flow` (float16, n f-1 2 h w) with `flow_valid` (bool, n f-1 h w) in it as well.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import einops
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from microcinema.data.clips import ClipDataset
from microcinema.data.flow_clips import FlowClips
from microcinema.data.reference import reference_index
from microcinema.errors import UserError
from microcinema.files import atomic_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS, RECORDS = "latents.safetensors", "clips.json"
TEXTS = ("id", "caption", "description", "motion")


@torch.no_grad()
def encode(vae: "AutoencoderKL", video: torch.Tensor) -> torch.Tensor:
    """Latents of clips or of key frames: the posterior's mean, scaled as the denoiser expects.

    Args:
        vae: any AutoencoderKL; it works in its own dtype on its own device.
        video: (b, f, 3, H, W) or (b, 3, H, W) in [-1, 1].

    Returns:
        float32 (b, f, c, h, w) or (b, c, h, w), on the VAE's device.

    Raises:
        UserError: H or W do not divide by the VAE's downsampling.
    """
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = video.shape[-2:]
    if height % stride or width % stride:
        raise UserError(
            f"frames of {height}x{width} do not divide by the VAE's {stride}; choose a resolution of multiples of {stride}"
        )
    images, leading = einops.pack([video], "* c h w")
    mean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean.float()
    latents = (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return einops.unpack(latents, leading, "* c h w")[0]


def fingerprint(vae: "AutoencoderKL | None" = None, dataset: ClipDataset | None = None) -> dict[str, Any]:
    """What decides the contents of a cache: the VAE (sha256 of weights and scale), the transform, the clips (sha256 of ids and file sizes).

    A part of which the maker is not given is left out.
    """
    parts: dict[str, Any] = {}
    if vae is not None:
        digest = hashlib.sha256(json.dumps([vae.config.scaling_factor, vae.config.get("shift_factor")]).encode())
        for name, tensor in sorted(vae.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            # In float32, so that the dtype that the weights happen to be loaded in does not count as another VAE.
            digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
        parts["vae"] = digest.hexdigest()
    if dataset is not None:
        parts["transform"] = dataset.transform
        digest = hashlib.sha256()
        for index, row in enumerate(dataset.rows):
            digest.update(f"{row['id']} {dataset.path(index).stat().st_size}\n".encode())
        parts["clips"] = digest.hexdigest()
    return parts


def encode_dataset(
    dataset: ClipDataset,
    vae: "AutoencoderKL",
    path: str | os.PathLike[str],
    batch_size: int = 4,
    num_workers: int = 0,
    progress: bool = True,
    keyframe: str | int | None = None,
    flow_teacher: str | None = None,
) -> None:
    """Encodes every clip of a data set into the cache folder `path`, which appears when it is whole; one that is there is replaced.

    Args:
        dataset: with `clip="first"` or "center": a cache holds one clip of each video.
        vae: on the device and in the dtype to work with.
        batch_size: clips at once.
        num_workers: processes that decode.
        keyframe: the frame whose pixels are kept as well, `first`, `center` or an index, for models that read them; None: none.
        flow_teacher: whose optical flow is kept as well, for PredictNet; see `FlowClips`; None: none.

    Raises:
        UserError: a data set of random clips, a bad clip, latents beyond float16, a folder that is something else or cannot be written.
    """
    folder = Path(path)
    if dataset.clip == "random":
        raise UserError(
            "clip='random' cannot be cached, a cache holds one clip of each video; choose clip=first or clip=center"
        )
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / RECORDS).is_file())):
        raise UserError(f"'{folder}' exists and is no latent cache; choose another folder")
    kept: dict[str, torch.Tensor] = {}
    records: list[dict[str, Any]] = []
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    source = dataset if flow_teacher is None else FlowClips(dataset, flow_teacher, factor)
    loader = DataLoader(source, batch_size=batch_size, num_workers=num_workers)
    with atomic_folder(folder) as temporary:
        with tqdm(total=len(dataset), desc="encoding latents", unit="clip", disable=not progress) as bar:
            for batch in loader:
                encoded = encode(vae, batch["video"]).half().cpu()
                if not encoded.isfinite().all():
                    raise UserError(
                        f"latents of clips {', '.join(batch['id'])} do not fit float16; use a sound VAE, in float32"
                    )
                made = {"latents": encoded}
                if keyframe is not None:
                    pixels = batch["video"][:, reference_index(keyframe, batch["video"].shape[1])]
                    made["keyframe"] = ((pixels + 1) * 127.5).round().to(torch.uint8)
                if flow_teacher is not None:
                    made |= {"flow": batch["flow"].half(), "flow_valid": batch["flow_valid"]}
                for name, part in made.items():
                    whole = kept.setdefault(name, part.new_empty(len(dataset), *part.shape[1:]))
                    whole[len(records) : len(records) + len(part)] = part
                for k, fps in enumerate(batch["fps"].tolist()):
                    records.append({**{name: batch[name][k] for name in TEXTS}, "fps": fps})
                bar.update(len(encoded))
        save_file(kept, temporary / WEIGHTS)
        extras = {"keyframe": keyframe, "flow_teacher": flow_teacher}
        contents = {"fingerprint": {**fingerprint(vae, dataset), **extras}, "clips": records}
        (temporary / RECORDS).write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")


class LatentClipDataset(Dataset[dict[str, Any]]):
    """The clips of a cache: the items of `ClipDataset` with `latents`, float32 (f, c, h, w), in the place of `video`.

    If the cache has them, also `keyframe` uint8 (3, H, W), and `flow` and `flow_valid` as of `FlowClips`.

    The file is mapped, not read: an item costs its own bytes, and worker processes share the pages.

    Args:
        path: a folder that `encode_dataset` wrote.
        vae: if given, the VAE that must have made it.
        dataset: if given, the data set that must have been its source.

    Raises:
        UserError: no cache there, a damaged one, or one of another VAE, transform or list of clips.
    """

    def __init__(
        self, path: str | os.PathLike[str], vae: "AutoencoderKL | None" = None, dataset: ClipDataset | None = None
    ) -> None:
        self.folder = Path(path)
        self._slices: dict[str, Any] = {}
        try:
            contents = json.loads((self.folder / RECORDS).read_text(encoding="utf-8"))
            self.fingerprint: dict[str, Any] = contents["fingerprint"]
            self.records: list[dict[str, Any]] = contents["clips"]
            count = self._open()["latents"].get_shape()[0]
            self._slices = {}  # opened anew in each worker process
        except FileNotFoundError as error:
            raise UserError(
                f"'{self.folder}' is no latent cache ({error.filename or WEIGHTS} is missing); encode one first"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"latent cache '{self.folder}' is damaged ({error}); encode it again") from None
        if count != len(self.records):
            raise UserError(
                f"latent cache '{self.folder}' holds {count} latents for {len(self.records)} clips; encode it again"
            )
        self.check(vae, dataset)

    def check(self, vae: "AutoencoderKL | None" = None, dataset: ClipDataset | None = None) -> None:
        """Compares the cache's fingerprint with that of a VAE, a data set, or both.

        Raises:
            UserError: names what differs.
        """
        differences = []
        for part, now in fingerprint(vae, dataset).items():
            then = self.fingerprint.get(part)
            if part == "transform" and isinstance(then, dict):
                keys = [key for key in now if now[key] != then.get(key)]
                differences += [f"{key} was {then.get(key)} and is {now[key]}" for key in keys]
            elif now != then:
                differences.append("another VAE" if part == "vae" else "another list of clips")
        if differences:
            raise UserError(f"latent cache '{self.folder}' does not match: {', '.join(differences)}; encode it again")

    def check_extras(self, flow_teacher: str | None, keyframe: str | int | None) -> None:
        """Compares what the cache holds beside latents with what a run needs.

        Args:
            flow_teacher: whose flow PredictNet learns; None: there is no PredictNet.
            keyframe: the frame whose pixels the model reads; None: it reads none.

        Raises:
            UserError: names what is missing, or what differs.
        """
        needs: dict[str, Any] = {"flow_teacher": flow_teacher, "keyframe": keyframe}
        for name, wanted in needs.items():
            held = self.fingerprint.get(name)
            frames = self.fingerprint["transform"]["num_frames"]
            if name == "keyframe" and wanted is not None and held is not None:
                wanted, held = reference_index(wanted, frames), reference_index(held, frames)
            if wanted not in (None, held):
                there = "none" if held is None else f"that of {name}={held}"
                what = "optical flow" if name == "flow_teacher" else "key frames' pixels"
                raise UserError(
                    f"latent cache '{self.folder}' holds no {what} for {name}={wanted} ({there}); encode it again with it"
                )

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: every epoch sees the same clips. There so that this and `ClipDataset` are interchangeable."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        kept = {name: part[index : index + 1][0] for name, part in self._open().items()}
        kept |= {name: kept[name].float() for name in ("latents", "flow") if name in kept}
        return {**kept, **self.records[index], "index": index}

    def _open(self) -> dict[str, Any]:
        if not self._slices:
            file = safe_open(self.folder / WEIGHTS, framework="pt")
            self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        return self._slices

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file does not travel to another process; it is opened there.
        return {**self.__dict__, "_slices": {}}
