"""Whether what is on disk is what would be made now: a JSON record of everything that a result depends on, kept beside it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder, write_json

FINGERPRINT = "fingerprint.json"
"""The record of a folder."""
_MAX_SHOWN = 20  # differences


def canonical(content: Any) -> Any:
    """Content as JSON holds it, with floats rounded to 10 significant digits, so that rounding errors in float64 do not count.

    The last bits of computed values differ between instruction sets and versions of NumPy.
    """
    return json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.10g}"))


def read_record(
    path: str | os.PathLike[str], expected: Mapping[str, Any] | None = None, needs_files: bool = False
) -> dict[str, Any] | None:
    """A record, if it is readable and has the expected entries; otherwise None.

    Args:
        path: a file, or a folder with a `fingerprint.json`.
        expected: entries that the record must have, with these values; it may have others.
        needs_files: whether the record must list, as `files`, files beside it that all exist.
    """
    file = Path(path) / FINGERPRINT if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not record.keys() >= (expected or {}).keys():
        return None
    if expected and differences(expected, {key: record[key] for key in expected}):
        return None
    files = record.get("files")
    if needs_files and not (files and all((file.parent / name).is_file() for name in files.values())):
        return None
    return record


def matches(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> bool:
    """Whether the record of a file or folder exists and equals the expected one."""
    record = read_record(path)
    return record is not None and not differences(expected, record)


def write_or_verify(
    folder: str | os.PathLike[str], expected: Mapping[str, Any], advice: str = "choose another output_dir"
) -> None:
    """Marks a folder as holding results of this fingerprint, or verifies that it is marked so.

    Args:
        expected: everything that the results depend on, as JSON.
        advice: what to do if the folder holds other results.

    Raises:
        UserError: it holds other results (every difference is named), or cannot be written.
    """
    path = make_folder(folder) / FINGERPRINT
    if not path.exists():
        write_json(path, expected)
        return
    actual = read_record(path)
    if actual is None:
        raise UserError(f"'{path}' is damaged; delete the folder, or {advice}")
    if differing := differences(expected, actual):
        raise UserError(f"'{folder}' holds other results ({', '.join(differing)}); {advice}")


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any], common_only: bool = False) -> list[str]:
    """Every key with another value (of more than 20, their number), such as "vae.scale was 0.5 and is 1.0": first the actual value, then the expected one.

    Keys of nested mappings are joined by dots, and floats are rounded.

    Args:
        common_only: compare only keys that both have; otherwise an absent key equals null.
    """
    new, old = flatten(canonical(expected)), flatten(canonical(actual))
    keys = [key for key in new if key in old] if common_only else {**new, **old}
    changed = [key for key in keys if new.get(key) != old.get(key)]
    shown = [f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}" for key in changed[:_MAX_SHOWN]]
    return [*shown, f"{len(changed) - _MAX_SHOWN} more"] if len(changed) > _MAX_SHOWN else shown


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their keys, joined by dots."""
    if not isinstance(content, dict):
        return {prefix: content}
    dot = "." if prefix else ""
    return {leaf: value for key in content for leaf, value in flatten(content[key], f"{prefix}{dot}{key}").items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return f"{text[:12]}..."
    return text if len(text) <= 40 else f"{text[:40]}..."
