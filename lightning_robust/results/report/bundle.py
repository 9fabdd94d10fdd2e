"""A page and the folder of its figures and tables, written together or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lightning_robust.results.files import RecordsError, clear_errors

_MANIFEST = "files.json"


def files_folder(page: Path) -> Path:
    """Return the folder beside a page: ``report_files`` for ``report.html``."""
    return page.with_name(f"{page.stem}_files")


def table_files(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Return a table as CSV and Parquet, by file name; nothing without rows."""
    if not rows:
        return {}
    names = dict.fromkeys(name for row in rows for name in row)  # the first row may lack some
    csv, parquet = io.BytesIO(), io.BytesIO()
    for write, out, clean in ((pacsv.write_csv, csv, _no_formula), (pq.write_table, parquet, _encodable)):
        write(pa.Table.from_pylist([{name: clean(row.get(name)) for name in names} for row in rows]), out)
    return {f"{name}.csv": csv.getvalue(), f"{name}.parquet": parquet.getvalue()}


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _no_formula(value: Any) -> Any:
    """Return a value as it is, but for texts that a spreadsheet would run."""
    text = _encodable(value)
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_bundle(page: Path, html: str, files: Mapping[str, bytes]) -> Path:
    """Write a page and its files; an earlier report's are replaced, and foreign files stay.

    Everything is written under temporary names first, so that a full disk leaves what was there.

    Args:
        page: Where the page goes.
        html: Its contents.
        files: Contents of the folder beside it, by name.

    Raises:
        RecordsError: Where something cannot be written, or another file has the folder's name.
    """
    folder = files_folder(page)
    if folder.exists() and not folder.is_dir():
        raise RecordsError(
            f"Expected {folder} to be a folder for figures and tables, but it is a file. Move it."
        )
    with clear_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        # The process id keeps two processes that write the same report apart.
        fresh = page.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary = page.with_name(f".{page.name}.{os.getpid()}.tmp")
        try:
            fresh.mkdir()
            for name, data in files.items():
                (fresh / name).write_bytes(data)
            (fresh / _MANIFEST).write_text(json.dumps(sorted(files), indent=1) + "\n", encoding="utf-8")
            temporary.write_bytes(html.encode("utf-8", "replace"))
            _put_in_place(fresh, folder)
            os.replace(temporary, page)
        finally:
            temporary.unlink(missing_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)
    return page


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Let a folder take another one's place, but for foreign files, which stay."""
    if not folder.exists():
        os.replace(fresh, folder)
        return
    for foreign in folder.iterdir():
        if foreign.name not in {_MANIFEST, *_written_before(folder)} and not (fresh / foreign.name).exists():
            copy = shutil.copytree if foreign.is_dir() else shutil.copy2
            copy(foreign, fresh / foreign.name)
    earlier = fresh.with_suffix(".old")
    os.replace(folder, earlier)
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(earlier, folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _written_before(folder: Path) -> set[str]:
    try:
        names = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    # Plain names of files only: nothing outside of the folder is ever removed.
    plain = (
        {name for name in names if isinstance(name, str) and name == Path(name).name}
        if isinstance(names, list)
        else set()
    )
    return {name for name in plain if (folder / name).is_file()}
