"""One evaluation: every environment and every attack on a victim, as records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lightning_robust.attacks import Attack, AttackEngine, AttackResult
from lightning_robust.attacks.sanity import SanityWarning, sanity_warnings
from lightning_robust.attacks.sanity_victim import check_random, check_victim
from lightning_robust.callbacks.attack_plan import (
    check_budget,
    make_attacks,
    queries_of_a_search,
    seconds_of_an_attack,
)
from lightning_robust.callbacks.attack_run import AttackRun
from lightning_robust.callbacks.item_records import When, attack_record, environment_records, static_record
from lightning_robust.data.items import Environment, Item, Text
from lightning_robust.data.sampling import stable_hash
from lightning_robust.errors import ConfigError
from lightning_robust.results import (
    PartialRecords,
    Record,
    RecordsError,
    decode_text,
    metrics,
    read_run_json,
    transfer_deltas,
)

__all__ = ["Evaluation", "Shard", "When", "check_budget", "free_folder", "make_attacks"]


@dataclass(frozen=True)
class Shard:
    """The share of the items that one of several processes evaluates."""

    rank: int = 0
    world_size: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's items."""
        return list(items[self.rank :: self.world_size])


@dataclass
class Evaluation:
    """What is evaluated: the same fixed items every time.

    Args:
        environments: Static environments.
        attacks: Run on `attacked`.
        attacked: A sample of the clean items.
        query_budget: Queries that one search may make; None means no limit.
        total_query_budget: Queries that all attacks together may make, shared out evenly among the searches,
            so that results do not depend on the order of items or on the number of processes.
        time_budget: Seconds that the attacks may take. What is shared out evenly among them then decides
            which searches end early, and items that were not reached have no record.
        seed: Of the attacks' generators.
        max_batch_tokens: Padded tokens in one call of the victim.
        autocast: Data type that the victim computes in: ``bfloat16``, ``float16``, or None for its own.
        progress: Whether to show progress bars; None shows them on a terminal.
        warm_start: Whether an item's last successful perturbation is tried before a new search.
        found: The last successful perturbation and its number of changed words, by attack and item id.

    Attributes:
        doubts: What makes the last evaluation's results doubtful; complete after `judge`.
    """

    environments: Sequence[Environment]
    attacks: Sequence[Attack] = ()
    attacked: Sequence[Item] = ()
    query_budget: int | None = None
    total_query_budget: int | None = None
    time_budget: float | None = None
    seed: int = 0
    max_batch_tokens: int = 16384
    autocast: str | None = None
    progress: bool | None = None
    warm_start: bool = False
    found: dict[tuple[str, str], tuple[Text, int]] = field(default_factory=dict)

    doubts: list[SanityWarning] = field(default_factory=list, init=False)
    _victim_checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.query_budget = queries_of_a_search(
            self.query_budget, self.total_query_budget, len(self.attacks), len(self.attacked)
        )
        attacks = [attack.name for attack in self.attacks]
        for one in self.environments:
            if one.name in attacks:
                raise ConfigError(
                    f"Expected environments and attacks with different names, but {one.name!r} is both: "
                    "their metrics would share a key."
                )

    def run(
        self,
        victim: Any,
        when: When,
        *,
        shard: Shard | None = None,
        partial: Path | None = None,
        weights: str = "",
    ) -> list[Record]:
        """Evaluate this process's share.

        Args:
            victim: A callable ``texts -> probabilities (n, classes)``.
            when: What the records say about run and time.
            shard: This process's share; by default everything.
            partial: Where finished attack results are kept until the evaluation is complete. Those of an
                interrupted evaluation of the same weights and settings are taken over.
            weights: The weights' `lightning_robust.modules.state_key.fingerprint`.

        Returns:
            One record for each environment or attack and item.
        """
        shard = shard or Shard()
        engine = AttackEngine(
            victim,
            self.max_batch_tokens,
            progress=self.progress,
            keep_answers=True,
            autocast=self.autocast,
        )
        check = shard.rank == 0 and bool(self.attacks) and not self._victim_checked
        self.doubts = self._check_victim(victim) if check else []
        records: list[Record] = []
        for environment in self.environments:
            items = shard.of(environment.items)
            records += environment_records(engine.oracle, when, environment, items, progress=self.progress)
        items = shard.of(self.attacked)
        key = stable_hash(weights, self._settings(), [item.id for item in items])
        deadline = None if self.time_budget is None else perf_counter() + self.time_budget
        with _kept(partial, key) as kept:
            for number, attack in enumerate(self.attacks):
                seconds = seconds_of_an_attack(deadline, len(self.attacks) - number)
                run = AttackRun(attack, items, when, kept)
                records += self._attack(run, engine, seconds, check)
        self._victim_checked = True
        return records

    def judge(self, records: Sequence[Record]) -> list[SanityWarning]:
        """Return what makes an evaluation's results doubtful, from all processes' records.

        Checks that ask the victim were made while it was attacked, in a run's first evaluation only.
        """
        attacks = {attack.name: [r for r in records if r.attack == attack.name] for attack in self.attacks}
        clean = {r.item_id: r.correct for r in records if r.kind == "clean"}
        white_box = [attack.name for attack in self.attacks if attack.kind == "embedding"]
        classes = 1 + max((max(r.label, r.predicted or 0) for r in records), default=1)
        self.doubts += sanity_warnings(
            {name: group for name, group in attacks.items() if group},
            classes,
            clean=clean,
            query_budget=self.query_budget,
            white_box=white_box,
        )
        return self.doubts

    def remember(self, records: Sequence[Record]) -> None:
        """Keep the successful perturbations among all processes' records for the next warm start."""
        for record in records:
            if record.perturbed_text is not None:
                text = decode_text(record.perturbed_text)
                self.found[record.attack, record.item_id] = (text, record.words_changed)

    def keys(self) -> list[str]:
        """Return the names of the metrics that an evaluation gives."""
        empty = When("")
        records = [
            static_record(empty, one, replace(item, label=0), torch.eye(2)[:1], 0.0)
            for one in self.environments
            for item in one.items[:1]
        ]
        for attack in self.attacks:
            item = self.attacked[0]
            result = AttackResult(
                item.id, attack.name, "skipped", item.label, 0, 0.0, 1, 0.0, item.text, None, 0, None, 0, 0.0
            )
            records.append(attack_record(empty, result))
        return [*metrics(records), *transfer_deltas(records, records)]

    def in_order(self, records: Sequence[Record]) -> list[Record]:
        """Return all processes' records in the order of one process: environments, then attacks."""
        groups: list[tuple[str, str, str, Sequence[Item]]] = [
            (one.role, one.name, "", one.items) for one in self.environments
        ]
        groups += [("attack", "clean", attack.name, self.attacked) for attack in self.attacks]
        keys = [
            (kind, environment, attack, item.id)
            for kind, environment, attack, items in groups
            for item in items
        ]
        place = {key: number for number, key in enumerate(keys)}
        return sorted(records, key=lambda r: place[r.kind, r.environment, r.attack, r.item_id])

    def _check_victim(self, victim: Any) -> list[SanityWarning]:
        gradients = any(attack.needs_gradients for attack in self.attacks)
        return check_victim(victim, self.attacked, gradients=gradients, seed=self.seed)

    def _attack(
        self, run: AttackRun, engine: AttackEngine, seconds: float | None, check: bool
    ) -> list[Record]:
        if self.warm_start:
            run.retry(engine.oracle, self.found)
        with run.telling_what_is_kept():
            results = run.search(engine, self.query_budget, self.seed, seconds)
            if check:
                self.doubts += check_random(engine.victim, run.attack, results, seed=self.seed)
        return run.records

    def _settings(self) -> dict[str, Any]:
        warm = self.found.items() if self.warm_start else ()
        return {
            "attacks": {attack.name: repr(attack.settings) for attack in self.attacks},
            "query_budget": self.query_budget,
            "seed": self.seed,
            "autocast": self.autocast,
            "warm": sorted(map(str, warm)),
        }


def free_folder(base: Path, run_id: str | None = None) -> Path:
    """Return ``base``, ``base-2``, ``base-3``, …: the first that holds no finished records, or those of a run.

    Args:
        base: Where to begin.
        run_id: A run whose own folder counts as free.
    """
    folder, number = base, 1
    while any((folder / "records").glob("*.parquet")) and not (run_id and _run_of(folder) == run_id):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _run_of(folder: Path) -> object:
    try:
        return read_run_json(folder).get("run_id")
    except RecordsError:
        return None


@contextmanager
def _kept(path: Path | None, key: str) -> Iterator[PartialRecords | None]:
    if path is None:
        yield None
        return
    with PartialRecords(path, key) as kept:
        yield kept
