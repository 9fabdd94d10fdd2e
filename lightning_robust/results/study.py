"""A study: runs grouped into conditions, and conditions paired with what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_robust.errors import did_you_mean
from lightning_robust.results import conditions as describe
from lightning_robust.results.conditions import Aim
from lightning_robust.results.files import PathLike, RecordsError, read_run_json
from lightning_robust.results.loading import Loaded, Reader, find_sources
from lightning_robust.results.outcomes import (
    Column,
    Evaluated,
    Floats,
    Items,
    Key,
    Outcomes,
    Part,
    Positions,
    columns_of,
    combine,
    measured,
    scores,
)
from lightning_robust.results.selection import Chosen, Rule, reported, select
from lightning_robust.results.statistics import MIN_ITEMS

__all__ = [
    "Chosen",
    "Column",
    "Condition",
    "Evaluated",
    "Items",
    "Outcomes",
    "Paired",
    "Part",
    "Rule",
    "Run",
    "Study",
    "columns",
    "load_study",
    "outcomes",
    "pair",
    "scores",
    "select",
]


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


@dataclass
class Study:
    """Conditions, and what is to be known of their records.

    Args:
        conditions: In the order in which their first runs were found.
        problems: Sentences on what was skipped, left out or is doubtful. They quote data: escape them.
        min_items: Fewer common items make no estimate.
        named_baseline: The baseline that was asked for.
    """

    conditions: list[Condition]
    problems: list[str] = field(default_factory=list)
    min_items: int = MIN_ITEMS
    named_baseline: str | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs, by condition."""
        return [run for condition in self.conditions for run in condition.runs]

    def baseline(self, condition: Condition) -> Condition | None:
        """Return what ``condition`` is compared with; None for a baseline itself and where there is none.

        The one that was named, if its backbone is the same or not known; else the condition of the same backbone
        and stage without any defense. Where there are several, the one whose name says so (``erm``,
        ``undefended``, ``baseline``, ``plain``). A defended predictor is compared with the plain predictor of the
        undefended training, whatever defense its own training had: all effects of a backbone then count from one
        zero, and effects of defenses in training, at inference and of both can be compared.
        """
        found = self._baseline(condition)
        return None if found is condition else found

    def candidates(self, condition: Condition) -> list[Condition]:
        """Return the conditions without defenses that share the backbone and stage of ``condition``."""
        return [
            one
            for one in self.conditions
            if (one.backbone, one.stage, one.aim) == (condition.backbone, condition.stage, "none")
        ]

    def _baseline(self, condition: Condition) -> Condition | None:
        for one in self.conditions:
            if one.name == self.named_baseline and (
                one.backbone == condition.backbone or not (one.backbone and condition.backbone)
            ):
                return one
        ranked = [(describe.baseline_rank(one.name), one) for one in self.candidates(condition)]
        best = max((rank for rank, _ in ranked), default=0)
        first = [one for rank, one in ranked if rank == best and (best or one.declared)]
        return first[0] if len(first) == 1 and (best or len(ranked) == 1) else None


class Paired(NamedTuple):
    """Outcomes of two conditions, seed by seed and item by item, as `statistics.effect` takes them.

    Args:
        treated: ``(seeds, items)``, between 0 and 1.
        baseline: The same shape.
        strata: ``(items,)``: each item's environment, for macro means; None where there is one.
        seeds: Of the treated runs.
        dropped: Items that not all runs have, or whose labels differ.
    """

    treated: Floats
    baseline: Floats
    strata: Positions | None
    seeds: list[int | None]
    dropped: int


