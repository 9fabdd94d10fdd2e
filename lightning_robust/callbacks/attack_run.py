"""One attack of an evaluation: what was finished before, what succeeds again, and searches on the other items."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from lightning_robust.attacks import Attack, AttackEngine, AttackResult
from lightning_robust.attacks.oracle import Failure, Oracle
from lightning_robust.callbacks.item_records import When, attack_record, prediction
from lightning_robust.data.items import Item, Text
from lightning_robust.results import PartialRecords, Record

logger = logging.getLogger(__name__)

Found = Mapping[tuple[str, str], tuple[Text, int]]
"""The last successful perturbation and its number of changed words, by attack and item id."""


@dataclass
class AttackRun:
    """One attack on its items, whose results become records as they come.

    Args:
        attack: The attack.
        items: What it attacks.
        when: What the records say about run and time.
        kept: Where records are kept until the evaluation is complete; those of this attack are taken over.
    """

    attack: Attack
    items: Sequence[Item]
    when: When
    kept: PartialRecords | None = None
    _records: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        done = [one for one in self.kept.records if one.attack == self.attack.name] if self.kept else []
        self._records = {record.item_id: replace(record, **vars(self.when)) for record in done}
        if done:
            logger.info(
                "%s: %d of %d items were finished before.", self.attack.name, len(done), len(self.items)
            )

    @property
    def records(self) -> list[Record]:
        """One record for each item that was reached, in the order of items."""
        return [self._records[item.id] for item in self.items if item.id in self._records]

    @property
    def left(self) -> list[Item]:
        """The items without a record."""
        return [item for item in self.items if item.id not in self._records]

    def retry(self, oracle: Oracle, found: Found) -> None:
        """Try the items' last successful perturbations before a new search; two queries each."""
        # The success of an attack on an instruction is not the answer to its text.
        if self.attack.kind != "instruction":
            for result in _succeeding_again(oracle, self.attack, self.left, found):
                self._keep(result)

    def search(
        self, engine: AttackEngine, query_budget: int | None, seed: int, seconds: float | None
    ) -> list[AttackResult]:
        """Attack the items that are left; arguments as of `AttackEngine.run`."""
        return engine.run(self.attack, self.left, query_budget, seed, self._keep, time_budget=seconds)

    @contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """Say, where the user interrupts, what becomes of the items that are finished."""
        try:
            yield
        except KeyboardInterrupt:
            kept = self.kept
            where = (
                f" are kept in {kept.path}; the same evaluation goes on from there" if kept else " are lost"
            )
            done, number = len(self._records), len(self.items)
            logger.warning("Interrupted in %s: %d of %d items%s.", self.attack.name, done, number, where)
            raise

    def _keep(self, result: AttackResult) -> None:
        record = attack_record(self.when, result)
        self._records[result.item_id] = record
        if self.kept is not None:
            self.kept.append(record)


def _succeeding_again(
    oracle: Oracle, attack: Attack, items: Sequence[Item], found: Found
) -> Iterator[AttackResult]:
    known = [item for item in items if (attack.name, item.id) in found]
    perturbations = [found[attack.name, item.id] for item in known]
    originals = oracle.answer([[item.text] for item in known])
    again = oracle.answer([[text] for text, _ in perturbations])
    for item, (text, words), before, after in zip(known, perturbations, originals, again, strict=True):
        if isinstance(before, Failure) or isinstance(after, Failure):
            continue
        if prediction(before) == item.label != prediction(after):
            yield AttackResult(
                item_id=item.id,
                attack=attack.name,
                status="success",
                label=item.label,
                predicted=prediction(after),
                probability=float(after[0, item.label]),
                queries=2,
                seconds=0.0,
                original_text=item.text,
                perturbed_text=text,
                words_changed=words,
                error=None,
                original_predicted=prediction(before),
                original_probability=float(before[0, item.label]),
                warm_started=True,
            )
