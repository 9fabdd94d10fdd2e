"""Synthetic studies: conditions, seeds and evaluations with known effects, written in bulk as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import ndtr, ndtri

from lightning_robust.results import SCHEMA, SCHEMA_VERSION, write_records, write_run_json
from tests.results.synthetic import TEXTS, TYPOS

MINI_LM = "all-MiniLM-L6-v2"
PARTS = {
    "clean/clean": 0.88, "attack/deepwordbug": 0.35, "attack/pwws": 0.28, "adversarial/advglue": 0.45,
    "ood/yelp": 0.8, "ood/imdb": 0.77, "ood/amazon": 0.74,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One condition: ``effects`` are added to the accuracies of the parts whose kind or name they start with."""

    name: str
    aim: str = "none"
    effects: Mapping[str, float] = field(default_factory=dict)
    backbone: str = MINI_LM
    defense: str = ""


def grid(num_defenses: int) -> list[Plan]:
    """Return a baseline and ``num_defenses`` defenses, aimed at each kind in turn."""
    plans = [Plan("erm")]
    for index in range(num_defenses):
        aim = ("adversarial", "ood", "both")[index % 3]
        size = 0.02 + 0.02 * (index % 5)
        adv = size * {"adversarial": 2.0, "ood": 0.3, "both": 1.5}[aim]
        ood = size * {"adversarial": -0.3, "ood": 1.0, "both": 0.6}[aim]
        name = {"adversarial": "freelb", "ood": "vrex", "both": "hybrid"}[aim]
        effects = {"attack": adv, "adversarial": adv / 2, "ood": ood, "clean": -size / 4}
        plans.append(Plan(f"{name}{index // 3 or ''}", aim, effects))
    return plans


def write_study(
    folder: Path,
    plans: Sequence[Plan],
    *,
    seeds: int = 3,
    evaluations: int = 4,
    num_items: int = 100,
    parts: Mapping[str, float] = PARTS,
    sizes: Mapping[str, int] | None = None,
    texts: Sequence[str] = TEXTS,
    unparsed: float = 0.0,
    **info: Any,
) -> Path:
    """Write one run for each plan and seed; items differ in difficulty and are shared by all runs.

    Args:
        folder: Of the study.
        plans: Its conditions.
        seeds: Of each.
        evaluations: Of each run.
        num_items: Of each part.
        parts: Accuracies at the end, by ``kind/name``.
        sizes: Of parts that have another number of items.
        texts: Of the items, in turn.
        unparsed: Share of wrong answers in environments that could not be parsed.
        info: Further entries of every run.json.
    """
    for number, plan in enumerate(plans):
        for seed in range(seeds):
            name = f"{plan.name}-seed{seed}"
            run = folder / f"{number:02d}-{seed}"
            rng = np.random.default_rng([number, seed])
            shift = rng.normal(0, 0.02)
            for epoch in range(evaluations):
                trained = (epoch + 1) / evaluations
                columns = [
                    _part(
                        key,
                        _level(key, base, plan, trained),
                        shift,
                        (sizes or {}).get(key, num_items),
                        rng,
                        texts,
                        unparsed,
                    )
                    for key, base in parts.items()
                ]
                step = 120 * (epoch + 1)
                table = _table(columns, name, epoch, step)
                write_records(run / "records" / f"epoch={epoch:03d}-step={step:08d}.parquet", table)
            write_run_json(run, {**_info(plan, name, seed, evaluations), **info})
    return folder


def _level(key: str, base: float, plan: Plan, trained: float) -> float:
    effect = sum(delta for start, delta in plan.effects.items() if key.startswith(start))
    start = 0.5 if key.partition("/")[0] != "attack" else 0.1
    return float(np.clip(start + (base + effect - start) * trained**0.5, 0.01, 0.99))


