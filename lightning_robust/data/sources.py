"""One origin of labelled texts."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_robust.data.columns import (
    choose_label_column,
    choose_text_columns,
    parse_labels,
    parse_texts,
    require_column,
    without_empty,
)
from lightning_robust.data.items import Item, Text
from lightning_robust.data.readers import Quoting, Table, read_table
from lightning_robust.data.sampling import seeded_sample, stable_hash
from lightning_robust.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

_QUOTING = ("auto", "none", "minimal")


@dataclass
class TextSource:
    """Where examples come from: a local file, a hub data set or the embedded demo corpus.

    >>> source = TextSource("demo", split="test", num_examples=2)
    >>> [item.label in (0, 1) for item in source.items()]
    [True, True]

    Args:
        path: ``demo``, a file (csv, tsv, json, jsonl or parquet, by its suffix) or a hub id.
        split: Split of the demo corpus or hub data set. A file is one split; there it has no meaning.
        text_columns: One column, or two for pairs. By default a usual name (``text``, ``sentence``,
            ``premise`` and ``hypothesis``, …).
        label_column: By default a usual name (``label``, ``gold_label``, ``sentiment``, …).
        label_map: Class number of each label found; null leaves its rows out. Without one, labels are
            whole numbers already.
        domain: Name of the group that all examples belong to; by default `name`, and in the demo
            corpus the domain that each review was made for.
        num_examples: Size of a random sample; by default everything.
        seed: Seed of that sample. It depends on the examples' ids, not on their order.
        name: Part of every id made here; by default the file's name without suffix.
        domain_column: Column with the group of each example, instead of `domain`.
        id_column: Column with unique ids, instead of hashes of `name` and the texts.
        subset: Configuration of a hub data set, or the key under which a JSON file holds the records
            (``a.b`` for nested ones).
        quoting: How csv and tsv files treat ``"``: ``minimal`` (quoted fields), ``none`` (an ordinary
            character, as in GLUE's files) or ``auto`` (``none`` for tsv files in which no quoting fits).
        skip_empty: Leave out rows with an empty text instead of refusing the source.
    """

    path: str
    split: str = "train"
    text_columns: list[str] | str | None = None
    label_column: str | None = None
    label_map: dict[str, int | None] | None = None
    domain: str | None = None
    num_examples: int | None = None
    seed: int = 0
    name: str | None = None
    domain_column: str | None = None
    id_column: str | None = None
    subset: str | None = None
    quoting: Quoting = "auto"
    skip_empty: bool = False

    def __post_init__(self) -> None:
        if self.domain is not None and self.domain_column is not None:
            raise ConfigError(
                f"Expected one of `domain` and `domain_column`, but got {self.domain!r} and "
                f"{self.domain_column!r}."
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ConfigError(f"Expected `num_examples` to be >= 1, but got {self.num_examples}.")
        if self.quoting not in _QUOTING:
            raise ConfigError(
                f"Expected `quoting` to be one of {', '.join(_QUOTING)}, but got {self.quoting!r}."
            )

    @property
    def source_name(self) -> str:
        """`name`, or one made of `path` that is the same wherever the file lies."""
        if self.name is not None:
            return self.name
        if self.path == "demo":
            return f"demo-{self.split}"
        file = Path(self.path)
        parts = [file.stem, self.subset] if file.is_file() else [self.path, self.subset, self.split]
        return "-".join(part for part in parts if part)

    def items(self) -> list[Item]:
        """Return the examples, in the file's order or, if sampled, in an order of the seed's.

        Raises:
            DataError: If the source cannot be read or a row cannot be used; rows count from 1 after
                the header.
        """
        return self.items_from(self._read())

    def items_and_names(self) -> tuple[list[Item], list[str] | None]:
        """Return the examples and the class names, None where nothing states them.

        Raises:
            DataError: As in `items`.
        """
        table = self._read()
        return self.items_from(table), self._label_names(table)

    def items_from(self, table: Table) -> list[Item]:
        """Return the examples of a table already read; `path` then only names it in messages.

        Raises:
            DataError: If a column is missing or a row cannot be used.
        """
        origin = self.path if self.subset is None else f"{self.path} ({self.subset})"
        names = list(table.columns)
        text_columns = choose_text_columns(origin, names, self.text_columns)
        if self.skip_empty:
            table = Table(without_empty(table.columns, text_columns))
        columns = table.columns
        texts = parse_texts(origin, columns, text_columns)
        label_column = choose_label_column(origin, names, self.label_column)
        labels = parse_labels(origin, label_column, columns[label_column], self.label_map)
        domains = self._domains(origin, table, len(texts))
        given = self._given_ids(origin, table)
        kept = [
            (text, label, domain, given[row] if given else None)
            for row, (text, label, domain) in enumerate(zip(texts, labels, domains, strict=True))
            if label is not None
        ]
        if not kept:
            raise DataError(f"{origin}: no row is left after `label_map` and `skip_empty`.")
        ids = [id_ for *_, id_ in kept if id_ is not None] or self._hashed_ids([row[:3] for row in kept])
        items = [
            Item(id_, text, label, domain) for id_, (text, label, domain, _) in zip(ids, kept, strict=True)
        ]
        return self._sample(origin, items)

    def load(self) -> datasets.Dataset:
        """Return the examples with the columns ``id``, ``text``, ``label`` and ``domain``.

        Arrow knows no tuples: the texts of a pair stand there as a list.

        Raises:
            DataError: As in `items`.
        """
        import datasets

        items = self.items()
        text = datasets.Value("string")
        features = datasets.Features(
            id=datasets.Value("string"),
            text=text if isinstance(items[0].text, str) else [text],
            label=datasets.Value("int64"),
            domain=datasets.Value("string"),
        )
        columns: dict[str, list[Any]] = {
            "id": [item.id for item in items],
            "text": [item.text if isinstance(item.text, str) else list(item.text) for item in items],
            "label": [item.label for item in items],
            "domain": [item.domain for item in items],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    def _read(self) -> Table:
        return read_table(self.path, self.split, self.subset, self.quoting)

    def _label_names(self, table: Table) -> list[str] | None:
        if self.label_map is None:
            return table.label_names
        first: dict[int, str] = {}
        for name, number in self.label_map.items():
            if number is not None:
                first.setdefault(number, str(name))
        return [first.get(number, str(number)) for number in range(max(first, default=-1) + 1)]

    def _domains(self, origin: str, table: Table, size: int) -> list[str]:
        wanted = self.domain_column
        if wanted is None and self.domain is None and self.path == "demo" and "domain" in table.columns:
            wanted = "domain"
        if wanted is None:
            return [self.source_name if self.domain is None else self.domain] * size
        column = require_column(origin, list(table.columns), wanted, "domain_column")
        return [str(value) for value in table.columns[column]]

    def _given_ids(self, origin: str, table: Table) -> list[str]:
        if self.id_column is None:
            return []
        column = require_column(origin, list(table.columns), self.id_column, "id_column")
        ids = [str(value) for value in table.columns[column]]
        twice = [id_ for id_, count in Counter(ids).items() if count > 1]
        if twice:
            raise DataError(
                f"{origin}, column {column!r}: expected ids that occur once, but {twice[0]!r} does not "
                f"({len(twice)} such ids). Leave `id_column` out to have ids made from the texts."
            )
        return ids

    def _hashed_ids(self, rows: list[tuple[Text, int, str]]) -> list[str]:
        bare = [stable_hash(self.source_name, text) for text, _, _ in rows]
        ids = list(bare)
        seen: Counter[str] = Counter()
        # Repeated texts are numbered by label and domain, so that most keep their id when rows move.
        for index in sorted(range(len(rows)), key=lambda row: (bare[row], *rows[row][1:], row)):
            seen[bare[index]] += 1
            if seen[bare[index]] > 1:
                ids[index] = f"{bare[index]}-{seen[bare[index]]}"
        return ids

    def _sample(self, origin: str, items: list[Item]) -> list[Item]:
        if self.num_examples is None:
            return items
        if self.num_examples > len(items):
            warnings.warn(
                f"{origin}: `num_examples` is {self.num_examples}, but there are {len(items)}; using all.",
                stacklevel=2,
            )
        return seeded_sample(items, [item.id for item in items], self.num_examples, self.seed)
