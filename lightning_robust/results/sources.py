"""The records files of a study: which there are, and reading them by row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_robust.results.files import PathLike, RecordsError, read_run_json
from lightning_robust.results.records import SCHEMA, check_schema, record_files, records_below

_COLUMNS = [
    "run_id", "epoch", "global_step", "kind", "environment", "attack", "item_id", "label",
    "probability", "correct", "status", "queries", "seconds", "schema_version",
]  # fmt: skip
_KEPT_NULLS = ("epoch", "global_step", "probability", "correct")


class Source(NamedTuple):
    """A run folder and its records files."""

    folder: Path
    files: list[Path]


def find_sources(paths: Sequence[PathLike]) -> list[Source]:
    """Return the run folders that ``paths`` stand for, each once, with their records files.

    A run's folder stands for the run and for its defended predictors, whose folders are in it; a folder of runs for
    all runs in it; a file for what it holds.

    Raises:
        RecordsError: Where a path is missing or holds no records.
    """
    found: dict[Path, dict[Path, None]] = {}
    for path in paths:
        files = dict.fromkeys(_resolved(file) for file in record_files(path))
        inside = {_resolved(file): None for file in sorted(Path(path).glob("*/records/*.parquet"))}
        defended = {folder for folder in {_folder(file) for file in inside} if _is_defended(folder)}
        files |= {file: None for file in inside if _folder(file) in defended}
        for file in files:
            found.setdefault(_folder(file), {})[file] = None
    return [Source(folder, list(files)) for folder, files in found.items()]


def passed_over(paths: Sequence[PathLike], sources: Sequence[Source]) -> list[Path]:
    """Return the run folders below ``paths`` that are no sources, as a folder above them is a run itself."""
    known = {source.folder for source in sources}
    below = (file for path in paths if Path(path).is_dir() for file in records_below(Path(path)))
    return sorted({_folder(_resolved(file)) for file in below} - known)


def without_records(paths: Sequence[PathLike]) -> list[Path]:
    """Return the folders under ``paths`` that hold a ``run.json`` but no records: nothing was evaluated there."""
    found = [
        file.parent.resolve()
        for path in paths
        if Path(path).is_dir()
        for file in Path(path).rglob("run.json")
    ]
    patterns = ("records/*.parquet", "*.parquet")
    return sorted({one for one in found if not any(any(one.glob(pattern)) for pattern in patterns)})


def _resolved(file: Path) -> Path:
    """Return the file's path with its folder resolved: a link to a file belongs to the run that it lies in."""
    return file.parent.resolve() / file.name


def _folder(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "records" else file.parent


def _is_defended(folder: Path) -> bool:
    try:
        return bool(read_run_json(folder).get("inference_defense"))
    except RecordsError:
        return False


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Read the columns that count, by row groups: a file may be larger than memory."""
    # Opened here: a path such as "epoch=003/…" is not to be read as a partition of a data set.
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        there = file.schema_arrow.names
        check_schema(path, there, [1])  # what every version has
        schema = pa.schema([SCHEMA.field(name) for name in _COLUMNS])
        for index in range(file.num_row_groups):
            group = file.read_row_group(index, columns=[n for n in _COLUMNS if n in there], use_threads=False)
            check_schema(path, there, group["schema_version"].unique().to_pylist())
            table = group.select(_COLUMNS).cast(schema).unify_dictionaries().combine_chunks()
            yield from (_filled(batch) for batch in table.to_batches())


def _filled(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return ``batch`` without nulls but for epochs, steps, probabilities, and whether an answer was right."""
    for index, field in enumerate(batch.schema):
        column = batch.column(index)
        if column.null_count and field.name not in _KEPT_NULLS:
            if pa.types.is_dictionary(field.type):
                column = column.cast(pa.string()).fill_null("").dictionary_encode()
            elif pa.types.is_string(field.type):
                column = column.fill_null("")
            else:
                missing = -1 if field.name == "label" else 0
                column = column.fill_null(pa.scalar(missing).cast(field.type))
            batch = batch.set_column(index, field, column)
    return batch
