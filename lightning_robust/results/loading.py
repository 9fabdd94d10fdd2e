"""Run folders, read file by file: six bytes are kept of each record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_robust.errors import RobustError
from lightning_robust.results.files import RecordsError
from lightning_robust.results.loaded import Loaded, Where
from lightning_robust.results.outcomes import Positions
from lightning_robust.results.parts import WRONG_STATUSES, Bools, Items, Part
from lightning_robust.results.records import KINDS, STATUSES
from lightning_robust.results.sources import Source, read_batches

_MOMENT = ["run_id", "epoch", "global_step"]
_LAYOUT = ["kind", "environment", "attack", "item_id", "label"]
_WRONG = np.array([name in WRONG_STATUSES for name in (*STATUSES, "")])
_KEPT_LAYOUTS = 64  # files of one run follow each other

Moment = tuple[str, int | None, int | None]


class _Place(NamedTuple):
    """Which rows of a layout belong to a part."""

    items: Items
    rows: slice | Positions
    repeated: int


class Reader:
    """Reads records files; what consecutive files have in common is worked out once and kept once."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], dict[Where, _Place]] = {}
        self._items: dict[bytes, Items] = {}
        self._ids: dict[str, str] = {}

    def read(self, source: Source, progress: Callable[[], object] | None = None) -> Loaded:
        """Read a run folder; files that cannot be read are named in ``left_out``.

        Args:
            source: The folder and its files.
            progress: Called after each file.
        """
        loaded = Loaded(source)
        for path in source.files:
            within = Loaded(source)
            try:
                # All of a file or nothing: a damaged end would make an evaluation of fewer items.
                found = [part for batch in read_batches(path) for part in self._parts(batch, within)]
            except RobustError as error:
                loaded.left_out.append((path, str(error)))
            except (pa.ArrowException, OSError, ValueError) as error:
                loaded.left_out.append((path, f"it is cut short or damaged ({error})"))
            else:
                loaded.not_numbers += within.not_numbers
                loaded.unknown += within.unknown
                loaded.repeated += within.repeated
                for moment, key, part in found:
                    self._add(loaded, moment, key, part)
            if progress is not None:
                progress()
        return loaded

    def _add(self, loaded: Loaded, moment: Moment, key: Where, part: Part) -> None:
        """Add a part; what another file of the same evaluation had of it is kept, and joined to if it is different."""
        run_id, epoch, step = moment
        parts = loaded.runs.setdefault(run_id, {}).setdefault((epoch, step), {})
        earlier = parts.get(key)
        if earlier is None:
            parts[key] = part
            return
        seen = set(earlier.items.ids)
        new = np.array([i not in seen for i in part.items.ids], dtype=bool)
        loaded.repeated[run_id] += int((~new).sum())
        if new.any():
            joined = earlier.joined(part.only(new))
            items = self._intern(pa.array(joined.items.ids), pa.array(joined.items.labels))
            parts[key] = joined._replace(items=items)

    def _parts(self, batch: pa.RecordBatch, loaded: Loaded) -> Iterator[tuple[Moment, Where, Part]]:
        for moment, rows in _moments(batch):
            status: pa.DictionaryArray = rows["status"]
            codes = np.array([_code(name) for name in status.dictionary.to_pylist()], np.uint8)[
                _ints(status.indices)
            ]
            wrong = _WRONG[codes]
            unknown = _bools(rows["correct"].is_null()) & ~wrong
            correct = _bools(rows["correct"].fill_null(False)) & ~wrong
            codes[unknown] = _code("unparsed")
            queries, seconds = rows["queries"].to_numpy(), _floats(rows["seconds"])
            loaded.unknown[moment[0]] += int(unknown.sum())
            loaded.not_numbers[moment[0]] += pc.sum(pc.is_nan(rows["probability"])).as_py() or 0
            for key, (items, where, repeated) in self._layout(rows).items():
                loaded.repeated[moment[0]] += repeated
                yield (
                    moment,
                    key,
                    Part(
                        items,
                        correct[where].copy(),
                        codes[where].copy(),
                        queries[where].copy(),
                        float(seconds[where].sum()),
                    ),
                )

    def _layout(self, rows: pa.RecordBatch) -> dict[Where, _Place]:
        """Return where each part's rows are; the answer for the same rows of an earlier file where there is one."""
        words = [rows[name] for name in ("kind", "environment", "attack")]
        plain = pa.record_batch(
            [word.indices for word in words] + [rows["item_id"], rows["label"]], names=_LAYOUT
        )
        digest = hashlib.blake2b(plain.serialize()).digest()
        key = (digest, *(tuple(word.dictionary.to_pylist()) for word in words))
        if key not in self._layouts:
            if len(self._layouts) >= _KEPT_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[key] = self._work_out(rows)
        return self._layouts[key]

    def _work_out(self, rows: pa.RecordBatch) -> dict[Where, _Place]:
        found: dict[Where, list[Positions]] = {}
        for values, where in _groups([rows[name] for name in ("kind", "environment", "attack")]):
            kind, environment, attack = values
            if kind not in KINDS:
                raise RecordsError(f"its kind {kind!r} is none of {', '.join(KINDS)}")
            name = {"clean": "clean", "attack": attack}.get(kind, environment)
            key = Where(kind, name, environment if kind in ("clean", "attack") else "")
            found.setdefault(key, []).append(where)
        return {key: self._place(rows, np.sort(np.concatenate(wheres))) for key, wheres in found.items()}

    def _place(self, rows: pa.RecordBatch, where: Positions) -> _Place:
        ids = rows["item_id"].take(pa.array(where))
        first = {i: index for index, i in reversed(list(enumerate(ids.to_pylist())))}
        repeated = len(where) - len(first)
        if repeated:
            where = where[np.sort(np.fromiter(first.values(), np.int64))]
            ids = rows["item_id"].take(pa.array(where))
        items = self._intern(ids, rows["label"].take(pa.array(where)))
        contiguous = len(where) == where[-1] - where[0] + 1
        return _Place(items, slice(int(where[0]), int(where[-1]) + 1) if contiguous else where, repeated)

    def _intern(self, ids: pa.StringArray, labels: pa.Int32Array) -> Items:
        digest = hashlib.blake2b(pa.record_batch([ids, labels], names=["id", "label"]).serialize()).digest()
        if digest not in self._items:
            shared = [self._ids.setdefault(i, i) for i in ids.to_pylist()]
            self._items[digest] = Items(shared, labels.to_numpy().astype(np.int32))
        return self._items[digest]