def _part(
    key: str,
    level: float,
    shift: float,
    num_items: int,
    rng: np.random.Generator,
    texts: Sequence[str],
    unparsed: float,
) -> dict[str, Any]:
    kind, _, name = key.partition("/")
    hard = np.random.default_rng(sum(map(ord, key))).normal(size=num_items)
    margin = ndtri(level) * 1.1 + shift - hard + rng.normal(0, 0.4, num_items)
    right = margin > 0
    attacked = kind == "attack"
    label = np.arange(num_items) % 2
    wrong = np.where(rng.random(num_items) < 0.85, "success", "skipped")
    silent = np.where(~right & (rng.random(num_items) < unparsed), "unparsed", "evaluated")
    status = np.where(right, "failed", wrong) if attacked else silent
    shown_texts = [texts[i % len(texts)] for i in range(num_items)]
    shown = [
        " ".join(TYPOS.get(word, word) for word in text.split()) if one == "success" else None
        for text, one in zip(shown_texts, status, strict=True)
    ]
    return {
        "kind": [kind] * num_items, "environment": ["clean" if attacked else name] * num_items,
        "attack": [name if attacked else ""] * num_items, "item_id": [str(i) for i in range(num_items)],
        "label": label, "predicted": np.where(right, label, 1 - label), "probability": ndtr(margin),
        "correct": right, "status": status, "queries": rng.integers(20, 90, num_items) if attacked else np.ones(num_items, int),
        "seconds": np.full(num_items, 0.06 if attacked else 0.004), "words_changed": (status == "success").astype(int),
        "text": shown_texts, "perturbed_text": shown,
    }  # fmt: skip


def _table(columns: Sequence[Mapping[str, Any]], run_id: str, epoch: int, step: int) -> pa.Table:
    size = sum(len(one["kind"]) for one in columns)
    fixed = {
        "run_id": [run_id] * size, "epoch": [epoch] * size, "global_step": [step] * size,
        "warm_started": [False] * size, "schema_version": [SCHEMA_VERSION] * size,
    }  # fmt: skip
    arrays = []
    for one in SCHEMA:
        if one.name in fixed:
            values = pa.array(fixed[one.name])
        elif one.name in columns[0]:
            values = pa.concat_arrays([_array(part[one.name], one.type) for part in columns])
        else:
            values = pa.nulls(size, one.type)
        arrays.append(
            values.dictionary_encode() if pa.types.is_dictionary(one.type) else values.cast(one.type)
        )
    return pa.table(arrays, schema=SCHEMA)


def _array(values: Any, column: pa.DataType) -> pa.Array:
    plain = pa.string() if pa.types.is_dictionary(column) else column
    return pa.array(values if isinstance(values, list) else values.tolist(), plain)


def _info(plan: Plan, name: str, seed: int, evaluations: int) -> dict[str, Any]:
    backbone = {"path": f"models/{plan.backbone}", "adaptation": "full", "quantization": "none"}
    defense = {"name": plan.defense or plan.name, "aim": plan.aim, "settings": {"epsilon": 0.1}}
    return {
        "run_id": name,
        "name": name,
        "label_names": ["negative", "positive"],
        "hyperparameters": {"backbone": backbone, "learning_rate": 5e-5, "seed": seed},
        "recipe": {
            "seed_everything": seed,
            "model": {"class_path": "lightning_robust.RobustClassifier", "init_args": {"backbone": backbone}},
            "trainer": {"max_epochs": evaluations, "default_root_dir": f"checkpoints/{name}"},
        },
        "backbone": backbone,
        "defenses": [defense] if plan.aim != "none" else [],
        "inference_defense": None,
        "seed": seed,
        "max_epochs": evaluations,
        "started": f"2026-11-21T10:{seed:02d}:00+00:00",
        "command": f"lightning-robust fit -c {plan.name} --seed_everything {seed}",
        "versions": {"python": "3.11.7", "lightning-robust": "0.1.0", "torch": "2.13.0"},
        "hardware": {"platform": "Linux", "cpu": "a processor", "cores": 2, "gpus": []},
        "git": {"commit": "0" * 40, "changed": False},
        "evaluations": [
            {"epoch": epoch, "global_step": 120 * (epoch + 1), "seconds": 12.5}
            for epoch in range(evaluations)
        ],
        "finished": {"seconds": 150.0 + 10 * seed, "cpu_seconds": 140.0},
    }
