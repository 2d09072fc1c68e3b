"""The command `prepare check`: examines the clips of a data set and writes a manifest, which training reads, and a report."""

import numpy as np
import pyarrow.parquet

from microcinema.config.schema import PrepareCheck
from microcinema.data.manifest import SCHEMA
from microcinema.data.quality_check import check_clips
from microcinema.data.quality_report import count_reasons, write_report
from microcinema.utils.files import atomic_path, make_folder

MANIFEST, REPORT, CHUNKS = "manifest.parquet", "report.html", "chunks"


def run(config: PrepareCheck) -> None:
    """Checks the data set that the config describes and prints how many clips are rejected, and why. A UserError if the data set cannot be
    read or divided, the folder cannot be written, or Ray is missing."""
    dataset = config.data.build()
    folder = make_folder(config.output_dir)
    count = len(dataset) if config.max_samples is None else min(config.max_samples, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    table = check_clips(dataset, indices, folder / CHUNKS, config)
    with atomic_path(folder / MANIFEST) as temporary:
        pyarrow.parquet.write_table(table.select(SCHEMA.names), temporary)
    write_report(folder / REPORT, table, len(dataset), dataset.skipped)
    accepted = int(np.sum(table.column("accepted").to_numpy()))
    reasons = ", ".join(f"{reason}: {number}" for reason, number in count_reasons(table).items()) or "nothing"
    print(f"{accepted} of {count} clips accepted; rejected for {reasons}")
    print(f"data.manifest={folder / MANIFEST} excludes the rejected clips from training; {folder / REPORT} shows them")
