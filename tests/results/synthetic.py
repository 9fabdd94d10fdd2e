"""Synthetic runs: records as a monitor would write them, without training anything."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lightning_robust.results import Record, run_info, write_records, write_run_json

TEXTS = (
    "a gorgeous , witty , seductive movie that never loses its nerve",
    "the plot is paper thin and the jokes arrive long after they have died",
    "an honest and sensitive story from a vietnamese point of view",
    "i would rather watch paint dry than sit through this mess again",
    "funny , charming and quietly devastating in its final minutes",
)
TYPOS = {
    "gorgeous": "gorgoeus",
    "thin": "tihn",
    "honest": "hones t",
    "mess": "mess_",
    "charming": "charrming",
}


def record(**changes: Any) -> Record:
    """Return a right answer in the clean environment, but for ``changes``."""
    values: dict[str, Any] = {
        "run_id": "run", "epoch": 0, "global_step": 10, "kind": "clean", "environment": "clean",
        "attack": "", "item_id": "0", "label": 1, "predicted": 1, "probability": 0.9, "correct": True,
        "text": "a fine film",
    }  # fmt: skip
    return Record(**{**values, **changes})


def evaluation(
    run_id: str,
    epoch: int | None,
    step: int | None,
    levels: dict[str, float],
    *,
    num_items: int = 100,
    seed: int = 0,
) -> list[Record]:
    """Return records at the given accuracies, by ``kind/name``, such as ``ood/yelp``."""
    rng = random.Random(f"{run_id}:{epoch}:{step}:{seed}")
    rows = []
    for key, accuracy in levels.items():
        kind, _, name = key.partition("/")
        for index in range(num_items):
            right, text = rng.random() < accuracy, TEXTS[index % len(TEXTS)]
            label = index % 2
            attacked = kind == "attack"
            status = (
                ("failed" if right else rng.choice(["success"] * 4 + ["skipped"]))
                if attacked
                else "evaluated"
            )
            perturbed = " ".join(TYPOS.get(word, word) for word in text.split())
            rows.append(
                record(
                    run_id=run_id,
                    epoch=epoch,
                    global_step=step,
                    kind=kind,
                    environment="clean" if attacked else name,
                    attack=name if attacked else "",
                    item_id=str(index),
                    label=label,
                    predicted=label if right else 1 - label,
                    probability=rng.uniform(0.55, 0.99) if right else rng.uniform(0.01, 0.45),
                    correct=right,
                    status=status,
                    queries=rng.randint(20, 90) if attacked else 1,
                    seconds=0.06 if attacked else 0.004,
                    words_changed=1 if status == "success" else 0,
                    text=text,
                    perturbed_text=perturbed if status == "success" and name != "embedding_pgd" else None,
                )
            )
    return rows


def write_run(folder: Path, name: str, levels: list[dict[str, float]], **info: Any) -> Path:
    """Write a run folder with one evaluation for each entry of ``levels``."""
    num_items = info.pop("num_items", 100)
    for epoch, level in enumerate(levels):
        step = 120 * (epoch + 1)
        rows = evaluation(name, epoch, step, level, num_items=num_items)
        write_records(folder / "records" / f"epoch={epoch:03d}-step={step:08d}.parquet", rows)
    write_run_json(folder, run_info(run_id=name, **info))
    return folder
