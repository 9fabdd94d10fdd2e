"""A study: runs, grouped into conditions that are compared with a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

from lightning_robust.errors import did_you_mean
from lightning_robust.results import describing
from lightning_robust.results.conditions import Condition, Run, distinct_names, distinct_runs, group_runs
from lightning_robust.results.files import PathLike, RecordsError, read_run_json
from lightning_robust.results.loaded import Loaded
from lightning_robust.results.loading import Reader
from lightning_robust.results.outcomes import ADV_MEAN, Column, Outcomes, columns_of, made_from, scores
from lightning_robust.results.pairing import Paired, outcomes, pair, seed_pairs
from lightning_robust.results.parts import Evaluated, Items, Key, Part
from lightning_robust.results.problems import named, problems_of
from lightning_robust.results.selection import Chosen, Rule, select
from lightning_robust.results.sources import find_sources, passed_over, without_records
from lightning_robust.results.statistics import MIN_ITEMS
from lightning_robust.results.summaries import like_for_like

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
    "seed_pairs",
    "select",
]


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

        The one that was named, if its stage is the same and its backbone is too or is not known; else the condition
        of the same backbone and stage without any defense. Where there are several, the one whose name says so (``erm``,
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
            same = one.backbone == condition.backbone or not (one.backbone and condition.backbone)
            if one.name == self.named_baseline and same and one.stage == condition.stage:
                return one
        ranked = [(describing.baseline_rank(one.name), one) for one in self.candidates(condition)]
        best = max((rank for rank, _ in ranked), default=0)
        first = [one for rank, one in ranked if rank == best and (best or one.declared)]
        return first[0] if len(first) == 1 and (best or len(ranked) == 1) else None


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
    given = [paths] if isinstance(paths, str | OsPathLike) else list(paths)
    sources = find_sources(given)
    total, done = sum(len(source.files) for source in sources), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    reader, study = Reader(), Study([], min_items=min_items, named_baseline=baseline)
    loaded = [reader.read(source, step) for source in sources]
    attacked = sorted(set().union(*(one.attacked for one in loaded)))
    every = [run for one in loaded for run in _runs(one, len(attacked) > 1, study.problems)]
    runs = distinct_runs(every, study.problems)
    if not runs:
        raise RecordsError(
            f"None of the {total} records files can be reported: they hold no rows or cannot be read."
            + "".join(f"\n  {problem}" for problem in study.problems[:20])
        )
    study.conditions = group_runs(runs, study.problems)
    study.problems += [f"{folder} is left out: it has no records." for folder in without_records(given)]
    study.problems += [
        f"{folder} is left out: it lies below a folder that is a run itself. Name it, too."
        for folder in passed_over(given, sources)
    ]
    for run, name in zip(study.runs, distinct_names(study.runs), strict=True):
        run.name = name
    _check_name(study, baseline)
    study.problems += _alike(study, attacked)
    study.problems += problems_of(study)
    return study


def columns(study: Study) -> list[Column]:
    """Return what the study's runs measured: clean, adversarial and OOD columns."""
    evaluated = [one for run in study.runs for one in run.evaluations]
    keys: dict[Key, None] = {}
    for one in evaluated:
        keys.update(dict.fromkeys(one.parts))
    several = any(len(group) > 1 for one in evaluated for group in made_from([one], ADV_MEAN))
    return columns_of(list(keys), several)


def _alike(study: Study, attacked: Sequence[str]) -> Iterator[str]:
    """Make the summaries of each backbone and stage mean the same in all its conditions."""
    if len(attacked) > 1:
        yield (
            f"Attacks ran on {len(attacked)} environments, {named([one or '?' for one in attacked])}: each attack is named "
            "with its environment, and summaries are the mean over the environments."
        )
    groups: dict[tuple[str, str], list[Condition]] = {}
    for one in study.conditions:
        groups.setdefault((one.backbone, one.stage), []).append(one)
    for (backbone, stage), members in groups.items():
        place = (f" on {backbone}" if backbone else "") + (f" ({stage})" if stage else "")
        yield from like_for_like(members, place)


def _runs(loaded: Loaded, several: bool, problems: list[str]) -> list[Run]:
    """Return a folder's runs, and note what was wrong with its files."""
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
        name = describing.run_name(own, run_id, folder, alone)
        problems += _doubts(loaded, run_id, name)
        seed, moments = describing.seed_of(own, name), loaded.evaluations(run_id, several)
        run = Run(name, run_id, folder, loaded.source.files, own, seed, moments, lost=loaded.lost)
        found.append(run)
    if not loaded.runs:
        problems.append(f"{folder} is left out: it has no records that can be read.")
    return found


def _doubts(loaded: Loaded, run_id: str, name: str) -> Iterator[str]:
    who = f"{name} ({loaded.source.folder})"
    if count := loaded.repeated[run_id]:
        yield f"{who}: {count} records repeat an item of the same evaluation; the first one of each counts."
    if count := loaded.not_numbers[run_id]:
        yield f"{who}: {count} probabilities are NaN; the items count as they are."
    if count := loaded.unknown[run_id]:
        yield (
            f"{who}: {count} records do not say whether the answer was right (`correct` is null); they count as wrong "
            "and as answers that could not be used (unparsed)."
        )


def _check_name(study: Study, baseline: str | None) -> None:
    names = [condition.name for condition in study.conditions]
    if baseline is not None and baseline not in names:
        raise RecordsError(
            f"Expected `baseline` to be one of the conditions {', '.join(names)}, but got {baseline!r}."
            + did_you_mean(baseline, names)
        )
