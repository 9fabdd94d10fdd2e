"""Do 95 % intervals cover, and are false claims rare? Simulated studies whose truth is known.

Run:    python benchmarks/calibration.py run       (finished cells are not repeated)
Table:  python benchmarks/calibration.py table

One line of benchmarks/calibration.jsonl is one cell: a quantity, a size, and the share of simulated studies.
Seeds' luck, items' difficulty and their change are those of `lightning_robust.results.statistics.Simulation`: 0.15
logits of luck are a standard deviation of 2.5 points between training runs at an accuracy of 60 %.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lightning_robust.results.statistics import (
    Components,
    Simulation,
    crossed_mean,
    effect,
    effective_robustness,
    holm,
    minimal_detectable_effect,
    probit,
    transfer_correlation,
    transfer_ratio,
    transfer_verdict,
)

RESULTS = Path("benchmarks/calibration.jsonl")
SEEDS, ITEMS, LUCK = (1, 2, 3, 5), (100, 300, 1000), (0.0, 0.15, 0.4)
Cell = dict[str, Any]


def coverage(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Intervals of an effect."""
    world, gain = Simulation(seed=cell["luck"]), 0.3
    truth = world.effect(gain)
    answers, luck = world.answers(rng, [gain], cell["seeds"], cell["items"])
    if cell["seeds"] == 1:
        # One training run: the truth is that run's, over all items.
        truth = world.accuracy(gain, luck[1, 0]) - world.accuracy(luck=luck[0, 0])
    settings: Any = {"method": "bootstrap", "resamples": 500} if cell["quantity"] == "bootstrap" else {}
    found = effect(answers[1], answers[0], **settings)
    return {"covered": found.low <= truth <= found.high, "width": found.high - found.low}


