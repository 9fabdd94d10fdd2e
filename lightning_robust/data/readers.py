"""Read a file, a hub data set or the demo corpus into columns."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_robust.errors import DataError, did_you_mean

Quoting = Literal["auto", "none", "minimal"]


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the class names where the origin states them."""

    columns: dict[str, list[Any]]
    label_names: list[str] | None = None


def read_table(path: str, split: str, subset: str | None, quoting: Quoting) -> Table:
    """Read ``path``: ``"demo"``, a local file by its suffix, or a hub id.

    Raises:
        DataError: If nothing can be read there; the message says what to do.
    """
    if path == "demo":
        return _read_demo(split)
    file = Path(path).expanduser()
    suffix = file.suffix.lower().lstrip(".")
    if suffix not in _READERS and not _looks_local(path):
        return _read_hub(path, split, subset)
    if not file.is_file():
        raise DataError(_missing_file(file))
    if suffix not in _READERS:
        raise DataError(
            f"Expected `path` to end on one of {', '.join(f'.{s}' for s in _READERS)}, but got «{path}»."
        )
    if subset is not None and suffix != "json":
        raise DataError(
            f"`subset` is {subset!r}, but {path} has no subsets: only JSON files and hub data sets do. "
            "Set `subset: null`."
        )
    columns = _READERS[suffix](path, file.read_bytes(), subset, quoting)
    if not columns or not any(columns.values()):
        raise DataError(f"{path} holds a header but no rows: nothing to read." if columns else _empty(path))
    return Table(columns)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or Path(path).is_file()


def _missing_file(file: Path) -> str:
    message = f"There is no file {file}."
    if not file.parent.is_dir():
        return f"{message} Its folder {file.parent} does not exist either (working directory: {Path.cwd()})."
    siblings = sorted(sibling.name for sibling in file.parent.iterdir())
    hint = did_you_mean(file.name, siblings)
    listed = ", ".join(siblings[:20]) or "nothing"
    return f"{message}{hint} {file.parent} holds: {listed}{', …' if len(siblings) > 20 else ''}."


def _empty(path: str) -> str:
    return f"{path} is empty: expected a header or records in it."


def _decode(path: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}). "
            "Convert it first, for example: iconv -f LATIN1 -t UTF-8."
        ) from error
    if not text.strip():
        raise DataError(_empty(path))
    return text


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_delimited(path: str, text: str, delimiter: str, quoting: Quoting) -> dict[str, list[Any]]:
    if quoting == "auto":
        quoting = "none" if delimiter == "\t" and _is_unquoted(text) else "minimal"
    rows: list[list[str]] = []
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    with _unlimited_fields():
        try:
            rows.extend(row for row in reader if row)
        except csv.Error as error:
            raise DataError(
                f"{path}, near line {reader.line_num}: {error}. "
                "If quotes are ordinary characters in this file, set `quoting: none`."
            ) from error
    header = rows.pop(0)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number}: expected {len(header)} columns ({', '.join(header)}), "
                f"but got {len(row)}. Check its separators, or set `quoting` to «none» or «minimal»."
            )
    _check_unique(path, header)
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def _check_unique(path: str, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the columns {', '.join(map(repr, twice))} stand twice in the header.")


def _is_unquoted(text: str) -> bool:
    """Whether quotes are ordinary characters, as in GLUE's files.

    They are where each line has the header's number of fields and some field holds a quote that no
    writer of quoted fields would leave there.
    """
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip("\r\n")]
    if any(len(fields) != len(lines[0]) for fields in lines):
        return False
    return any('"' in field and not _is_quoted(field) for fields in lines for field in fields)


def _is_quoted(field: str) -> bool:
    enclosed = len(field) > 1 and field[0] == field[-1] == '"'
    return enclosed and '"' not in field[1:-1].replace('""', "")


def _from_records(path: str, records: object, what: str) -> dict[str, list[Any]]:
    if isinstance(records, Mapping) and records and all(isinstance(v, list) for v in records.values()):
        lengths = {len(values) for values in records.values()}
        if len(lengths) == 1 and not any(isinstance(v, Mapping) for vs in records.values() for v in vs[:1]):
            return {str(name): list(values) for name, values in records.items()}
    if isinstance(records, Mapping):
        raise DataError(
            f"{path}: expected a list of records in {what}, but got an object with the keys "
            f"{', '.join(map(str, records)) or '(none)'}. Choose one with `subset`."
        )
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a list of records in {what}, but got {_brief(records)}.")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(f"{path}, row {number}: expected an object, but got {_brief(record)}.")
    names = list(dict.fromkeys(str(name) for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in names}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(path: str, data: bytes, subset: str | None, quoting: Quoting) -> dict[str, list[Any]]:
    try:
        node = json.loads(_decode(path, data))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    for key in subset.split(".") if subset else []:
        if not isinstance(node, Mapping) or key not in node:
            keys = list(map(str, node)) if isinstance(node, Mapping) else []
            raise DataError(
                f"{path} has no `subset` {subset!r}.{did_you_mean(key, keys)} "
                f"Available here: {', '.join(keys) or 'none (the file is one list)'}."
            )
        node = node[key]
    return _from_records(path, node, f"subset {subset!r}" if subset else "the file")


def _read_jsonl(path: str, data: bytes, subset: str | None, quoting: Quoting) -> dict[str, list[Any]]:
    records = []
    for number, line in enumerate(_decode(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    return _from_records(path, records, "the file")


def _read_parquet(path: str, data: bytes, subset: str | None, quoting: Quoting) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error
    _check_unique(path, table.column_names)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _read_csv(path: str, data: bytes, subset: str | None, quoting: Quoting) -> dict[str, list[Any]]:
    return _read_delimited(path, _decode(path, data), ",", quoting)


def _read_tsv(path: str, data: bytes, subset: str | None, quoting: Quoting) -> dict[str, list[Any]]:
    return _read_delimited(path, _decode(path, data), "\t", quoting)


_READERS: dict[str, Callable[[str, bytes, str | None, Quoting], dict[str, list[Any]]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _read_demo(split: str) -> Table:
    from lightning_robust.data.demo import DEMO_LABELS, DEMO_SPLITS, demo_rows

    if split not in DEMO_SPLITS:
        raise DataError(
            f"The demo corpus has no split {split!r}.{did_you_mean(split, DEMO_SPLITS)} "
            f"Available: {', '.join(DEMO_SPLITS)}."
        )
    rows = demo_rows(split)
    columns: dict[str, list[Any]] = {
        "text": [row.text for row in rows],
        "label": [row.label for row in rows],
        "domain": [row.domain for row in rows],
    }
    return Table(columns, list(DEMO_LABELS))


def _read_hub(path: str, split: str, subset: str | None) -> Table:
    import datasets

    try:
        data = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the hub client's error types differ between its versions
        raise DataError(_hub_message(path, split, subset, error)) from error
    feature = data.features.get("label")
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Table({name: list(data[name]) for name in data.column_names}, names)


def _hub_message(path: str, split: str, subset: str | None, error: Exception) -> str:
    what = f"{path}" + (f", subset {subset}" if subset else "") + f", split {split}"
    reason = " ".join(str(error).split())
    return (
        f"Cannot load the hub data set {what}: {reason[:300]} "
        "Offline, give `path` a local file instead (csv, tsv, json, jsonl or parquet), "
        "or «demo» for the embedded corpus."
    )
