"""What lies in the folder of the studio: samples, with the records from which they can be made again; and what models can do."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from microcinema.config.compose import compose, plain
from microcinema.data.keyframe_index import keyframe_index
from microcinema.utils.errors import UserError, first_line
from microcinema.utils.files import natural_key
from microcinema.utils.fingerprint import read_record

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Model:
    """A video model, by its config files alone.

    Attributes:
        can: whether it takes each of these keys of `sample`, and a `last_frame`.
        last: the last frame's number.
        summary: of its clips, and of what it cannot do, in a line.
    """

    is_embedded: bool
    can: Mapping[str, bool]
    place: int
    last: int
    summary: str

    @classmethod
    def of(cls, name: str) -> "Model":
        """That of an embedded model, a folder or a hub repository; a UserError if it cannot be read."""
        folder, embedded = Path(name), not Path(name).is_dir() and (ASSETS / name).is_dir()
        try:
            if not folder.is_dir() and not embedded and name.count("/") != 1:
                raise ValueError("neither an embedded model nor a folder nor an owner/name of the hub")
            folder = ASSETS / name if embedded else folder
            configs = "model_index.json", "unet/config.json"
            files = [folder / file if folder.is_dir() else Path(hf_hub_download(name, file)) for file in configs]
            index, unet = (json.loads(file.read_text(encoding="utf-8")) for file in files)
            place = keyframe_index(index["keyframe_position"], index["num_frames"])
            size = f"{index['num_frames']} frames of {index['width']}x{index['height']} at {index['fps']:g} fps"
        except Exception as error:  # of several libraries: no such file or repository, no connection, no JSON
            raise UserError(f"pipeline '{name}' cannot be read ({first_line(error)}); check the name") from None
        places, needs_own = bool(unet.get("keyframe_places")), bool(unet.get("pixels") or unet.get("adapter"))
        can = {
            "motion_prompt": index.get("motion_encoder_source") is not None,
            "motion": bool(index.get("motion_quantiles") and unet.get("motion_score")),
            "keyframes": places,
            "last_frame": places and (place == 0 or not needs_own),
            "num_segments": place == 0 or (places and not needs_own),
            "interpolate": places and (place == 0 or not needs_own),
        }
        names = "a motion caption", "an amount of motion", "other places", "a last frame", "continuing", "interpolating"
        lacks = [name for name, has in zip(names, can.values(), strict=True) if not has]
        summary = f"{size}, key frame at frame {place}." + (f" Not trained for {', '.join(lacks)}." if lacks else "")
        return cls(embedded, can, place, index["num_frames"] - 1, summary)


@dataclass(frozen=True)
class Result:
    """A sample, by the file of its record."""

    file: Path
    record: Mapping[str, Any]

    def path(self, kind: str) -> Path:
        """One of its files, such as `video`, `gif` or `keyframe`."""
        return self.file.with_name(self.record["files"][kind])

    def overrides(self, **changes: Any) -> list[str]:
        """Those of `sample` that make it, or with changed keys another one of its key frame, apart from `output_dir`."""
        config = self.record["config"]
        if changes and not any(":" in str(entry) for entry in config["keyframes"] or ()):
            changes = {"image": str(self.path("keyframe")), "mask": None, **changes}
        return list(_differences({**config, **changes, "output_dir": None}, _defaults()))

    @property
    def command(self) -> str:
        """The line of a shell that makes it again."""
        return shlex.join(["microcinema", "sample", *self.overrides()])

    @property
    def python(self) -> str:
        """The lines of Python that do."""
        lines = "from microcinema.commands.sample import run\nfrom microcinema.config.compose import compose\n\n"
        return f'{lines}run(compose("sample", {json.dumps(self.overrides(), indent=4, ensure_ascii=False)}))'


@cache
def _defaults() -> dict[str, Any]:
    return plain(compose("sample", ["prompt=x"])) | {"prompt": None, "output_dir": None}


def _differences(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _differences(value, defaults[key], f"{prefix}{key}.")
        elif value != defaults.get(key):
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def results(folder: Path) -> list[Result]:
    """The samples in the folders of a folder, the latest first."""
    files = sorted(folder.glob("*/*.json"), key=natural_key, reverse=True)
    found = ((file, read_record(file, needs_files=True)) for file in files)
    return [
        Result(file, record) for file, record in found if record and "gif" in record["files"] and "config" in record
    ]


def keyframes(folder: Path) -> list[tuple[Path, str]]:
    """Pictures that may become key frames, drawn and uploaded, the latest first, each with its prompt."""
    files = sorted(folder.glob("*/*_keyframe.png"), key=lambda path: path.stat().st_mtime_ns, reverse=True)[:24]
    return [(file, str((read_record(file.with_suffix(".json")) or {}).get("prompt", "uploaded"))) for file in files]