def load_study(
    paths: PathLike | Sequence[PathLike],
    *,
    baseline: str | None = None,
    min_items: int = MIN_ITEMS,
    progress: Callable[[int, int], object] | None = None,
) -> Study:
    """Read runs, group them into conditions, and note what is wrong with them.

    Args:
        paths: Run folders, folders of runs, or records files.
        baseline: Name of the condition that others of its backbone are compared with; found by itself by default.
        min_items: Fewer common items make no estimate.
        progress: Called with the files read so far and their number.

    Raises:
        RecordsError: Where there are no records, none can be read, or no condition is called ``baseline``.
    """
    from lightning_robust.results.problems import problems_of

    given = [paths] if isinstance(paths, str | Path) or hasattr(paths, "__fspath__") else list(paths)
    sources = find_sources(given)
    total, done = sum(len(source.files) for source in sources), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    reader, study = Reader(), Study([], min_items=min_items, named_baseline=baseline)
    runs: list[Run] = []
    for source in sources:
        runs += _runs(reader.read(source, step), {run.run_id: run for run in runs}, study.problems)
    if not runs:
        raise RecordsError(
            f"None of the {total} records files can be reported: they hold no rows or cannot be read."
            + "".join(f"\n  {problem}" for problem in study.problems[:20])
        )
    study.conditions = _conditions(runs, study.problems)
    for run, name in zip(study.runs, _run_names(study.runs), strict=True):
        run.name = name
    _check_name(study, baseline)
    study.problems += problems_of(study)
    return study


def pair(
    treated: Condition,
    baseline: Condition,
    column: Column,
    rule: Rule = "last",
    *,
    min_items: int = 1,
) -> Paired | None:
    """Return the outcomes of two conditions on what both measured: attacks, environments, items, seeds.

    Runs are paired by seed where all seeds are known; where one is unknown, in order. Pairs of which a run did not
    measure the column do not count.

    Args:
        treated: A condition.
        baseline: What it is compared with.
        column: What is compared.
        rule: Which evaluation of each run counts.
        min_items: Fewer common items make no pair.

    Returns:
        None where no pair of runs measured it, or too few items are common.
    """
    pairs = [
        both
        for both in seed_pairs(treated, baseline)
        if all(measured(select(run, rule).evaluation, column) for run in both)
    ]
    chosen = [select(run, rule).evaluation for side in zip(*pairs, strict=True) for run in side]
    found = combine(chosen, column, reported(rule))
    if found is None or len(found.ids) < min_items:
        return None
    after, before = found.values[: len(pairs)], found.values[len(pairs) :]
    return Paired(after, before, found.strata, [run.seed for run, _ in pairs], found.dropped)


def seed_pairs(treated: Condition, baseline: Condition) -> list[tuple[Run, Run]]:
    """Return the runs of two conditions that are compared with each other."""
    if None in treated.seeds or None in baseline.seeds:
        return list(zip(treated.runs, baseline.runs, strict=False))
    partners = {run.seed: run for run in baseline.runs}
    return [(run, partners[run.seed]) for run in treated.runs if run.seed in partners]


def columns(study: Study) -> list[Column]:
    """Return what the study's runs measured: clean, adversarial and OOD columns."""
    keys: dict[Key, None] = {}
    for run in study.runs:
        for one in run.evaluations:
            keys.update(dict.fromkeys(one.parts))
    return columns_of(list(keys))


def outcomes(one: Run | Evaluated, column: Column, rule: Rule = "last") -> Outcomes | None:
    """Return the values ``(items,)`` of one evaluation in a column; None where it was not measured.

    Args:
        one: An evaluation, or a run, of which ``rule`` chooses one.
        column: Of `columns`.
        rule: Which evaluation of a run counts, and which items.
    """
    evaluated = one if isinstance(one, Evaluated) else select(one, rule).evaluation
    found = combine([evaluated], column, None if isinstance(one, Evaluated) else reported(rule))
    return None if found is None else found._replace(values=found.values[0])


