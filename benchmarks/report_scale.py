"""Time and memory of reading and reporting a large study: 200 runs x 20 evaluations x 2,000 items.

    python benchmarks/report_scale.py                 (writes the study to a temporary folder first, about 1 GB)
    python benchmarks/report_scale.py --folder FOLDER (keeps it there, and uses it again)

The runs are synthetic: 40 conditions of five seeds. Each evaluation holds 2,000 static items (1,000 clean, two OOD
environments of 400, 200 adversarial) and two attacks on 200 of the clean ones: 2,400 records, 9.6 million in all.
Each measurement is a process of its own; its peak memory is what the operating system says. The limits are 60 s and
2 GB on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_robust.results import SCHEMA, SCHEMA_VERSION, run_info, write_records, write_run_json

SEEDS = 5
SIZES = {
    ("clean", "clean"): 1000,
    ("attack", "deepwordbug"): 200,
    ("attack", "pwws"): 200,
    ("adversarial", "advglue"): 200,
    ("ood", "imdb"): 400,
    ("ood", "yelp"): 400,
}
LEVELS = {"clean": 0.9, "attack": 0.4, "adversarial": 0.5, "ood": 0.8}
WORDS = [
    "a",
    "gorgeous",
    "witty",
    "seductive",
    "movie",
    "the",
    "plot",
    "is",
    "paper",
    "thin",
    "and",
    "jokes",
    "arrive",
    "long",
    "after",
    "they",
    "died",
]
COMMANDS = {
    "load_study": "from lightning_robust.results.study import load_study; load_study([{folder!r}])",
    "write_report": (
        "from lightning_robust.results import write_report; write_report([{folder!r}], {folder!r} + '/report.html')"
    ),
}
MEASURE = (
    "import json, resource, time\n"
    "began = time.perf_counter()\n"
    "{command}\n"
    "seconds = time.perf_counter() - began\n"
    "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
    "print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many items in each part")
    parser.add_argument("--folder", type=Path, help="where the study is written, or is already")
    parser.add_argument("--only", choices=[*COMMANDS, "generate"], help="one measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary) / "study").resolve()
        if not folder.exists():
            began = time.perf_counter()
            generate(folder, options.runs, options.evaluations, options.scale)
            print(f"written in {time.perf_counter() - began:.0f} s: {folder}")
        for name in COMMANDS:
            if options.only in (None, name):
                seconds, processor, peak = measure(name, folder)
                print(f"{name}: {seconds:.1f} s ({processor:.1f} s of processor time), peak {peak:,.0f} MiB")


def measure(name: str, folder: Path) -> tuple[float, float, float]:
    """Return seconds, processor seconds and peak MiB of one command in a process of its own."""
    code = MEASURE.format(command=COMMANDS[name].format(folder=str(folder)))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    seconds, processor, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor, peak


def generate(folder: Path, runs: int, evaluations: int, scale: float) -> None:
    """Write a study of ``runs`` runs."""
    rng = np.random.default_rng(0)
    fixed = layout(scale, rng)
    for number in range(runs):
        method, seed = divmod(number, SEEDS)
        name = f"method{method:02d}-seed{seed}" if method else f"erm-seed{seed}"
        shift = rng.normal(0.0, 0.03, len(SIZES)) if method else np.zeros(len(SIZES))
        for epoch in range(evaluations):
            table = evaluation(fixed, name, epoch, shift, rng)
            write_records(folder / name / "records" / f"epoch={epoch:03d}-step={epoch:08d}.parquet", table)
        write_run_json(folder / name, information(name, method, seed, evaluations))


def layout(scale: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return the columns that are the same in every evaluation, and how difficult each item is."""
    kinds, names, ids, labels = [], [], [], []
    for (kind, name), base in SIZES.items():
        size = round(base * scale)
        source = "clean" if kind == "attack" else name
        kinds += [kind] * size
        names += [name] * size
        ids += [f"{source}-{index:012x}" for index in range(size)]
        labels += [index % 2 for index in range(size)]
    texts = [" ".join(rng.choice(WORDS, 20)) for _ in ids]
    return {
        "kind": kinds,
        "environment": ["clean" if k == "attack" else n for k, n in zip(kinds, names, strict=True)],
        "attack": [n if k == "attack" else "" for k, n in zip(kinds, names, strict=True)],
        "item_id": ids,
        "label": np.array(labels),
        "text": texts,
        "part": np.repeat(np.arange(len(SIZES)), [round(base * scale) for base in SIZES.values()]),
        "difficulty": rng.normal(0.0, 0.15, len(ids)),
    }


def evaluation(
    fixed: dict[str, Any], name: str, epoch: int, shift: np.ndarray[Any, Any], rng: np.random.Generator
) -> pa.Table:
    """Return one evaluation's records; accuracy rises over the epochs."""
    part, size = fixed["part"], len(fixed["part"])
    levels = np.array([LEVELS[kind] for kind, _ in SIZES]) + shift - 0.1 / (epoch + 1)
    right = rng.random(size) < np.clip(levels[part] + fixed["difficulty"], 0.01, 0.99)
    attacked = np.array(fixed["kind"]) == "attack"
    fooled = attacked & ~right
    perturbed = [f"{text}!" if hit else None for text, hit in zip(fixed["text"], fooled, strict=True)]
    columns = {
        **{key: fixed[key] for key in ("kind", "environment", "attack", "item_id", "label", "text")},
        "run_id": [name] * size,
        "epoch": np.full(size, epoch),
        "global_step": np.full(size, 100 * (epoch + 1)),
        "predicted": np.where(right, fixed["label"], 1 - fixed["label"]),
        "probability": rng.random(size).astype(np.float32),
        "correct": right,
        "status": np.where(fooled, "success", np.where(attacked, "failed", "evaluated")),
        "queries": np.where(attacked, rng.integers(20, 90, size), 1),
        "seconds": rng.random(size).astype(np.float32) / 100,
        "words_changed": fooled.astype(int),
        "perturbed_text": perturbed,
        "warm_started": np.zeros(size, dtype=bool),
        "certified_radius": [None] * size,
        "certificate_confidence": [None] * size,
        "schema_version": np.full(size, SCHEMA_VERSION),
    }
    return pa.table([_column(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def information(name: str, method: int, seed: int, evaluations: int) -> dict[str, Any]:
    """Return a ``run.json``."""
    aim = ("adversarial", "ood", "both")[method % 3]
    defense = {"name": f"Method{method:02d}", "aim": aim, "settings": {"weight": 1.0}}
    backbone = {"path": "models/demo", "adaptation": "full", "quantization": "none", "seed": seed}
    return run_info(
        run_id=name,
        name=name,
        label_names=["negative", "positive"],
        recipe={"seed_everything": seed, "model": {"init_args": {"backbone": backbone}}},
        hyperparameters={"backbone": backbone},
        defenses=[defense] if method else [],
        inference_defense=None,
        seed=seed,
        max_epochs=evaluations,
        precision="32-true",
        evaluations=[],
    ) | {"finished": {"seconds": 1.0, "cpu_seconds": 1.0}}


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, kind)


if __name__ == "__main__":
    main()