def _code(status: str) -> int:
    return STATUSES.index(status) if status in STATUSES else len(STATUSES)


def _moments(batch: pa.RecordBatch) -> Iterator[tuple[Moment, pa.RecordBatch]]:
    """Split rows by run and moment."""
    for (run_id, epoch, step), where in _groups([batch[name] for name in _MOMENT]):
        whole = len(where) == batch.num_rows
        yield (run_id or "", epoch, step), batch if whole else batch.take(pa.array(where))


def _groups(columns: Sequence[pa.Array]) -> Iterator[tuple[tuple[Any, ...], Positions]]:
    """Yield the distinct values of ``columns`` together, in order of appearance, with the rows that have them."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    dictionaries = []
    for column in columns:
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode(null_encoding="encode")
        dictionaries.append(column.dictionary)
        codes = codes * len(column.dictionary) + _ints(column.indices)
    distinct, first, inverse, sizes = np.unique(
        codes, return_index=True, return_inverse=True, return_counts=True
    )
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
    for code in np.argsort(first):
        rest, values = int(distinct[code]), []
        for dictionary in reversed(dictionaries):
            rest, index = divmod(rest, len(dictionary))
            values.append(dictionary[index].as_py())
        yield tuple(reversed(values)), rows[code]


def _ints(array: pa.Array) -> Positions:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def _floats(array: pa.Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    return array.to_numpy(zero_copy_only=False).astype(np.float64)  # type: ignore[no-any-return]


def _bools(array: pa.Array) -> Bools:
    return array.to_numpy(zero_copy_only=False).astype(bool)  # type: ignore[no-any-return]
