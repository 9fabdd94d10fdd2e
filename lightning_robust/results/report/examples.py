"""Which adversarial examples to show, and which of their words changed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lightning_robust.errors import RobustError
from lightning_robust.results.records import decode_text, read_file
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.study import Condition, Run

CONTEXT_WORDS = 12
LONGEST_WORD = 60
LONGEST_TEXT = 20_000
_MOMENT = ["run_id", "epoch", "global_step"]


class Span(NamedTuple):
    """Words of a text that changed together, or stayed the same together."""

    text: str
    changed: bool


class Example(NamedTuple):
    """One successful attack; texts have one list of spans each (pairs have two)."""

    attack: str
    label: int
    predicted: int
    probability: float | None
    words_changed: int
    original: list[list[Span]]
    perturbed: list[list[Span]]


def load_examples(conditions: Sequence[Condition], limit: int, rule: Rule) -> list[tuple[Run, Example]]:
    """Return up to ``limit`` examples of the reported evaluations, each of another text.

    The first runs of the conditions take turns.
    """
    queues = []
    for condition in conditions[:limit]:
        run = condition.runs[0]
        queues.append([(run, example) for example in choose_examples(_successes(run, rule), limit)])
    chosen: dict[str, tuple[Run, Example]] = {}
    for found in chain.from_iterable(zip_longest(*queues)):
        if found is not None:
            chosen.setdefault(str(found[1].original), found)
    return list(chosen.values())[:limit]


def choose_examples(rows: Sequence[dict[str, object]], limit: int) -> list[Example]:
    """Return the ``limit`` most telling successes: the smallest share of words changed comes first.

    Among equals, the lower the probability left to the right class, the earlier. Attacks take turns
    and a text is shown once. Very long texts are passed over, as nobody reads an edit in them.

    Args:
        rows: Attack records as dicts, one evaluation's.
        limit: How many at most.
    """
    queues: dict[str, list[dict[str, object]]] = {}
    for row in sorted(filter(_shows_text, rows), key=_telling):
        queues.setdefault(str(row["attack"]), []).append(row)
    chosen: dict[object, dict[str, object]] = {}
    for row in chain.from_iterable(zip_longest(*queues.values())):
        if row is not None:
            chosen.setdefault(row["text"], row)
    return [_example(row) for row in list(chosen.values())[:limit]]


def changed_spans(original: str, perturbed: str) -> tuple[list[Span], list[Span]]:
    """Return both texts as spans, with the words marked that are not in the other.

    >>> changed_spans("a fine film", "a flne film")[1]
    [Span(text='a', changed=False), Span(text='flne', changed=True), Span(text='film', changed=False)]
    """
    before, after = original.split(), perturbed.split()
    left: list[Span] = []
    right: list[Span] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for operation, i1, i2, j1, j2 in matcher.get_opcodes():
        changed = operation != "equal"
        for words, spans in ((before[i1:i2], left), (after[j1:j2], right)):
            if words:
                spans.append(Span(" ".join(map(_shorten, words)), changed))
    return _cut_context(left), _cut_context(right)


def _successes(run: Run, rule: Rule) -> list[dict[str, object]]:
    """Read the texts of one evaluation only: those of all would not fit for long trainings."""
    chosen = select(run, rule).evaluation
    moment = (run.run_id, chosen.epoch, chosen.global_step)
    rows: list[dict[str, object]] = []
    for file in run.files:
        try:
            rows += _read_successes(file, moment)
        except (RobustError, pa.ArrowException, OSError):
            continue  # the study's problems name it
    return rows


def _read_successes(path: Path, moment: tuple[str, int | None, int | None]) -> list[dict[str, object]]:
    moments = read_file(path, _MOMENT)
    here = [
        pc.is_null(moments[name]) if value is None else pc.equal(moments[name], value)
        for name, value in zip(_MOMENT, moment, strict=True)
    ]
    wanted = pc.fill_null(pc.and_(here[0], pc.and_(here[1], here[2])), False)
    if not pc.any(wanted).as_py():
        return []
    table = read_file(path).filter(wanted)
    found: list[dict[str, object]] = table.filter(pc.equal(table["status"], "success")).to_pylist()
    return found


def _shows_text(row: dict[str, object]) -> bool:
    texts = (row["text"], row["perturbed_text"])
    known = row["status"] == "success" and row["label"] is not None
    return known and all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in texts)


def _telling(row: dict[str, object]) -> tuple[float, float, str]:
    words = max(len(str(row["text"]).split()), 1)
    probability = row["probability"]
    left = probability if isinstance(probability, float) else 1.0
    changed = row["words_changed"]
    return (changed if isinstance(changed, int) else 0) / words, left, str(row["item_id"])


def _example(row: dict[str, object]) -> Example:
    before, after = (_parts(str(row[name])) for name in ("text", "perturbed_text"))
    if len(before) != len(after):
        before, after = [" ".join(before)], [" ".join(after)]
    pairs = [changed_spans(one, other) for one, other in zip(before, after, strict=True)]
    probability = row["probability"]
    return Example(
        attack=str(row["attack"]),
        label=int(str(row["label"])),
        predicted=-1 if row["predicted"] is None else int(str(row["predicted"])),
        probability=probability if isinstance(probability, float) else None,
        words_changed=int(str(row["words_changed"] or 0)),
        original=[left for left, _ in pairs],
        perturbed=[right for _, right in pairs],
    )


def _parts(text: str) -> list[str]:
    decoded = decode_text(text)
    return [decoded] if isinstance(decoded, str) else list(decoded)


def _shorten(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"


def _cut_context(spans: list[Span]) -> list[Span]:
    """Keep the words near a change, so that an edit in a long text can be seen."""
    kept: list[Span] = []
    for index, span in enumerate(spans):
        words = span.text.split(" ")
        first, last = index == 0, index == len(spans) - 1
        room = CONTEXT_WORDS * (1 if first or last else 2)
        if span.changed or len(words) <= room + 2:
            kept.append(span)
            continue
        head = [] if first and not last else words[:CONTEXT_WORDS]
        tail = [] if last else words[-CONTEXT_WORDS:]
        kept.append(Span(" ".join([*head, "…", *tail]), changed=False))
    return kept
