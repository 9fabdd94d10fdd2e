"""Does raising one kind of robustness raise, lower or leave the other?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from numpy.typing import ArrayLike

from lightning_robust.results.statistics.crossed import Components, components
from lightning_robust.results.statistics.effects import Effect, Pairs, StatisticsError, differences, effect
from lightning_robust.results.statistics.power import Needed, needed
from lightning_robust.results.statistics.ratio import Ratio, transfer_ratio

GUARD = 0.8
Label = Literal["positive", "negative", "neutral", "inconclusive"]
Aim = Literal["adv", "ood"]


@dataclass(frozen=True)
class Verdict:
    """An answer, and what it rests on.

    Args:
        label: ``neutral`` is evidence of no more than the margin either way, never a lack of evidence.
        on_target: Effect where the defense aims at.
        off_target: Effect on the other kind of robustness.
        ratio: Off-target for each unit of on-target effect.
        reason: For ``inconclusive``: what is missing, in words.
        margin: What counts as no change, as a fraction.
        spread: For ``inconclusive``: the variances of the effect that could not be told from 0, the seeds' as its
            upper 80 % bound.
    """

    label: Label
    on_target: Effect
    off_target: Effect
    ratio: Ratio
    reason: str
    margin: float
    spread: Components | None = None

    @cached_property
    def needed(self) -> Needed | None:
        """The seeds and items that would see an effect as small as the margin with a probability of 80 %.

        None for other labels than ``inconclusive``, and where seeds vary too much or their spread is unknown. If there
        is no effect at all, ``neutral`` needs somewhat more.
        """
        return None if self.spread is None else needed(self.spread, self.margin)


def transfer_verdict(
    adv: Pairs,
    ood: Pairs,
    *,
    aim: Aim = "adv",
    margin: float = 0.01,
    adv_strata: ArrayLike | None = None,
    ood_strata: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Verdict:
    """Return whether a gain where a defense aims at comes with a gain, a loss or neither where it does not.

    ``positive`` and ``negative``: the off-target interval lies on one side of 0 and is not all within the margin.
    ``neutral``: it lies within ±margin (equivalence). Otherwise, and without a gain on target, ``inconclusive``;
    with one seed too, as the spread between seeds is unknown and a single run would stand for the method.

    Args:
        adv: ``(treated, baseline)`` under attack, each ``(seeds, items)``, paired.
        ood: The same under distribution shift.
        aim: The kind of robustness that the defense aims at.
        margin: Largest effect that counts as none, as a fraction.
        adv_strata: Groups of adversarial items that count equally, as in `effect`.
        ood_strata: The same for the shifted items.
        confidence: Of the intervals.

    Raises:
        StatisticsError: If ``aim`` or ``margin`` is wrong or the arrays do not fit each other.
    """
    if aim not in ("adv", "ood"):
        raise StatisticsError(f"Expected `aim` to be adv or ood, but got {aim!r}.")
    check_margin(margin)
    sides = [(adv, adv_strata), (ood, ood_strata)]
    (on, on_strata), (off, off_strata) = sides if aim == "adv" else reversed(sides)
    on_target = effect(*on, strata=on_strata, confidence=confidence)
    off_target = effect(*off, strata=off_strata, confidence=confidence)
    ratio = transfer_ratio(on, off, on_strata=on_strata, off_strata=off_strata, confidence=confidence)
    label, reason = _label(on_target, off_target, margin)
    spread = None
    if label == "inconclusive" and on_target.known and off_target.known:
        pairs, strata = (off, off_strata) if on_target.sign > 0 else (on, on_strata)
        spread = components(*differences(*pairs, strata), guard=GUARD)
    return Verdict(label, on_target, off_target, ratio, reason, margin, spread)


def check_margin(margin: float) -> None:
    """Refuse what cannot be a margin.

    Raises:
        StatisticsError: If it is no fraction between 0 and 1.
    """
    if not 0 < margin < 1:
        raise StatisticsError(f"Expected `margin` to be a fraction between 0 and 1, but got {margin}.")


def _label(on: Effect, off: Effect, margin: float) -> tuple[Label, str]:
    if not on.known or not off.known:
        return "inconclusive", on.reason or off.reason
    if on.num_seeds == 1 or off.num_seeds == 1:
        return "inconclusive", "one seed shows one training run, not the method"
    if on.sign <= 0:
        return "inconclusive", (
            "it lowered what it aims at" if on.sign else "no gain was shown where it aims at"
        )
    if -margin < off.low and off.high < margin:
        return "neutral", ""
    if off.sign:
        return ("positive" if off.sign > 0 else "negative"), ""
    beyond = [word for word, out in (("a gain", off.high >= margin), ("a loss", off.low <= -margin)) if out]
    return (
        "inconclusive",
        f"the other kind's interval holds no change and {' and '.join(beyond)} beyond the margin",
    )
