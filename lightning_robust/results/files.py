"""Files that appear complete or not at all, and the errors of those that do not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_robust.errors import RobustError, did_you_mean

PathLike = str | os.PathLike[str]


class RecordsError(RobustError, OSError):
    """Records or run information that cannot be read or written."""


def write_run_json(folder: PathLike, info: Mapping[str, Any]) -> Path:
    """Write what is to be known about a run to ``run.json`` in its folder, complete or not at all.

    Values that JSON does not know (paths, dtypes) are written as text.

    Raises:
        RecordsError: Where the folder cannot be written or the disk is full.
    """
    text = json.dumps(dict(info), indent=2, ensure_ascii=False, default=str) + "\n"
    return write_text(Path(folder) / "run.json", text)


def read_run_json(folder: PathLike) -> dict[str, Any]:
    """Read a run's ``run.json``.

    Raises:
        RecordsError: Where the file is missing or damaged.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise RecordsError(missing(path))
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordsError(f"{path} cannot be read: {error}.") from error
    if not isinstance(info, dict):
        raise RecordsError(f"Expected {path} to hold an object, but got {type(info).__name__}.")
    return info


def write_text(path: Path, text: str) -> Path:
    """Write a text file that appears complete or not at all.

    Raises:
        RecordsError: Where it cannot be written; an earlier file stays.
    """
    data = text.encode("utf-8", "replace")
    return write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Raises:
        RecordsError: Where writing fails; an earlier file stays and the temporary one is removed.
    """
    # The process id keeps two processes that write the same name from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error inside into one that says what to do.

    Raises:
        RecordsError: Instead of ``OSError``.
    """
    try:
        yield
    except RobustError:
        raise
    except OSError as error:
        advice = "Check that the folder is writable, or choose another one."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space or choose another folder, then run the same command again."
        reason = error.strerror or str(error)
        raise RecordsError(f"Could not write {path}: {reason}. {advice}") from error


def missing(path: Path) -> str:
    """Return the message on a path that does not exist: what there is instead."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir())
    hint = did_you_mean(path.name, siblings)
    shown = ", ".join(siblings[:10]) or "nothing"
    return f"{path} does not exist.{hint} {parent} holds: {shown}{', …' if len(siblings) > 10 else ''}."
