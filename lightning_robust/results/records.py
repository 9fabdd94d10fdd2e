"""Records: one row per item and evaluation, the atom of every result."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_robust.errors import RobustError, did_you_mean
from lightning_robust.results.files import PathLike, RecordsError, missing, write_atomic

SCHEMA_VERSION = 2
_READABLE_VERSIONS = (1, SCHEMA_VERSION)
_SINCE_VERSION_2 = ("certified_radius", "certificate_confidence")  # null in files of version 1
KINDS = ("clean", "ood", "adversarial", "attack")
STATUSES = ("evaluated", "unparsed", "error", "success", "failed", "skipped")

Kind = Literal["clean", "ood", "adversarial", "attack"]

_WORD = pa.dictionary(pa.int32(), pa.string())  # few distinct values, repeated in every row

SCHEMA = pa.schema(
    [
        ("run_id", _WORD),
        ("epoch", pa.int32()),
        ("global_step", pa.int64()),
        ("kind", _WORD),
        ("environment", _WORD),
        ("attack", _WORD),
        ("item_id", pa.string()),
        ("label", pa.int32()),
        ("predicted", pa.int32()),
        ("probability", pa.float32()),
        ("correct", pa.bool_()),
        ("status", _WORD),
        ("queries", pa.int32()),
        ("seconds", pa.float32()),
        ("words_changed", pa.int32()),
        ("text", pa.string()),
        ("perturbed_text", pa.string()),
        ("warm_started", pa.bool_()),
        ("certified_radius", pa.int32()),
        ("certificate_confidence", pa.float64()),
        ("schema_version", pa.int16()),
    ]
)


@dataclass(frozen=True)
class Record:
    """One item's outcome in one evaluation; the columns of a records file.

    Args:
        run_id: The run that made the evaluation.
        epoch: ``None`` for an evaluation outside training.
        global_step: Optimizer steps taken; ``None`` outside training.
        kind: Role of the environment, or ``attack``.
        environment: Name of the environment; an attack names the one it draws its items from.
        attack: Name of the attack; empty for static environments.
        item_id: Stable across machines and runs; what pairs evaluations.
        label: The right class.
        predicted: The class after the attack where there is one; ``None`` where no answer could be parsed.
        probability: Of the label, after the attack where there is one.
        correct: Whether the prediction is right (still right, for attacks).
        status: ``evaluated`` for static environments, ``unparsed`` or ``error`` where that failed;
            an attack's ``success``, ``failed``, ``skipped`` (first misclassified) or ``error``.
        queries: Victim calls that the search counted.
        seconds: Time the item took.
        words_changed: By the perturbation.
        text: The original; pairs as ``encode_text`` writes them.
        perturbed_text: ``None`` unless a search ended on one.
        warm_started: Whether an earlier evaluation's perturbation was tried first.
        certified_radius: Words that may be changed without changing the prediction; ``None`` without a
            certificate, or where the predictor abstained from one.
        certificate_confidence: That the radius is right; ``None`` where no certificate was tried for.
    """

    run_id: str
    epoch: int | None
    global_step: int | None
    kind: Kind
    environment: str
    attack: str
    item_id: str
    label: int
    predicted: int | None
    probability: float | None
    correct: bool
    status: str = "evaluated"
    queries: int = 1
    seconds: float = 0.0
    words_changed: int = 0
    text: str = ""
    perturbed_text: str | None = None
    warm_started: bool = False
    certified_radius: int | None = None
    certificate_confidence: float | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("status", self.status, STATUSES)):
            if value not in known:
                raise ValueError(f"Expected `{name}` to be one of {', '.join(known)}, but got {value!r}.")


def encode_text(text: str | Sequence[str] | None) -> str | None:
    """Return ``text`` as a text column holds it: pairs become a JSON list.

    Lone surrogates, which no file can hold, are replaced by ``?``.
    """
    if text is None:
        return None
    flat = text if isinstance(text, str) else json.dumps(list(text), ensure_ascii=False)
    return flat.encode("utf-8", "replace").decode("utf-8")


def decode_text(text: str) -> str | tuple[str, ...]:
    """Undo ``encode_text``; a single text that is itself a JSON list of strings reads as a pair."""
    if text.startswith('["'):
        try:
            parts = json.loads(text)
        except ValueError:
            return text
        if len(parts) > 1 and all(isinstance(part, str) for part in parts):
            return tuple(parts)
    return text


def to_table(records: Iterable[Record]) -> pa.Table:
    """Return ``records`` as a table with the columns of ``SCHEMA``."""
    rows = list(records)
    return pa.table(
        [
            pa.array([getattr(row, field.name) for row in rows], pa.string()).dictionary_encode()
            if field.type == _WORD
            else pa.array([getattr(row, field.name) for row in rows], field.type)
            for field in SCHEMA
        ],
        schema=SCHEMA,
    )


def write_records(path: PathLike, records: Iterable[Record] | pa.Table) -> Path:
    """Write one evaluation to a Parquet file that appears complete or not at all.

    Raises:
        RecordsError: Where the folder cannot be written or the disk is full; an earlier file stays.
    """
    table = records if isinstance(records, pa.Table) else to_table(records)
    return write_atomic(
        Path(path),
        lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True),
    )


def read_records(path: PathLike | Sequence[PathLike], *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the records of a file, of a run folder, of a folder of runs, or of a list of these.

    Args:
        path: What to read. Folders are searched for ``records/*.parquet``.
        columns: The columns to keep; all by default. Fewer need less memory.

    Returns:
        Rows in the order of the paths and, within a run, of the file names. Files that are cut short
        are named in a warning and left out.

    Raises:
        RecordsError: Where nothing is found, a column is unknown, or a file has a schema version that is not known.
    """
    tables = list(iter_records(path, columns=columns))
    if not tables:
        return SCHEMA.empty_table().select(_known_columns(columns))
    return pa.concat_tables(tables).unify_dictionaries()


