"""The verdict and the states of runs in sentences that need no knowledge of statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_robust.results.correlations import StudyCorrelation
from lightning_robust.results.report.formats import accuracy_interval, change, count, counted, listed, percent
from lightning_robust.results.report.measures import MEASURES, WHERE, Moment
from lightning_robust.results.statistics import Correlation, Effect, Ratio, Verdict
from lightning_robust.results.statistics.power import SEEDS
from lightning_robust.results.study import Condition, Study
from lightning_robust.results.transfer import StudyVerdict

ROBUSTNESS = {"adv": "adversarial robustness", "ood": "OOD robustness"}
ACCURACY = {"adv": "adversarial accuracy", "ood": "OOD accuracy"}
OTHER = {"adv": "ood", "ood": "adv"}
AIM_TITLES = {
    "adversarial": "Aim at adversarial robustness",
    "both": "Aim at both",
    "ood": "Aim at OOD robustness",
    "none": "Without a defense",
}
_NAMED = 6


class Statement(NamedTuple):
    """What the page opens with.

    Args:
        label: ``positive``, ``negative``, ``neutral``, ``inconclusive`` or ``no verdict``.
        sentence: For everybody.
        basis: The numbers behind it, and what to do where it cannot be told.
    """

    label: str
    sentence: str
    basis: list[str]

    @property
    def css(self) -> str:
        """Class of the page's style."""
        return "none" if self.label == "no verdict" else self.label


def statements(study: Study, verdicts: Sequence[StudyVerdict], selection: str) -> list[Statement]:
    """Return one statement for each verdict, or one that says why there is none."""
    if not verdicts:
        return [_no_verdict(study)]
    return [_statement(one, selection) for one in verdicts]


def state(name: str, moments: Sequence[Moment]) -> str:
    """Return what became of a condition: its accuracies at its first and last evaluation."""
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
    return f"{name} went from its first evaluation ({start}) to its last ({end}){' ' if moves else ''}{moves}.{rest}"


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
        sentences.append(f"Left out, as they answer like a constant: {_defenses(found.left_out)}.")
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


def _statement(one: StudyVerdict, selection: str) -> Statement:
    on, off = ROBUSTNESS[one.aim], ROBUSTNESS[OTHER[one.aim]]
    head = f"With {one.backbone}, " if one.backbone else ""
    compared = f"{_defenses(one.conditions)} against {one.baseline.name}"
    left_out = (
        [f"Left out, as they answer like a constant: {_defenses(one.left_out)}."] if one.left_out else []
    )
    if one.verdict is None:
        sentence = _capital(f"{head}there is no answer on whether raising {on} changes {off}: {one.reason}.")
        return Statement("no verdict", sentence, [f"Compared: {compared}. {selection}", *left_out])
    verdict = one.verdict
    return Statement(
        verdict.label,
        _capital(head + _answer(verdict, on, off, len(one.conditions))),
        [
            *_numbers(verdict, one.aim, len(one.conditions)),
            f"It rests on {compared}; {_sizes(verdict, one.aim)}. {selection}",
            *left_out,
        ],
    )


def _answer(verdict: Verdict, on: str, off: str, number: int) -> str:
    margin = f"±{100 * verdict.margin:.3g} point{'s' if verdict.margin != 0.01 else ''}"
    who = "defenses that raise" if number > 1 else "the defense that raises"
    if verdict.label == "neutral":
        return f"{who} {on} left {off} unchanged within {margin}."
    if verdict.label == "positive":
        return f"{who} {on} raised {off} too."
    if verdict.label == "negative":
        return f"{who} {on} lowered {off}."
    return f"it cannot be told yet whether raising {on} changes {off}: {verdict.reason}.{_needed(verdict)}"


def _needed(verdict: Verdict) -> str:
    if verdict.on_target.num_seeds == 1:
        return " Train the baseline and the defenses with three seeds or more."
    if verdict.needed is None:
        too_much = (
            f" Seeds differ so much that {SEEDS[-1]} would not show a change of {_points(verdict.margin)}."
        )
        return too_much if verdict.spread is not None else ""
    seeds, items = (
        counted(verdict.needed.num_seeds, "seed"),
        counted(_round_up(verdict.needed.num_items), "item"),
    )
    return f" About {items} and {seeds} would be needed to see a change of {_points(verdict.margin)}."


def _numbers(verdict: Verdict, aim: str, number: int) -> list[str]:
    mean = f"On the mean of {number} defenses, " if number > 1 else ""
    sentence = (
        f"{mean}{ACCURACY[aim]} changed by {_change(verdict.on_target)} and "
        f"{ACCURACY[OTHER[aim]]} by {_change(verdict.off_target)}."
    )
    ratio = f" {_ratio(verdict.ratio)}" if verdict.label != "inconclusive" or not verdict.ratio.reason else ""
    return [_capital(sentence) + ratio]


def _change(effect: Effect) -> str:
    return f"{change(effect)} points" if effect.known else f"an amount that cannot be given ({effect.reason})"


def _ratio(ratio: Ratio) -> str:
    if ratio.reason:
        return f"How much of a gain carries over is {ratio.reason}."
    return f"Each point gained came with {ratio.value:+.2f} [{ratio.low:+.2f}, {ratio.high:+.2f}] points on the other side."


def _sizes(verdict: Verdict, aim: str) -> str:
    effects = {aim: verdict.on_target, OTHER[aim]: verdict.off_target}
    seeds = counted(verdict.on_target.num_seeds, "seed")
    return f"{seeds}, {count(effects['adv'].num_items)} adversarial and {count(effects['ood'].num_items)} OOD items"


def _no_verdict(study: Study) -> Statement:
    how = (
        "Train without any defense with the same seeds, then report both together: "
        "lightning-robust report DEFENDED BASELINE -o report.html"
    )
    if len(study.conditions) == 1:
        what = "one run" if len(study.runs) == 1 else "runs of one kind"
        reason = f"this page is about {what}, and a verdict compares defenses with a baseline without them"
    elif all(study.baseline(one) is None for one in study.conditions):
        reason = "no condition is a baseline for the others"
        how += ", or name the baseline among these: --baseline NAME"
    elif any(one.aim == "both" for one in study.conditions):
        reason = "the defenses here aim at both kinds of robustness, so there is none that a gain could carry over to"
        how = "Add a defense that aims at adversarial or at OOD robustness alone."
    else:
        reason = "no run says that it had a defense, and what that aims at"
        how = "Defenses of lightning-robust note it in run.json; for others add it there, as «defenses»."
    return Statement("no verdict", f"There is no verdict: {reason}.", [how.rstrip(".") + "."])


def _defenses(conditions: Sequence[Condition]) -> str:
    names = [one.name for one in conditions] or ["no defense"]
    if len(names) > _NAMED:
        names = [*names[:_NAMED], f"{len(names) - _NAMED} more"]
    return listed(names)


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


def _points(fraction: float) -> str:
    return f"{100 * fraction:.3g} point{'' if fraction == 0.01 else 's'}"


def _round_up(number: int) -> int:
    """Return two digits of a number that is only a rough guide.

    >>> _round_up(992)
    1000
    """
    unit: int = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // unit) * unit


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
