"""The quality check of a data set by many processes, in chunks that an interrupted check need not repeat."""

import logging
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from microcinema.config.schema import PrepareCheck
from microcinema.data import quality
from microcinema.data.decoder_process import DecoderProcess
from microcinema.data.manifest import SCHEMA
from microcinema.data.quality_report import encode_thumbnail
from microcinema.data.source import ClipSource
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import atomic_path
from microcinema.utils.fingerprint import matches, write_or_verify

_CHUNK = 100  # clips that a worker examines before it reports
_TEMPLATE_CLIPS = 256  # clips from which the watermark template is computed
_TEMPLATE_CHUNK = 16
_THUMBNAIL_CHUNKS = 50  # chunks with thumbnails
_THUMBNAILS = 4  # of each verdict in one of these chunks
# The manifest's columns, those of all clips still empty, what the report needs, and what tells whether a chunk still holds.
_CHUNK_SCHEMA = pa.schema(
    [*SCHEMA, ("index", pa.int64()), ("caption", pa.string()), ("thumbnail", pa.binary()), ("file_state", pa.string())]
)


def check_clips(dataset: ClipSource, indices: np.ndarray, folder: Path, config: PrepareCheck) -> pa.Table:
    """Examines clips and judges them: a table of the manifest's columns, `index`, `caption` and `thumbnail` (JPEG; null for most).

    Args:
        folder: for finished chunks and the watermark template; emptied if it holds those of another list. A chunk is examined again if a
            file of it has another size or time than it had.
        config: limits of the checks; `timeout`, seconds for a clip, after which its decoder is killed; `num_workers`, processes (None: one
            per core); `ray_address`, Ray cluster on which they run (None: this machine).

    Raises:
        UserError: a data set that cannot be divided; Ray is not installed or cannot be reached.
    """
    dataset.subset([])
    _remove_other_chunks(folder, dataset, indices, config.timeout)
    chunks = np.split(indices, range(_CHUNK, len(indices), _CHUNK))
    files = [folder / f"{k:06d}.parquet" for k in range(len(chunks))]
    thumbnail_step = -(-len(chunks) // _THUMBNAIL_CHUNKS)
    with _worker_pool(config.num_workers, config.ray_address) as pool:
        template = _watermark_template(pool, folder / "template.npy", dataset, indices, config.timeout)
        work = partial(_check_chunk, config=config, template=template)
        tasks = (
            (k, *dataset.subset(chunk), chunk, k % thumbnail_step == 0, _file_states(files[k]))
            for k, chunk in enumerate(chunks)
        )
        with tqdm(total=len(indices), desc="checking", unit="clip", disable=None) as bar:
            for k, rows in pool.imap_unordered(work, tasks):
                if rows is not None:
                    with atomic_path(files[k]) as temporary:
                        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_CHUNK_SCHEMA), temporary)
                bar.update(len(chunks[k]))
    return quality.judge(pa.concat_tables(map(pyarrow.parquet.read_table, files)), config)


def _remove_other_chunks(folder: Path, dataset: ClipSource, indices: np.ndarray, timeout: float) -> None:
    """Empties the folder unless its chunks are of the same clips, examined in the same way."""
    fingerprint = {
        "clips": [len(dataset), dataset.fingerprint().get("list"), len(indices)],
        "decoding": {"size": quality.SIZE, "fps": quality.FPS, "timeout": timeout},
    }
    if not matches(folder, fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
    write_or_verify(folder, fingerprint)


def _file_states(chunk: Path) -> list[str] | None:
    """Those that the files had when a chunk was examined; None: it was not."""
    if not chunk.is_file():
        return None
    return pyarrow.parquet.read_table(chunk, columns=["file_state"]).column(0).to_pylist()


def _watermark_template(
    pool: Any, file: Path, dataset: ClipSource, indices: np.ndarray, timeout: float
) -> np.ndarray | None:
    """The template of some of the clips, kept in a file, since the scores in finished chunks depend on it; None: too few clips."""
    if not file.is_file():
        indices = indices[np.linspace(0, len(indices) - 1, min(len(indices), _TEMPLATE_CLIPS)).astype(int)]
        chunks = np.split(indices, range(_TEMPLATE_CHUNK, len(indices), _TEMPLATE_CHUNK))
        tasks = [(*dataset.subset(chunk), timeout) for chunk in chunks]
        edges = [edge for chunk in pool.imap_unordered(_edges_of_chunk, tasks) for edge in chunk]
        template = quality.watermark_template(edges)
        with atomic_path(file) as temporary:
            np.save(temporary, np.zeros(0) if template is None else template)
    stored = np.load(file)
    return stored if stored.size else None


def _edges_of_chunk(task: tuple[ClipSource, Any, float]) -> list[np.ndarray]:
    dataset, indices, timeout = task
    decoder, edges = DecoderProcess(timeout), []
    for index in indices:
        try:
            edges.append(quality.persistent_edges(quality.survey_clip(decoder, dataset.file(index)).frames))
        except UserError:
            continue  # reported when the clip is checked
    decoder.close()
    return edges


def _check_chunk(
    task: tuple[int, ClipSource, Any, np.ndarray, bool, list[str] | None],
    config: PrepareCheck,
    template: np.ndarray | None,
) -> tuple[int, list[dict[str, Any]] | None]:
    """The rows of a chunk, in a worker process; None: the earlier ones still hold.

    A task is (chunk, data set, indices in it, indices in the whole, thumbnails or not, earlier states of the files).
    """
    k, dataset, indices, whole_indices, thumbnails, earlier_states = task
    states = [dataset.file_state(index) for index in indices]
    if states == earlier_states:
        return k, None
    decoder = DecoderProcess(config.timeout)
    rows: list[dict[str, Any]] = []
    shown: Counter[str] = Counter()
    for index, whole_index, state in zip(indices, whole_indices.tolist(), states, strict=True):
        row: dict[str, Any] = {"id": dataset.id(index), "key": dataset.key(index), "index": whole_index}
        row["file_state"] = state
        rows.append(row)
        try:
            row["caption"] = dataset.captions(index)["caption"]
            measures, survey = quality.measure(decoder, dataset.file(index), template)
        except UserError as error:
            measures, survey = {"decodable": False, "reason": str(error)}, None
        row |= measures
        verdict = quality.verdict(row, config)
        if thumbnails and survey is not None and shown[verdict] < _THUMBNAILS:
            shown[verdict] += 1
            row["thumbnail"] = encode_thumbnail(survey, row["cut"])
    decoder.close()
    return k, rows


@contextmanager
def _worker_pool(num_workers: int | None, ray_address: str | None) -> Iterator[Any]:
    """Processes on this machine or on a Ray cluster, with the interface of `multiprocessing.Pool`."""
    if ray_address is None:
        # Spawned, not forked: this process has threads.
        with multiprocessing.get_context("spawn").Pool(num_workers or os.cpu_count()) as pool:
            yield pool
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends statistics to Ray's makers, and waits where it cannot
    with user_errors("ray_address needs Ray; install microcinema[ray], or leave ray_address out"):
        import ray
        from ray.util.multiprocessing import Pool
    forms = "auto, local, host:port or ray://host:port"
    with user_errors(f"ray_address='{ray_address}' cannot be used ({{reason}}); give {forms}"):
        address = {"include_dashboard": False} if ray_address == "local" else {"address": ray_address}
        host, _, port = ray_address.removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself waits for minutes for a cluster that is not there
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**address, log_to_driver=False, logging_level=logging.ERROR)
        ray_pool = Pool(num_workers)
    try:
        yield ray_pool
    finally:
        ray_pool.terminate()
        ray.shutdown()
