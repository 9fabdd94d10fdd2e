"""The verdicts in sentences that need no knowledge of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_robust.results.report.formats import change, count, counted, percent, points
from lightning_robust.results.report.wording import (
    ACCURACY,
    OTHER,
    ROBUSTNESS,
    capital,
    names_of,
    undeclared,
)
from lightning_robust.results.statistics import Effect, Ratio, Verdict
from lightning_robust.results.statistics.power import SEEDS
from lightning_robust.results.study import Study
from lightning_robust.results.transfer import StudyVerdict

HOW_TO_DECLARE = (
    '`aim` is a class attribute of a Defense: "adversarial", "ood" or "both" (the default); '
    'in run.json a defense is {"name": "…", "aim": "…", "settings": {}}'
)
_DIFFER = "the defenses differ"


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


def asked_in_advance(verdicts: Sequence[StudyVerdict]) -> str:
    """Return how verdicts and the matrix differ in what they correct for; nothing without a verdict."""
    number = sum(one.verdict is not None for one in verdicts)
    if not number:
        return ""
    others = " Verdicts on several aims or backbones are not corrected for each other." if number > 1 else ""
    return (
        "A verdict is one question asked in advance, with its own 95 % interval; the transfer matrix asks many at "
        f"once and corrects for it, so that a verdict can stand where no cell is marked.{others}"
    )


def silent(study: Study) -> list[str]:
    """Return a sentence on defenses that no verdict counts because they do not say what they aim at."""
    found = [one for one in study.conditions if undeclared(one)]
    if not found:
        return []
    return [
        f"What the defenses of {names_of(found)} aim at is not declared: no verdict counts them. To declare it: {HOW_TO_DECLARE}."
    ]


def _statement(one: StudyVerdict, selection: str) -> Statement:
    head = f"With {one.backbone}, " if one.backbone else ""
    compared = f"{names_of(one.conditions)} against {one.baseline.name}"
    left_out = (
        [f"Left out, as they answer like a constant: {names_of(one.left_out)}."] if one.left_out else []
    )
    left_out += [one.note] if one.note else []
    if one.verdict is None:
        on, off = ROBUSTNESS[one.aim], ROBUSTNESS[OTHER[one.aim]]
        sentence = capital(f"{head}there is no answer on whether raising {on} changes {off}: {one.reason}.")
        return Statement("no verdict", sentence, [f"Compared: {compared}. {selection}", *left_out])
    verdict = one.verdict
    return Statement(
        verdict.label,
        capital(head + _answer(one, verdict)),
        [
            *_beyond(one, verdict),
            _numbers(verdict, one.aim, len(one.conditions)),
            f"It rests on {compared}; {_sizes(verdict, one.aim)}. {selection}",
            *_limits(verdict),
            *left_out,
        ],
    )


def _answer(one: StudyVerdict, verdict: Verdict) -> str:
    off = ROBUSTNESS[OTHER[one.aim]]
    target = _on_target(one, verdict.on_target)
    if verdict.label == "inconclusive":
        return _inconclusive(one, verdict)
    if verdict.label == "neutral":
        return f"{target}, and left {off} unchanged within {_margin(verdict.margin)}."
    way = "raised" if verdict.label == "positive" else "lowered"
    return f"{target}, and {way} {off}{' too' if way == 'raised' else ''}."


def _inconclusive(one: StudyVerdict, verdict: Verdict) -> str:
    on, off = ROBUSTNESS[one.aim], ROBUSTNESS[OTHER[one.aim]]
    reason, gained = one.reason or verdict.reason, verdict.on_target
    if reason.startswith(_DIFFER):
        return f"there is no one answer on whether raising {on} changes {off}, as {reason}."
    if gained.known and gained.sign < 0 and gained.num_seeds > 1:
        return f"{_on_target(one, gained)}: there is no gain that could carry over to {off}."
    return f"it cannot be told yet whether raising {on} changes {off}: {reason}."


def _beyond(one: StudyVerdict, verdict: Verdict) -> list[str]:
    """Return what an inconclusive study shows all the same, and what would help."""
    gained = verdict.on_target
    if verdict.label != "inconclusive" or verdict.reason.startswith(_DIFFER):
        return []
    single = gained.known and gained.num_seeds == 1
    if gained.known and gained.sign < 0 and not single:
        return []
    seen = f"In these runs, {_on_target(one, gained)}. " if single else ""
    found = f"{seen}{_needed(verdict)}".rstrip()
    return [found] if found else []


def _on_target(one: StudyVerdict, found: Effect) -> str:
    """Return what defenses did where they aim at, as the mean of all of them."""
    several = len(one.conditions) > 1
    who = f"{'defenses' if several else 'the defense'} aimed at {ROBUSTNESS[one.aim]}"
    mean = " on the mean" if several else ""
    if not found.sign:
        return (
            f"{who} showed{', on the mean,' if several else ''} no change of it that could be told from none"
        )
    way = "raised" if found.sign > 0 else "lowered"
    amount = points(found.delta) if found.sign > 0 else percent(-found.delta)
    return f"{who} {way} it by {amount} points{mean}"


def _margin(margin: float) -> str:
    return f"±{100 * margin:.3g} point{'s' if margin != 0.01 else ''}"


def _limits(verdict: Verdict) -> list[str]:
    if verdict.label != "neutral":
        return []
    seeds = counted(verdict.off_target.num_seeds, "seed")
    return [f"Runs that fail rarely cannot be seen in {seeds}: «unchanged» is said of the usual run."]


def _needed(verdict: Verdict) -> str:
    if verdict.on_target.num_seeds == 1:
        return "Train the baseline and the defenses with three seeds or more."
    if verdict.needed is None:
        too_much = (
            f"Seeds differ so much that {SEEDS[-1]} would not show a change of {_points(verdict.margin)}."
        )
        return too_much if verdict.spread is not None else ""
    seeds, items = (
        counted(verdict.needed.num_seeds, "seed"),
        counted(_round_up(verdict.needed.num_items), "item"),
    )
    return f"At least about {items} and {seeds} would be needed to see a change of {_points(verdict.margin)}."


def _numbers(verdict: Verdict, aim: str, number: int) -> str:
    mean = f"On the mean of {number} defenses, " if number > 1 else ""
    sentence = (
        f"{mean}{ACCURACY[aim]} changed by {_change(verdict.on_target)} and "
        f"{ACCURACY[OTHER[aim]]} by {_change(verdict.off_target)}."
    )
    return capital(sentence) + _ratio(verdict)


def _change(effect: Effect) -> str:
    return f"{change(effect)} points" if effect.known else f"an amount that cannot be given ({effect.reason})"


def _ratio(verdict: Verdict) -> str:
    """Return what came with a gain; nothing without one, and where one number would hide that defenses differ."""
    ratio: Ratio = verdict.ratio
    mixed = verdict.reason.startswith(_DIFFER)
    if mixed or not verdict.on_target.known or verdict.on_target.sign <= 0:
        return ""
    if ratio.reason:
        return (
            "" if verdict.label == "inconclusive" else f" How much of a gain carries over is {ratio.reason}."
        )
    return f" Each point gained came with {ratio.value:+.2f} [{ratio.low:+.2f}, {ratio.high:+.2f}] points on the other side."


def _sizes(verdict: Verdict, aim: str) -> str:
    effects = {aim: verdict.on_target, OTHER[aim]: verdict.off_target}
    seeds = counted(verdict.on_target.num_seeds, "seed")
    return f"{seeds}, {count(effects['adv'].num_items)} adversarial and {count(effects['ood'].num_items)} OOD items"


def _no_verdict(study: Study) -> Statement:
    how = (
        "Train without any defense with the same seeds, then report both together: "
        "lightning-robust report DEFENDED BASELINE -o report.html"
    )
    unclear = [one for one in study.conditions if undeclared(one)]
    if len(study.conditions) == 1:
        what = "one run" if len(study.runs) == 1 else "runs of one kind"
        reason = f"this page is about {what}, and a verdict compares defenses with a baseline without them"
    elif all(study.baseline(one) is None for one in study.conditions):
        reason = "no condition is a baseline for the others"
        how += ", or name the baseline among these: --baseline NAME"
    elif unclear:
        reason = f"what the defenses of {names_of(unclear)} aim at is not declared"
        how = f"To declare it: {HOW_TO_DECLARE}"
    elif any(one.aim == "both" for one in study.conditions):
        reason = "the defenses here aim at both kinds of robustness, so there is none that a gain could carry over to"
        how = (
            "Add a defense that aims at adversarial or at OOD robustness alone. For defenses of your own: "
            f"{HOW_TO_DECLARE}"
        )
    elif any(one.aim != "none" for one in study.conditions):
        reason = "the evaluations of defenses are outside of a training (validate, test), and verdicts are on trainings"
        how = "Report the runs of the trainings themselves"
    else:
        reason = "no run says that it had a defense, and what that aims at"
        how = "Defenses of lightning-robust note it in run.json; for others add it there, as «defenses»."
    return Statement("no verdict", f"There is no verdict: {reason}.", [how.rstrip(".") + "."])


def _points(fraction: float) -> str:
    return f"{100 * fraction:.3g} point{'' if fraction == 0.01 else 's'}"


def _round_up(number: int) -> int:
    """Return two digits of a number that is only a rough guide.

    >>> _round_up(992)
    1000
    """
    unit: int = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // unit) * unit
