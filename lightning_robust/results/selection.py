"""Which checkpoint of a run is reported: named rules, none of which peeks unless its name says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lightning_robust.errors import ConfigError, did_you_mean
from lightning_robust.results.outcomes import Keep, everything, scores
from lightning_robust.results.parts import Bools, Evaluated, Items

if TYPE_CHECKING:
    from lightning_robust.results.conditions import Run

Rule = Literal["last", "clean", "joint", "oracle"]
RULES: tuple[Rule, ...] = get_args(Rule)

WORDS: dict[Rule, str] = {
    "last": "The last evaluation of each run, on all items.",
    "clean": (
        "The evaluation of each run with the best clean accuracy on one half of the items; "
        "the numbers are from the other half."
    ),
    "joint": (
        "The evaluation of each run with the best harmonic mean of clean, adversarial and OOD accuracy on one "
        "half of the items; the numbers are from the other half."
    ),
    "oracle": (
        "The evaluation of each run with the best harmonic mean of clean, adversarial and OOD accuracy on the "
        "reported items themselves: this peeks, and its numbers are too good."
    ),
}
"""Each rule in one sentence, for captions."""


@dataclass(frozen=True)
class Chosen:
    """The evaluation that a rule reports.

    Args:
        evaluation: The chosen one.
        index: Its place in the run.
        reported: Returns ``(items,)``: the items that numbers may be made from.
        words: The rule in one sentence, for captions.
    """

    evaluation: Evaluated
    index: int
    reported: Keep
    words: str


def select(run: Run, rule: Rule = "last") -> Chosen:
    """Return the evaluation of ``run`` that ``rule`` reports, and the items that count in its numbers.

    ``clean`` and ``joint`` choose on one half of the items and report the other: halves by a hash of the item's
    id, so that an item is on one side under all attacks and in all runs. Among equals (where nothing survives an attack
    all harmonic means are 0) the one with the best mean is chosen, and the earlier one of those.
    Evaluations that lack a kind (clean, adversarial, OOD) which another one of the run has are not compared.

    Raises:
        ConfigError: If the rule is unknown.
    """
    check_rule(rule)
    if rule not in run.chosen:
        index = len(run.evaluations) - 1 if rule == "last" else _best(run.evaluations, rule)
        run.chosen[rule] = Chosen(run.evaluations[index], index, reported(rule), WORDS[rule])
    return run.chosen[rule]


def reported(rule: Rule) -> Keep:
    """Return which items count under ``rule``."""
    return _other_half if rule in ("clean", "joint") else everything


def check_rule(rule: str) -> None:
    """Refuse an unknown rule.

    Raises:
        ConfigError: With the rules that there are.
    """
    if rule not in RULES:
        raise ConfigError(
            f"Expected `rule` to be one of {', '.join(RULES)}, but got {rule!r}.{did_you_mean(rule, RULES)}"
        )


def _best(evaluations: list[Evaluated], rule: Rule) -> int:
    """Return the place of the best evaluation; the last one where nothing that the rule compares was measured."""
    keep = everything if rule == "oracle" else _half
    found = [{name: score.accuracy for name, score in scores(one, keep).items()} for one in evaluations]
    # In order: sums of floating-point numbers depend on it, and ties on sums.
    kinds = ["clean"] if rule == "clean" else sorted(set().union(*found))
    values = {
        place: [one[kind] for kind in kinds]
        for place, one in enumerate(found)
        if kinds and not any(math.isnan(one.get(kind, math.nan)) for kind in kinds)
    }
    if not values:
        return len(evaluations) - 1

    def score(place: int) -> tuple[float, float, int]:
        one = values[place]
        return round(_harmonic(one), 12), round(math.fsum(one), 12), -place

    return max(values, key=score)


def _harmonic(values: list[float]) -> float:
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def _half(items: Items) -> Bools:
    return items.half


def _other_half(items: Items) -> Bools:
    return ~items.half
