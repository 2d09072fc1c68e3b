"""The command `prepare check`: looks at every clip of a data set, or at some, and says in a manifest and on a page what is wrong with them."""

import logging
import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from tqdm import tqdm

from microcinema.config.compose import instantiate
from microcinema.data import quality
from microcinema.data.decoder_process import IsolatedReader
from microcinema.data.manifest import SCHEMA
from microcinema.data.quality_report import counts, write_report
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder
from microcinema.utils.fingerprint import matches, write_or_verify

if TYPE_CHECKING:
    from omegaconf import DictConfig

MANIFEST, PAGE, PARTS = "manifest.parquet", "report.html", "parts"
_CHUNK = 100  # clips that a process looks at before it reports
_LEARNED = 256  # clips from which the watermark is learned
_PICTURED = 50  # chunks that keep pictures
_PICTURES = 4  # pictures of each verdict in one of these
# Of these columns a part holds its own; the others are known when all clips are.
_PART = pa.schema([*SCHEMA, ("number", pa.int64()), ("caption", pa.string()), ("picture", pa.binary())])


def run(config: "DictConfig") -> None:
    """Checks the data set that the config describes, prints what was found, and where.

    Raises:
        UserError: a data set that cannot be read, a folder that cannot be written, no Ray.
    """
    dataset = instantiate(config.data)
    dataset.subset([])  # refuses data that cannot be checked
    folder = make_folder(config.output_dir)
    count = len(dataset) if config.max_samples is None else min(config.max_samples, len(dataset))
    numbers = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    parts = _resumable(folder / PARTS, dataset, numbers, config.timeout)
    with _pool(config.num_workers, config.ray_address) as pool:
        template = _template(pool, parts, dataset, numbers, config.timeout)
        work = partial(_check_chunk, config=_thresholds(config), template=template)
        chunks = [numbers[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
        left = [k for k in range(len(chunks)) if not _part(parts, k).is_file()]
        apart = -(-len(chunks) // _PICTURED)
        tasks = ((k, *dataset.subset(chunks[k]), chunks[k], k % apart == 0) for k in left)
        with tqdm(
            total=count,
            initial=sum(len(chunks[k]) for k in range(len(chunks)) if k not in set(left)),
            desc="checking",
            unit="clip",
            disable=None,
        ) as bar:
            for k, rows in pool.imap_unordered(work, tasks):
                with atomic_path(_part(parts, k)) as temporary:
                    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_PART), temporary)
                bar.update(len(rows))
    table = pa.concat_tables(pyarrow.parquet.read_table(_part(parts, k)) for k in range(len(chunks)))
    table = _judge(table, _thresholds(config))
    with atomic_path(folder / MANIFEST) as temporary:
        pyarrow.parquet.write_table(table.select(SCHEMA.names), temporary)
    write_report(folder / PAGE, table, len(dataset), dataset.skipped)
    accepted = int(np.sum(table.column("accepted").to_numpy()))
    print(
        f"{accepted} of {count} clips accepted; rejected for "
        + (", ".join(f"{reason}: {number}" for reason, number in counts(table).items()) or "nothing")
    )
    print(f"data.manifest={folder / MANIFEST} trains without the rejected ones; {folder / PAGE} shows them")


def _thresholds(config: "DictConfig") -> dict[str, Any]:
    keys = ("num_frames", "fps", "timeout", "min_motion", "max_watermark_score")
    return {**{key: config[key] for key in keys}, "reject": list(config.reject)}


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def _resumable(folder: Path, dataset: Any, numbers: np.ndarray, timeout: float) -> Path:
    """The folder of finished parts, emptied if they are of other clips."""
    fingerprint = {
        "clips": [len(dataset), dataset.id(0), dataset.id(len(dataset) - 1), len(numbers)],
        "decoding": {"size": quality.SIZE, "fps": quality.FPS, "timeout": timeout},
    }
    if not matches(folder, fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
    write_or_verify(folder, fingerprint)
    return folder


@contextmanager
def _pool(num_workers: int | None, ray_address: str | None) -> Iterator[Any]:
    """Processes on this machine, or on a Ray cluster: Ray's pool has the interface of Python's.

    Raises:
        UserError: Ray is not installed, or cannot be reached.
    """
    if ray_address is None:
        # Spawned, not forked: this process has threads.
        with multiprocessing.get_context("spawn").Pool(num_workers or os.cpu_count()) as pool:
            yield pool
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers, and wait where it cannot
    try:
        import ray
        from ray.util.multiprocessing import Pool
    except ImportError:
        raise UserError("ray_address needs Ray; install microcinema[ray], or leave ray_address out") from None
    try:
        if ray_address == "local":
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            _check_address(ray_address)
            ray.init(ray_address, log_to_driver=False, logging_level=logging.ERROR)
        ray_pool = Pool(num_workers)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"ray_address='{ray_address}' cannot be used ({error}); give auto, local, host:port or ray://host:port"
        ) from None
    try:
        yield ray_pool
    finally:
        ray_pool.terminate()
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there.

    Raises:
        OSError: nobody answers at a host and port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _template(pool: Any, parts: Path, dataset: Any, numbers: np.ndarray, timeout: float) -> np.ndarray | None:
    """What many clips have in common, learned from some of them; kept beside the parts, which depend on it."""
    file = parts / "template.npy"
    if not file.is_file():
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), _LEARNED)).astype(int)]
        tasks = [(*dataset.subset(chosen[start : start + 16]), timeout) for start in range(0, len(chosen), 16)]
        edges = [edge for found in pool.imap_unordered(_edges_of_chunk, tasks) for edge in found]
        template = quality.watermark_template(edges)
        with atomic_path(file) as temporary:
            np.save(temporary, np.zeros(0) if template is None else template)
    kept = np.load(file)
    return kept if kept.size else None


