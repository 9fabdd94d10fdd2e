"""Find the text and label columns of a table and check what stands in them, row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from lightning_robust.data.items import Text
from lightning_robust.errors import DataError, did_you_mean

TEXT_GUESSES: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("review",),
    ("content",),
)
_MOST_CLASSES = 100_000
LABEL_GUESSES = ("label", "labels", "gold_label", "sentiment", "class", "target")


def choose_text_columns(
    origin: str, names: Sequence[str], wanted: Sequence[str] | str | None
) -> tuple[str, ...]:
    """Return the text columns: those wanted, or the first usual names that are there.

    Raises:
        DataError: If a wanted column is missing or nothing usual is there.
    """
    if wanted:
        columns = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        for column in columns:
            require_column(origin, names, column, "text_columns")
        return columns
    lower = {name.lower(): name for name in names}
    # A pair of which one half is a usual single name (QNLI's `sentence`) must be seen as a pair.
    for guess in sorted(TEXT_GUESSES, key=len, reverse=True):
        if all(name in lower for name in guess) and not (len(guess) > 1 and "text" in lower):
            return tuple(lower[name] for name in guess)
    raise DataError(
        f"{origin} has no column with a usual name for texts. Set `text_columns` to one or two of: "
        f"{', '.join(names)}."
    )


def choose_label_column(origin: str, names: Sequence[str], wanted: str | None) -> str:
    """Return the label column: the one wanted, or the first usual name that is there.

    Raises:
        DataError: If the wanted column is missing or nothing usual is there.
    """
    if wanted:
        return require_column(origin, names, wanted, "label_column")
    lower = {name.lower(): name for name in names}
    for guess in LABEL_GUESSES:
        if guess in lower:
            return lower[guess]
    raise DataError(
        f"{origin} has no column with a usual name for labels. Set `label_column` to one of: "
        f"{', '.join(names)}."
    )


def require_column(origin: str, names: Sequence[str], column: str, setting: str) -> str:
    """Return ``column`` if it is there.

    Raises:
        DataError: With the columns there are.
    """
    if column not in names:
        raise DataError(
            f"{origin} has no column {column!r} (`{setting}`).{did_you_mean(column, names)} "
            f"Available: {', '.join(names)}."
        )
    return column


def without_empty(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns without the rows in which one of ``names`` is empty."""
    kept = [
        not any(_is_empty(value) for value in row) for row in zip(*(columns[n] for n in names), strict=True)
    ]
    return {name: list(compress(values, kept)) for name, values in columns.items()}


def parse_texts(origin: str, columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Text]:
    """Return a text per row, or a tuple of texts where ``names`` are several.

    Raises:
        DataError: If a text is missing, empty or no text.
    """
    parsed = []
    for name in names:
        values = columns[name]
        empty = [n for n, value in enumerate(values, 1) if _is_empty(value)]
        if empty:
            raise DataError(
                f"{origin}, column {name!r}: empty text in {_rows(empty)}. Remove or mend {_these(empty)}, "
                "or set `skip_empty: true` to leave out rows with an empty text."
            )
        wrong = [n for n, value in enumerate(values, 1) if not isinstance(value, (str, int, float))]
        if wrong:
            value = values[wrong[0] - 1]
            raise DataError(
                f"{origin}, column {name!r}: expected text in {_rows(wrong)}, but got {type(value).__name__}."
            )
        parsed.append([str(value) for value in values])
    return list(parsed[0]) if len(parsed) == 1 else list(zip(*parsed, strict=True))


def parse_labels(
    origin: str,
    column: str,
    values: Sequence[Any],
    label_map: Mapping[str, int | None] | None,
) -> list[int | None]:
    """Return a class number per row; None where ``label_map`` says to leave the row out.

    Raises:
        DataError: If a label is missing, outside the map or not a whole number of 0 or more.
    """
    where = f"{origin}, column {column!r}"
    missing = [n for n, value in enumerate(values, 1) if is_missing(value)]
    if missing:
        raise DataError(
            f"{where}: the label is missing in {_rows(missing)}. Remove or mend {_these(missing)}."
        )
    if label_map is not None:
        return _map_labels(where, values, label_map)
    numbers = [_whole_number(value) for value in values]
    wrong = [n for n, number in enumerate(numbers, 1) if number is None]
    if wrong:
        raise DataError(_not_whole(where, values, wrong))
    negative = [n for n, number in enumerate(numbers, 1) if number is not None and number < 0]
    if negative:
        raise DataError(
            f"{where}: expected labels of 0 or more, but got {values[negative[0] - 1]!r} in {_rows(negative)}. "
            "Many hub data sets mark unlabelled test rows so: choose another `split`."
        )
    huge = [n for n, number in enumerate(numbers, 1) if number is not None and number >= _MOST_CLASSES]
    if huge:
        raise DataError(
            f"{where}: expected class numbers below {_MOST_CLASSES}, but got {values[huge[0] - 1]!r} in "
            f"{_rows(huge)}. Is it the label? Name the column with `label_column`."
        )
    return numbers


def is_missing(value: object) -> bool:
    """Whether a cell is null, NaN or blank."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _is_empty(value: object) -> bool:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return missing or not str(value).strip()


def _map_labels(where: str, values: Sequence[Any], label_map: Mapping[str, int | None]) -> list[int | None]:
    # YAML reads `0: 1` as a number and CSV reads every cell as text: they meet as text.
    known = {str(key): number for key, number in label_map.items()}
    for key, number in known.items():
        if number is not None and not 0 <= number < _MOST_CLASSES:
            raise DataError(
                f"{where}: expected class numbers from 0 in `label_map`, but got {number} for {key!r}. "
                "Null leaves such rows out."
            )
    keys = [_label_key(value, known) for value in values]
    outside = [n for n, key in enumerate(keys, 1) if key not in known]
    if outside:
        value = values[outside[0] - 1]
        raise DataError(
            f"{where}: label {value!r} in {_rows(outside)} is not in `label_map`."
            f"{did_you_mean(str(value), known)} It knows: {', '.join(known)}. "
            "Add it, with null as its number to leave such rows out."
        )
    return [known[key] for key in keys]


def _label_key(value: object, known: Mapping[str, object]) -> str:
    key = str(value)
    number = _whole_number(value)
    return key if key in known or number is None else str(number)


def _whole_number(value: object) -> int | None:
    if isinstance(value, str):
        if "_" in value:  # which Python reads as a separator of digits
            return None
        try:
            value = float(value) if "." in value else int(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _not_whole(where: str, values: Sequence[Any], wrong: Sequence[int]) -> str:
    seen = sorted({str(value) for value in values})
    message = (
        f"{where}: expected whole numbers, but got {str(values[wrong[0] - 1])[:60]!r} in {_rows(wrong)}."
    )
    if len(seen) > 50:
        return f"{message} The column holds {len(seen)} different values: is it the label?"
    example = json.dumps({name: index for index, name in enumerate(seen)}, ensure_ascii=False)
    return f"{message} Name the classes, for example `label_map: {example}`."


def _rows(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {listed}{more}"


def _these(numbers: Sequence[int]) -> str:
    return "these rows" if len(numbers) > 1 else "this row"
