"""Words for conditions, and what became of them and how they go together, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_robust.results.correlations import StudyCorrelation
from lightning_robust.results.report.formats import accuracy_interval, counted, listed, percent
from lightning_robust.results.report.measures import MEASURES, WHERE, Moment
from lightning_robust.results.statistics import Correlation
from lightning_robust.results.study import Condition

ROBUSTNESS = {"adv": "adversarial robustness", "ood": "OOD robustness"}
ACCURACY = {"adv": "adversarial accuracy", "ood": "OOD accuracy"}
OTHER = {"adv": "ood", "ood": "adv"}
AIM_TITLES = {
    "adversarial": "Aim at adversarial robustness",
    "both": "Aim at both",
    "ood": "Aim at OOD robustness",
    "none": "Without a defense",
}
NOT_DECLARED = "Aim not declared"
_NAMED = 6


def capital(text: str) -> str:
    """Return a text that starts with a capital."""
    return text[:1].upper() + text[1:]


def names_of(conditions: Sequence[Condition]) -> str:
    """Return names for a sentence, not more than a few of them."""
    names = [one.name for one in conditions] or ["no defense"]
    if len(names) > _NAMED:
        names = [*names[:_NAMED], f"{len(names) - _NAMED} more"]
    return listed(names)


def undeclared(condition: Condition) -> bool:
    """Return whether ``run.json`` names defenses of a condition without saying what they aim at."""
    info = condition.runs[0].info
    given = info.get("defenses")
    named = [
        *(given if isinstance(given, list) else []),
        *([condition.inference_defense] if condition.inference_defense else []),
    ]
    return any(not isinstance(one, dict) or "aim" not in one for one in named)


def aim_title(condition: Condition) -> str:
    """Return what a condition's defenses aim at, as a title."""
    return NOT_DECLARED if undeclared(condition) else AIM_TITLES[condition.aim]


def state(name: str, moments: Sequence[Moment], whole: bool = True) -> str:
    """Return what became of a condition: its accuracies at its first and last evaluation.

    Args:
        name: The condition's.
        moments: The evaluations that all of its seeds have.
        whole: Whether no seed went further.
    """
    if not moments:
        return f"{name}: its runs have no evaluation in common."
    first, last = moments[0], moments[-1]
    told = [key for key, score in last.scores.items() if score.effect.known]
    rest = _untold(last) + _absent(last)
    if len(moments) == 1:
        when = _when(last)
        scored = [
            f"{_accuracy(last, key)} of answers are right {WHERE[key]} ({_items(last, key)})" for key in told
        ]
        start = f"{name} was evaluated once{f' ({when})' if when else ''}"
        return f"{start}: {listed(scored)}.{rest}" if told else f"{start}.{rest}"
    moves = listed([_move(key, first, last) for key in told])
    start, end = _when(first) or "number 1", _when(last) or f"number {len(moments)}"
    return f"{name} went from its first evaluation ({start}) to {'its last' if whole else 'the last that all seeds have'} ({end}){' ' if moves else ''}{moves}.{rest}"


def correlation_sentences(found: StudyCorrelation) -> list[str]:
    """Return what is known of the correlation over defenses and within runs."""
    named = [
        ("Pearson's correlation", found.correlation.pearson),
        ("Spearman's rank correlation", found.correlation.spearman),
        ("the correlation at equal clean accuracy", found.correlation.partial),
    ]
    over = f"Over {counted(len(found.points), 'defense')}"
    given = [f"{name} is {_correlation(one)}" for name, one in named if not one.reason]
    missing: dict[str, list[str]] = {}
    for name, one in named:
        if one.reason:
            missing.setdefault(one.reason, []).append(name)
    sentences = [f"{over}, {listed(given)} (95 % intervals)."] if given else []
    if missing and not given:
        sentences.append(f"{over}, no correlation is given: {next(iter(missing))}.")
    else:
        sentences += [f"Not given: {listed(names)} ({reason})." for reason, names in missing.items()]
    if found.left_out:
        sentences.append(f"Left out, as they answer like a constant: {names_of(found.left_out)}.")
    if not math.isnan(found.trajectory_p):
        told = (
            "move together or against each other"
            if found.trajectory_p < 0.05
            else "show no common movement that chance would not explain"
        )
        sentences.append(
            f"From epoch to epoch within the runs the two accuracies {told} (p = {found.trajectory_p:.3f}, "
            "against runs whose epochs are shifted)."
        )
    return sentences


def _correlation(one: Correlation) -> str:
    return f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"


def _move(key: str, first: Moment, last: Moment) -> str:
    before = first.scores.get(key)
    if before is None or not before.effect.known:
        return f"to {_accuracy(last, key)} {WHERE[key]} ({_items(last, key)}; not measured at first)"
    return f"from {_accuracy(first, key)} to {_accuracy(last, key)} {WHERE[key]} ({_items(last, key)})"


def _accuracy(moment: Moment, key: str) -> str:
    effect = moment.scores[key].effect
    return f"{percent(effect.delta)}\u00a0% {accuracy_interval(effect)}"


def _items(moment: Moment, key: str) -> str:
    effect = moment.scores[key].effect
    seeds = f"{counted(effect.num_seeds, 'seed')}, " if effect.num_seeds > 1 else ""
    return f"{seeds}{counted(effect.num_items, 'item')}"


def _untold(moment: Moment) -> str:
    """Return why some accuracies are not given."""
    reasons: dict[str, list[str]] = {}
    for key, score in moment.scores.items():
        if not score.effect.known:
            reasons.setdefault(score.effect.reason, []).append(WHERE[key])
    return "".join(f" No accuracy is given {listed(where, 'or')}: {why}." for why, where in reasons.items())


def _absent(moment: Moment) -> str:
    """Return what was not measured, so that nobody reads silence as strength."""
    missing = [WHERE[column.key] for column in MEASURES if column.key not in moment.scores]
    return f" It was not measured {listed(missing, 'or')}." if missing else ""


def _when(moment: Moment) -> str:
    if moment.epoch is not None:
        return f"epoch {moment.epoch}"
    return "" if moment.step is None else f"step {moment.step}"