def iter_records(
    path: PathLike | Sequence[PathLike], *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield what `read_records` returns, one file after another: for more records than fit into memory.

    Args:
        path: What to read.
        columns: The columns to keep; all by default.

    Raises:
        RecordsError: As `read_records` does.
    """
    names, some = _known_columns(columns), False
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    files = [file for one in paths for file in record_files(one)]
    for file in files:
        table = _read_whole(file, names)
        if table is not None:
            some = True
            yield table
    if files and not some:
        raise RecordsError(f"None of the {len(files)} records files under {_joined(paths)} can be read.")


def record_files(path: PathLike) -> list[Path]:
    """Return the records files that ``path`` stands for, sorted by name.

    Raises:
        RecordsError: Where ``path`` is missing or holds none.
    """
    root = Path(path)
    try:
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise RecordsError(missing(root))
    except OSError as error:
        if isinstance(error, RecordsError):
            raise
        raise RecordsError(f"{root} cannot be read: {error.strerror}.") from error
    found = sorted(root.glob("records/*.parquet")) or records_below(root)
    found = found or sorted(root.glob("*.parquet"))  # last: tables of a report may lie beside the runs
    if not found:
        raise RecordsError(
            f"Expected records in {root}, but it holds no records/*.parquet. "
            "Name the folder of a run that was monitored or evaluated."
        )
    return found


def records_below(root: Path) -> list[Path]:
    """Return the records files of all runs in a folder, sorted, those behind links too."""
    found: list[Path] = []
    seen: set[str] = set()
    for name, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:  # a link that leads back
            folders.clear()
        elif Path(name).name == "records":
            found += [Path(name) / file for file in files if file.endswith(".parquet")]
        seen.add(real)
    return sorted(found)


def find_runs(path: PathLike) -> list[Path]:
    """Return the run folders that ``path`` stands for: itself, or those below it.

    Raises:
        RecordsError: Where there is none.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    folders = {file.parent for file in record_files(root)}
    return sorted({folder.parent if folder.name == "records" else folder for folder in folders})


def _known_columns(columns: Sequence[str] | None) -> list[str]:
    for name in columns or ():
        if name not in SCHEMA.names:
            raise RecordsError(
                f"Expected `columns` to be among {', '.join(SCHEMA.names)}, but got {name!r}."
                + did_you_mean(name, SCHEMA.names)
            )
    return list(SCHEMA.names if columns is None else columns)


def read_file(path: Path, names: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Read columns of one records file; those that its schema version lacks are null.

    Raises:
        RecordsError: If it is no records file, or has an unknown schema version.
        pa.ArrowException: If it is cut short or damaged.
    """
    # Opened here: a path such as "epoch=003/…" is not to be read as a partition of a data set.
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_version(path, file)
        there = [name for name in names if name in file.schema_arrow.names]
        table, schema = file.read(columns=there), pa.schema([SCHEMA.field(name) for name in names])
        columns = [
            table[field.name] if field.name in there else pa.nulls(file.metadata.num_rows, field.type)
            for field in schema
        ]
        return pa.table(columns, list(names)).cast(schema)


def _read_whole(path: Path, names: Sequence[str]) -> pa.Table | None:
    try:
        return read_file(path, names)
    except RobustError:
        raise
    except (pa.ArrowException, OSError) as error:
        warnings.warn(f"{path} is left out: it is cut short or damaged ({error}).", stacklevel=3)
        return None


def check_schema(path: Path, columns: Sequence[str], versions: Sequence[int | None]) -> None:
    """Refuse a file that this version cannot read.

    Args:
        path: The file, for the message.
        columns: Those that it has.
        versions: The schema versions that its rows name; nothing where that column is absent.

    Raises:
        RecordsError: If it is no records file, has an unknown schema version, or lacks columns of its version.
    """
    absent = [name for name in SCHEMA.names if name not in columns]
    if "schema_version" in absent:
        raise RecordsError(f"{path} is no records file: its columns are {list(columns)}.")
    if len(set(columns)) < len(columns):
        raise RecordsError(f"{path} has columns of the same name: {list(columns)}.")
    if any(version not in _READABLE_VERSIONS for version in versions):
        raise RecordsError(
            f"Expected {path} to have schema version {' or '.join(map(str, _READABLE_VERSIONS))}, but got {list(versions)}. "
            "Read it with the version of lightning-robust that wrote it (its run.json names it)."
        )
    absent = [name for name in absent if name not in _SINCE_VERSION_2 or list(versions) != [1]]
    if absent:
        raise RecordsError(f"{path} lacks the columns {', '.join(absent)}; write it again.")


def _check_version(path: Path, file: pq.ParquetFile) -> None:
    columns = file.schema_arrow.names
    there = "schema_version" in columns
    versions = file.read(columns=["schema_version"]).column(0).unique().to_pylist() if there else []
    check_schema(path, columns, versions)


def _joined(paths: Sequence[PathLike]) -> str:
    return ", ".join(str(path) for path in paths)
