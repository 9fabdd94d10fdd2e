"""Runs, and the conditions that they are grouped into: runs that differ in nothing but seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_robust.results import describing
from lightning_robust.results.describing import Aim
from lightning_robust.results.parts import Evaluated
from lightning_robust.results.selection import Chosen


@dataclass(eq=False)
class Run:
    """One training run, or one predictor of it.

    Args:
        name: Told apart within the study.
        run_id: As in its records.
        folder: Where it is.
        files: Its records files.
        info: Its ``run.json``; empty where there is none.
        seed: Of its training; None where it is not known.
        evaluations: In the order of steps.
        condition: Name of its condition.
        chosen: What selection rules chose, by rule.
        lost: Epochs of its folder's files that cannot be read; None where a file's name does not say.
    """

    name: str
    run_id: str
    folder: Path
    files: list[Path]
    info: dict[str, Any]
    seed: int | None
    evaluations: list[Evaluated]
    condition: str = ""
    chosen: dict[str, Chosen] = field(default_factory=dict, repr=False)
    lost: list[int | None] = field(default_factory=list)


@dataclass(eq=False)
class Condition:
    """Runs that differ only in seeds.

    Args:
        name: Told apart within the study.
        backbone: Its last name, adaptation and quantization; empty where it is not known.
        stage: ``validate`` or ``test`` for evaluations outside training, else empty.
        defenses: Those of the training, as in ``run.json``: ``name``, ``aim`` and ``settings``.
        inference_defense: That of the predictor; None for the plain one.
        aim: What all defenses aim at together; ``none`` without any.
        runs: Sorted by seed.
        declared: Whether ``run.json`` says which defenses there were.
    """

    name: str
    backbone: str
    stage: str
    defenses: list[dict[str, Any]]
    inference_defense: dict[str, Any] | None
    aim: Aim
    runs: list[Run]
    declared: bool = True

    @property
    def seeds(self) -> list[int | None]:
        """Of its runs."""
        return [run.seed for run in self.runs]


def group_runs(runs: Sequence[Run], problems: list[str]) -> list[Condition]:
    """Return the conditions of ``runs``, named, and tell the runs of them.

    Args:
        runs: Of a study.
        problems: Gets a sentence for each run that is left out.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(describing.identity(run.info, run.name, run.seed), []).append(run)
    found = [_condition(_one_per_seed(group, problems)) for group in groups.values()]
    for condition, name in zip(found, _condition_names(found), strict=True):
        condition.name = name
        for run in condition.runs:
            run.condition = name
    return found


def distinct_runs(runs: Sequence[Run], problems: list[str]) -> list[Run]:
    """Return runs, each once: of copies, the one whose folder has the run's name, else the first.

    Args:
        runs: Of a study.
        problems: Gets a sentence for each copy.
    """
    by_id: dict[str, list[Run]] = {}
    for run in runs:
        by_id.setdefault(run.run_id, []).append(run)
    kept = {
        run_id: next((run for run in copies if run.folder.name == run.info.get("name")), copies[0])
        for run_id, copies in by_id.items()
    }
    for run_id, copies in by_id.items():
        first = kept[run_id]
        for run in copies if run_id else ():
            if run is not first:
                differs = (
                    "" if _same_records(run, first) else ", with other records: see which of them is meant"
                )
                problems.append(
                    f"Run {run_id} of {run.folder} is left out: it is already there from {first.folder}{differs}."
                )
    return [run for run in runs if not run.run_id or run is kept[run.run_id]]


def _same_records(one: Run, other: Run) -> bool:
    def content(run: Run) -> list[Any]:
        return [
            (
                moment.epoch,
                moment.global_step,
                key,
                part.items.ids,
                part.correct.tobytes(),
                part.codes.tobytes(),
            )
            for moment in run.evaluations
            for key, part in moment.parts.items()
        ]

    return content(one) == content(other)


def _condition(runs: list[Run]) -> Condition:
    info = runs[0].info
    defenses, inference = describing.defenses_of(info), info.get("inference_defense")
    inference = inference if isinstance(inference, dict) else None
    aims = [*defenses, {"aim": "both", **inference}] if inference else defenses
    return Condition(
        "",
        describing.backbone_of(info),
        describing.stage_of(info),
        defenses,
        inference,
        describing.aim_of(aims),
        runs,
        "defenses" in info,
    )


def _one_per_seed(runs: list[Run], problems: list[str]) -> list[Run]:
    """Return runs sorted by seed; of those with the same seed, the one that was started first and finished."""

    def order(run: Run) -> tuple[bool, int, bool, str]:
        return run.seed is None, run.seed or 0, not run.info.get("finished"), str(run.info.get("started", ""))

    kept: list[Run] = []
    for run in sorted(runs, key=order):
        if kept and run.seed is not None and kept[-1].seed == run.seed:
            problems.append(
                f"{run.name} ({run.folder}) is left out: it repeats {kept[-1].name} with the same seed, {run.seed}."
            )
        else:
            kept.append(run)
    return kept


def _condition_names(found: Sequence[Condition]) -> list[str]:
    """Return names that differ: from the runs' names, else from the defenses and what differs in their settings."""
    by_defenses = [describing.defense_names(one.defenses, one.inference_defense) for one in found]
    settings = [describing.flat_settings(one.defenses, one.inference_defense) for one in found]

    def by_runs(index: int) -> str:
        names = {describing.without_seed(run.name, run.seed) for run in found[index].runs}
        return names.pop() if len(names) == 1 and "" not in names else by_defenses[index]

    def with_settings(index: int) -> str:
        peers = [one for one, name in zip(settings, by_defenses, strict=True) if name == by_defenses[index]]
        mine = settings[index]
        differing = [key for key in mine if any(one.get(key) != mine[key] for one in peers)]
        shown = ", ".join(f"{key}={mine[key]}" for key in differing[:3])
        return f"{by_defenses[index]} ({shown})" if shown else by_defenses[index]

    def with_backbone(name: str, index: int) -> str:
        return f"{name} ({found[index].backbone})" if found[index].backbone else name

    steps = [
        by_runs,
        lambda index: with_backbone(by_runs(index), index),
        lambda index: by_defenses[index],
        with_settings,
        lambda index: with_backbone(by_defenses[index], index),
    ]
    return describing.told_apart(steps, len(found))


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return names that differ: with the folder where two runs share one, else numbered."""

    def by_folder(index: int) -> str:
        name, folder = runs[index].name, runs[index].folder
        return name if folder.name == name else f"{name} ({folder.name})"

    return describing.told_apart([lambda index: runs[index].name, by_folder], len(runs))
