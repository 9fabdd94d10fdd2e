"""Which attacks an evaluation runs, and what each of their searches may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from lightning_robust.attacks import Attack, get_attack
from lightning_robust.errors import ConfigError


def make_attacks(specs: str | Sequence[str | Mapping[str, Any] | Attack]) -> list[Attack]:
    """Return attacks from names, settings with a ``name``, or attacks.

    Raises:
        ConfigError: If one is unknown or two share a name, which their metrics would too.
    """
    attacks = [_make_attack(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Expected every attack once, but {name!r} occurs {names.count(name)} times.")
    return attacks


def _make_attack(spec: str | Mapping[str, Any] | Attack) -> Attack:
    if isinstance(spec, str):
        return get_attack(spec)
    if isinstance(spec, Attack):
        return spec
    if isinstance(spec, Mapping) and "name" in spec:
        return get_attack(**spec)
    raise ConfigError(f"Expected an attack's name, or its settings with a `name`, but got {spec!r}.")


def check_budget(query_budget: int | None) -> None:
    """Raise `ConfigError` where a query budget leaves no query."""
    if query_budget is not None and query_budget < 1:
        raise ConfigError(f"Expected `query_budget` to be >= 1, but got {query_budget}. None means no limit.")


def queries_of_a_search(
    query_budget: int | None, total: int | None, num_attacks: int, num_items: int
) -> int | None:
    """Return the queries that one search may make, where all together may make ``total``.

    Raises:
        ConfigError: If that leaves a search without a query.
    """
    check_budget(query_budget)
    searches = num_attacks * num_items
    if total is None or not searches:
        return query_budget
    if total < searches:
        raise ConfigError(
            f"Expected `total_query_budget` to be >= {searches}, one query for each of {num_attacks} "
            f"attacks on {num_items} items, but got {total}."
        )
    return min(total // searches, query_budget or total)


def seconds_of_an_attack(deadline: float | None, num_left: int) -> float | None:
    """Return an equal part of the seconds that are left, as an attack always gets to start.

    Args:
        deadline: Of ``time.perf_counter``; None means no limit.
        num_left: Attacks that are left, this one included.
    """
    return None if deadline is None else max(1e-3, deadline - perf_counter()) / num_left