def _edges_of_chunk(task: tuple[Any, Any, float]) -> list[np.ndarray]:
    dataset, indices, timeout = task
    reader, edges = IsolatedReader(timeout), []
    for index in indices:
        try:
            edges.append(quality.persistent_edges(quality.look(reader, dataset.file(index)).frames))
        except UserError:
            continue  # the check itself says so
    reader.close()
    return edges


def _check_chunk(
    task: tuple[int, Any, Any, np.ndarray, bool], config: dict[str, Any], template: np.ndarray | None
) -> tuple[int, list[dict[str, Any]]]:
    """The rows of a chunk, in a worker process."""
    k, dataset, indices, numbers, pictured = task
    reader = IsolatedReader(config["timeout"])
    rows: list[dict[str, Any]] = []
    pictures: dict[str, int] = {}
    for index, number in zip(indices, numbers.tolist(), strict=True):
        row: dict[str, Any] = {"id": dataset.id(index), "number": number}
        try:
            row["caption"] = dataset.captions(index)["caption"]
            found, seen = quality.measure(reader, dataset.file(index), template)
        except UserError as error:
            found, seen = {"decodable": False, "reason": str(error)}, None
        row |= found
        known = {name: np.array([np.nan if row.get(name) is None else float(row[name])]) for name in _JUDGED}
        verdict = ", ".join(name for name, holds in _wrongs(known, config).items() if holds[0]) or "accepted"
        if pictured and seen is not None and pictures.get(verdict, 0) < _PICTURES:
            pictures[verdict] = pictures.get(verdict, 0) + 1
            row["picture"] = _picture(seen, row)
        rows.append(row)
    reader.close()
    return k, rows


def _wrongs(columns: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which clips each reason holds for, whether or not it is asked to reject them; NaN is what is not known."""
    fps, wanted = config["fps"], config["num_frames"]
    by_count = fps is None or wanted == 1
    return {
        "broken": columns["decodable"] != 1,
        "short": columns["num_frames"] < wanted if by_count else columns["duration"] <= (wanted - 1) / fps,
        "static": columns["motion"] < config["min_motion"],
        "cut": ~np.isnan(columns["cut"]),
        "watermark": columns["watermark"] > config["max_watermark_score"],
    }


_JUDGED = ("decodable", "num_frames", "duration", "motion", "cut", "watermark")


def _judge(table: pa.Table, config: dict[str, Any]) -> pa.Table:
    """The table with the columns that need all clips: duplicates, verdicts."""
    columns = {name: table.column(name).cast(pa.float64()).to_numpy() for name in _JUDGED}
    hashes = pc.fill_null(
        pc.list_flatten(pc.coalesce(table.column("hashes"), pa.scalar([0, 0, 0], SCHEMA.field("hashes").type))), 0
    )
    first = quality.duplicates(hashes.to_numpy().reshape(-1, 3))
    wrongs = {**_wrongs(columns, config), "duplicate": first >= 0}
    asked = {name: holds for name, holds in wrongs.items() if name == "broken" or name in config["reject"]}
    rejected = np.any(list(asked.values()), axis=0)
    reasons = np.full(len(first), None, dtype=object)
    for k in np.flatnonzero(rejected).tolist():
        reasons[k] = ", ".join(name for name, holds in asked.items() if holds[k])
    known = pa.array(np.isnan(columns["motion"]))
    judged = {
        "static": pc.if_else(known, None, pa.array(wrongs["static"])),
        "duplicate_of": pc.take(table.column("id").combine_chunks(), pa.array(first, mask=first < 0)),
        "accepted": pa.array(~rejected),
        "rejected_for": pa.array(reasons, pa.string()),
    }
    for name, values in judged.items():
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), values)
    return table


def _picture(seen: quality.Look, row: dict[str, Any]) -> bytes:
    """A JPEG of the first, middle and last frame at the clip's own aspect ratio; for a cut, of both its sides."""
    count = len(seen.frames)
    chosen = [0, count // 2, count - 1]
    if row.get("cut") is not None:
        after = int(np.searchsorted(seen.times, row["cut"] - 1e-6))
        chosen = [0, after - 1, after]
    height = 90
    width = round(min(3.0, max(0.3, seen.info.width / seen.info.height)) * height)
    strip = np.hstack([cv2.resize(seen.frames[k], (width, height), interpolation=cv2.INTER_AREA) for k in chosen])
    _, data = cv2.imencode(".jpg", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return data.tobytes()
