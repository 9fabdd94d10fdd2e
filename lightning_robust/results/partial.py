"""A log of finished results, so that an interrupted evaluation loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning_robust.results.files import PathLike, clear_errors
from lightning_robust.results.records import SCHEMA_VERSION, Record


class PartialRecords:
    """The finished results of an evaluation that is still running, one JSON line each.

    What an interrupted evaluation had finished is read back when the same evaluation starts again.

    Args:
        path: The log; its folder is made.
        fingerprint: Names the weights and settings. A log with another fingerprint is discarded.
        key: What is evaluated, for a person who opens the file.

    Example:
        >>> with PartialRecords(path, "3f9a") as partial:  # doctest: +SKIP
        ...     done = {record.item_id for record in partial.records}
        ...     partial.append(record)
        ...     write_records(final, partial.records)
        ...     partial.delete()

    Raises:
        RecordsError: Where the log cannot be written.
    """

    def __init__(self, path: PathLike, fingerprint: str, key: str = "") -> None:
        self.path = Path(path)
        self.records: list[Record] = []
        header = {"fingerprint": fingerprint, "key": key, "schema_version": SCHEMA_VERSION}
        with clear_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            end = self._restore(header)
            # Unbuffered: on a full disk nothing is left over for `close` to fail on.
            self._file = open(self.path, "r+b" if end else "wb", buffering=0)  # noqa: SIM115 (stays open)
            self._file.seek(end)
            self._file.truncate()
            if not end:
                self._write(header)

    def append(self, record: Record) -> None:
        """Add one finished result; it is on its way to the disk when this returns."""
        with clear_errors(self.path):
            self._write(asdict(record))
        self.records.append(record)

    def close(self) -> None:
        """Stop writing; the log stays for a later start."""
        self._file.close()

    def delete(self) -> None:
        """Stop writing and remove the log: its records are safe elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> PartialRecords:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")

    def _restore(self, header: dict[str, Any]) -> int:
        """Read what a log with this header holds; return where its last whole line ends."""
        if not self.path.is_file():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        if not lines or _parse(lines[0]) != header:
            return 0
        end = len(lines[0])
        names = {field.name for field in fields(Record)}
        for line in lines[1:]:
            row = _parse(line)
            if row is None or set(row) != names:
                break
            self.records.append(Record(**row))
            end += len(line)
        return end


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of a whole line; ``None`` for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