def _runs(loaded: Loaded, known: dict[str, Run], problems: list[str]) -> list[Run]:
    """Return a folder's runs but for those that an earlier folder had, and note what was wrong with its files."""
    folder = loaded.source.folder
    info: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        try:
            info = read_run_json(folder)
        except RecordsError as error:
            problems.append(f"{error} It is treated as missing.")
    reasons: dict[str, list[Path]] = {}
    for path, reason in loaded.left_out:
        reasons.setdefault(reason.replace(str(path), "it"), []).append(path)
    for reason, files in reasons.items():
        more = f" and {len(files) - 1} more files of its folder are" if len(files) > 1 else " is"
        problems.append(f"{files[0]}{more} left out: {reason.rstrip('.')}.")
    found = []
    for run_id in loaded.runs:
        # Of several runs, run.json describes one at most.
        alone = len(loaded.runs) == 1
        own = info if alone or info.get("run_id") == run_id else {}
        name = describe.run_name(own, run_id, folder, alone)
        if run_id and run_id in known:
            problems.append(
                f"{folder} is left out: its run {run_id} is already there from {known[run_id].folder}."
            )
            continue
        problems += _doubts(loaded, run_id, name)
        seed = describe.seed_of(own, name)
        found.append(Run(name, run_id, folder, loaded.source.files, own, seed, loaded.evaluations(run_id)))
    if not loaded.runs:
        problems.append(f"{folder} is left out: it has no records that can be read.")
    return found


def _doubts(loaded: Loaded, run_id: str, name: str) -> Iterator[str]:
    who = f"{name} ({loaded.source.folder})"
    if count := loaded.repeated[run_id]:
        yield f"{who}: {count} records repeat an item of the same evaluation; the first one of each counts."
    if count := loaded.not_numbers[run_id]:
        yield f"{who}: {count} probabilities are NaN; the items count as they are."


def _run_names(runs: Sequence[Run]) -> list[str]:
    def by_folder(index: int) -> str:
        name, folder = runs[index].name, runs[index].folder
        return name if folder.name == name else f"{name} ({folder.name})"

    return describe.told_apart([lambda index: runs[index].name, by_folder], len(runs))


def _conditions(runs: Sequence[Run], problems: list[str]) -> list[Condition]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(describe.identity(run.info, run.name, run.seed), []).append(run)
    found = [_condition(_one_per_seed(group, problems)) for group in groups.values()]
    for condition, name in zip(found, _condition_names(found), strict=True):
        condition.name = name
        for run in condition.runs:
            run.condition = name
    return found


def _condition(runs: list[Run]) -> Condition:
    info = runs[0].info
    defenses, inference = describe.defenses_of(info), info.get("inference_defense")
    inference = inference if isinstance(inference, dict) else None
    aims = [*defenses, {"aim": "both", **inference}] if inference else defenses
    return Condition(
        "",
        describe.backbone_of(info),
        describe.stage_of(info),
        defenses,
        inference,
        describe.aim_of(aims),
        runs,
        "defenses" in info,
    )


def _one_per_seed(runs: list[Run], problems: list[str]) -> list[Run]:
    """Return runs sorted by seed; of those with the same seed, the one that was started first."""
    kept: list[Run] = []
    for run in sorted(
        runs, key=lambda run: (run.seed is None, run.seed or 0, str(run.info.get("started", "")))
    ):
        if kept and run.seed is not None and kept[-1].seed == run.seed:
            problems.append(
                f"{run.name} ({run.folder}) is left out: it repeats {kept[-1].name} with the same seed, {run.seed}."
            )
        else:
            kept.append(run)
    return kept


def _condition_names(found: Sequence[Condition]) -> list[str]:
    def by_runs(index: int) -> str:
        names = {describe.without_seed(run.name, run.seed) for run in found[index].runs}
        return names.pop() if len(names) == 1 and "" not in names else by_defenses(index)

    def by_defenses(index: int) -> str:
        one = found[index]
        names = [str(defense["name"]) for defense in one.defenses]
        names += [str(one.inference_defense.get("name"))] if one.inference_defense else []
        return " + ".join(names) or "no defense"

    def with_backbone(name: str, index: int) -> str:
        return f"{name} ({found[index].backbone})" if found[index].backbone else name

    steps = [
        by_runs,
        lambda index: with_backbone(by_runs(index), index),
        by_defenses,
        lambda index: with_backbone(by_defenses(index), index),
    ]
    return describe.told_apart(steps, len(found))


def _check_name(study: Study, baseline: str | None) -> None:
    names = [condition.name for condition in study.conditions]
    if baseline is not None and baseline not in names:
        raise RecordsError(
            f"Expected `baseline` to be one of the conditions {', '.join(names)}, but got {baseline!r}."
            + did_you_mean(baseline, names)
        )
