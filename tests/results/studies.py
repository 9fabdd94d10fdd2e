"""Run folders of synthetic records, as a monitor would leave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_robust.results import (
    Record,
    write_records,
    write_run_json,
)
from lightning_robust.results.study import Condition, Run, Study, load_study
from tests.results.synthetic import evaluation, record

LEVELS = {
    "clean/clean": 0.9, "attack/deepwordbug": 0.5, "attack/pwws": 0.4, "attack/embedding_pgd": 0.2,
    "adversarial/advglue": 0.5, "ood/imdb": 0.8, "ood/yelp": 0.6,
}  # fmt: skip
FGM = {"name": "FGM", "aim": "adversarial", "settings": {"epsilon": 0.5}}
VREX = {"name": "VREx", "aim": "ood", "settings": {"beta": 1.0}}
VOTE = {"name": "vote", "class": "RandomMaskVote", "settings": {}, "aim": "adversarial"}
ROWS = {"1": True, "0": False}


def make_run(
    root: Path,
    name: str,
    /,
    *,
    rows: list[list[Record]] | None = None,
    num_items: int = 60,
    epochs: int = 2,
    **info: Any,
) -> Path:
    """Write a run as a monitor would: one file for each evaluation, and a finished training's run.json."""
    folder = root / name
    run_id = info.pop("run_id", f"id-{name}")
    given = rows or [
        evaluation(run_id, epoch, 10 * (epoch + 1), LEVELS, num_items=num_items) for epoch in range(epochs)
    ]
    for epoch, one in enumerate(given):
        renamed = [replace(row, run_id=run_id) for row in one]
        write_records(folder / "records" / f"epoch={epoch:03d}.parquet", renamed)
    described: dict[str, Any] = {
        "run_id": run_id,
        "name": name,
        "recipe": None,
        "hyperparameters": {
            "backbone": {"path": "models/minilm", "adaptation": "full", "quantization": "none"}
        },
        "defenses": [],
        "inference_defense": None,
        "max_epochs": len(given),
        "finished": {"seconds": 1.0},
    }
    seed = name.rpartition("seed")[2]
    described["seed"] = int(seed) if seed.isdigit() else None
    write_run_json(folder, described | info)
    return folder


def make_study(root: Path, seeds: int = 2, **settings: Any) -> Path:
    for seed in range(seeds):
        make_run(root, f"erm-seed{seed}", **settings)
        make_run(root, f"fgm-seed{seed}", defenses=[FGM], **settings)
        make_run(root, f"vrex-seed{seed}", defenses=[VREX], **settings)
    return root


def static(kind: str, name: str, rights: str, **changes: Any) -> list[Record]:
    """One record for each character: ``1`` right, ``0`` wrong."""
    return [
        record(kind=kind, environment=name, item_id=f"{name}-{i}", correct=ROWS[c], label=i % 2, **changes)
        for i, c in enumerate(rights)
    ]


def attacked(name: str, rights: str, **changes: Any) -> list[Record]:
    status = {"1": "failed", "0": "success"}
    return [
        record(
            kind="attack", attack=name, item_id=f"clean-{i}", correct=ROWS[c], status=status[c], label=i % 2, **changes
        )
        for i, c in enumerate(rights)
    ]  # fmt: skip


def condition(study: Study, name: str) -> Condition:
    return next(one for one in study.conditions if one.name == name)


def run_named(study: Study, name: str) -> Run:
    return next(one for one in study.runs if one.name == name)


def said(study: Study, *words: str) -> str:
    """Return the only problem with these words."""
    found = [problem for problem in study.problems if all(word in problem for word in words)]
    assert len(found) == 1, (words, study.problems)
    return found[0]


def two_runs(root: Path, treated: list[Record], baseline: list[Record]) -> tuple[Condition, Condition]:
    """Write and read a baseline and a defense of one seed and one evaluation."""
    make_run(root, "erm-seed0", rows=[baseline])
    make_run(root, "fgm-seed0", rows=[treated], defenses=[FGM])
    study = load_study(root)
    return condition(study, "fgm"), condition(study, "erm")