def bootstrap(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """For comparison: intervals of a bootstrap that resamples seeds and items."""
    return coverage(cell, rng)


def rare(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Intervals of an effect where hardly any answer changes."""
    shape = (cell["seeds"], cell["items"])
    before = rng.random(shape) < 0.8
    after = before ^ (rng.random(shape) < cell["changed"])
    found = effect(after, before)
    truth = -0.6 * cell["changed"]
    return {"covered": found.low <= truth <= found.high, "width": found.high - found.low}


def family(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """A matrix of defenses without effect: is any cell called significant after Holm's correction?"""
    world = Simulation(change=0.0, seed=cell["luck"])
    p_values = []
    for _ in range(6):  # columns: attacks and environments, on items of their own
        answers, _luck = world.answers(rng, [0.0] * cell["defenses"], cell["seeds"], cell["items"])
        p_values += [effect(treated, answers[0]).p_value for treated in answers[1:]]
    return {"any": min(holm(p_values)) < 0.05, "without Holm": min(p_values) < 0.05}


def verdict(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """A gain on target and a known effect off target: which label?"""
    target = Simulation(seed=cell["luck"])
    other = Simulation(change=0.0 if cell["off"] == 0 else 0.5, seed=cell["luck"])
    off = 0.0 if cell["off"] == 0 else _gain(other, cell["off"])
    on, luck = target.answers(rng, [1.5], cell["seeds"], cell["items"])
    shifted, _luck = other.answers(rng, [off], cell["seeds"], cell["items"], luck)
    label = transfer_verdict((on[1], on[0]), (shifted[1], shifted[0])).label
    return {name: label == name for name in ("positive", "negative", "neutral", "inconclusive")}


def ratio(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Fieller's interval of the transfer ratio, where it is estimable."""
    world = Simulation(seed=cell["luck"])
    on, luck = world.answers(rng, [1.2], cell["seeds"], cell["items"])
    off, _luck = world.answers(rng, [0.5], cell["seeds"], cell["items"], luck)
    found = transfer_ratio((on[1], on[0]), (off[1], off[0]))
    truth = world.effect(0.5) / world.effect(1.2)
    return {
        "estimable": not found.reason,
        "covered": math.nan if found.reason else found.low <= truth <= found.high,
    }


def correlation(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Correlations of defenses' true effects, from measured ones."""
    defenses, rho = cell["defenses"], cell["rho"]
    gains = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], defenses) * cell["spread"]
    world = Simulation(seed=cell["luck"])
    adv, luck = world.answers(rng, list(gains[:, 0]), cell["seeds"], cell["items"])
    ood, _luck = world.answers(rng, list(gains[:, 1]), cell["seeds"], cell["items"], luck)
    sides = [adv, ood]
    deltas = [side[1:].mean(axis=(1, 2)) - side[0].mean() for side in sides]
    errors = [_errors(side[1:].astype(float)) for side in sides]
    found = transfer_correlation(*deltas, adv_errors=errors[0], ood_errors=errors[1])
    rank = 6 / math.pi * math.asin(rho / 2)
    return {
        "printed": not found.pearson.reason,
        "covered": math.nan if found.pearson.reason else found.pearson.low <= rho <= found.pearson.high,
        "rank covered": math.nan
        if found.spearman.reason
        else found.spearman.low <= rank <= found.spearman.high,
    }


def effective(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Effective robustness of an undefended model like the others: is it called different?"""
    clean = np.array(rng.uniform(0.7, 0.95, cell["models"]))
    robust = stats.norm.cdf(0.9 * probit(clean) - 0.5 + rng.normal(0, 0.08, cell["models"]))
    x = rng.uniform(clean.min(), clean.max())
    y = stats.norm.cdf(0.9 * probit([x])[0] - 0.5 + rng.normal(0, 0.08))
    seeds = y + rng.normal(0, cell["error"] * math.sqrt(cell["seeds"]), cell["seeds"])
    error = float(seeds.std(ddof=1)) / math.sqrt(cell["seeds"])
    found = effective_robustness(
        x, float(seeds.mean()), clean, robust, robust_error=error, num_seeds=cell["seeds"]
    )
    return {"called different": found.sign != 0}


def power(cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Is an effect of the size that is called detectable seen four times out of five?"""
    parts = Components(cell["seed_points"] ** 2 / 1e4, 0.1, 0.2)
    true = minimal_detectable_effect(parts, cell["seeds"], cell["items"])
    values = true + rng.normal(0, math.sqrt(parts.seed), (cell["seeds"], 1))
    values = values + rng.normal(0, math.sqrt(parts.item), cell["items"])
    mean = crossed_mean(values + rng.normal(0, math.sqrt(parts.residual), (cell["seeds"], cell["items"])))
    return {"seen": abs(mean.mean) > mean.half_width(0.95), "effect": true}


QUANTITIES: dict[str, tuple[Callable[[Cell, np.random.Generator], dict[str, float]], int]] = {
    "coverage": (coverage, 2000),
    "bootstrap": (bootstrap, 500),
    "rare": (rare, 2000),
    "family": (family, 400),
    "verdict": (verdict, 1000),
    "ratio": (ratio, 500),
    "correlation": (correlation, 1000),
    "effective": (effective, 2000),
    "power": (power, 2000),
}
"""What is simulated, and how many studies make a cell."""


def cells() -> Iterator[Cell]:
    """Yield all cells: a quantity and the sizes that it is simulated at."""
    for seeds in SEEDS:
        for items in ITEMS:
            for luck in LUCK:
                yield {"quantity": "coverage", "seeds": seeds, "items": items, "luck": luck}
            yield {"quantity": "rare", "seeds": seeds, "items": items, "changed": 0.02}
    for seeds in (2, 3, 5):
        for luck in LUCK:
            yield {"quantity": "bootstrap", "seeds": seeds, "items": 300, "luck": luck}
        for defenses in (3, 12):
            for items in (100, 1000):
                size = {"seeds": seeds, "items": items, "luck": 0.15}
                yield {"quantity": "family", "defenses": defenses, **size}
        for items in (100, 1000):
            size = {"seeds": seeds, "items": items, "luck": 0.15}
            for off in (0.0, 0.03, -0.03):
                yield {"quantity": "verdict", "off": off, **size}
            yield {"quantity": "ratio", **size}
    for seeds, defenses in ((3, 5), (3, 8), (3, 12), (5, 12)):
        for rho in (0.0, 0.5):
            size = {"seeds": seeds, "items": 300, "luck": 0.05, "spread": 1.0}
            yield {"quantity": "correlation", "defenses": defenses, "rho": rho, **size}
    for models in (5, 8, 15):
        for error in (0.003, 0.02):
            yield {"quantity": "effective", "models": models, "error": error, "seeds": 3}
    for seeds in (2, 3, 5, 10):
        for seed_points in (0.0, 1.0):
            yield {"quantity": "power", "seeds": seeds, "items": 300, "seed_points": seed_points}


def simulate(cell: Cell) -> dict[str, float]:
    """Return the mean of every number over the cell's studies, and how many there were."""
    run, number = QUANTITIES[cell["quantity"]]
    # The same cell gives the same numbers, whichever others ran before.
    rng = np.random.default_rng([ord(letter) for letter in json.dumps(cell, sort_keys=True)])
    rows = [run(cell, rng) for _ in range(number)]
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]} | {"studies": number}


def finished() -> dict[str, dict[str, float]]:
    """Return what was simulated, by cell."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {json.dumps(one["cell"], sort_keys=True): one["found"] for one in map(json.loads, lines)}


def table() -> str:
    """Return one Markdown table for each quantity."""
    known, parts = finished(), []
    for quantity, (run, number) in QUANTITIES.items():
        rows = [
            (cell, known.get(json.dumps(cell, sort_keys=True)))
            for cell in cells()
            if cell["quantity"] == quantity
        ]
        found = [(cell, one) for cell, one in rows if one]
        if found:
            sizes = [name for name in found[0][0] if name != "quantity"]
            names = [name for name in found[0][1] if name != "studies"]
            parts.append(
                "\n".join(
                    [
                        f"{(run.__doc__ or '').strip()} ({number} studies a row)\n",
                        f"| {' | '.join([*sizes, *names])} |",
                        f"|{'---|' * (len(sizes) + len(names))}",
                        *(
                            f"| {' | '.join([*(str(cell[s]) for s in sizes), *(f'{one[n]:.3f}' for n in names)])} |"
                            for cell, one in found
                        ),
                    ]
                )
            )
    return "\n\n".join(parts)


def _gain(world: Simulation, wanted: float) -> float:
    """Return the gain in logits whose true effect is ``wanted``."""
    low, high = -5.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if world.effect(middle) < wanted else (low, middle)
    return low


def _errors(treated: np.ndarray) -> np.ndarray:
    apart = treated - treated.mean(axis=0)
    scale = math.sqrt(len(treated) / (len(treated) - 1))
    return np.array([crossed_mean(values).standard_error * scale for values in apart])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    options = parser.parse_args()
    if options.command == "run":
        known = finished()
        for cell in cells():
            if cell["quantity"] in options.only and json.dumps(cell, sort_keys=True) not in known:
                line = json.dumps({"cell": cell, "found": simulate(cell)})
                with RESULTS.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    print(table())


if __name__ == "__main__":
    main()
