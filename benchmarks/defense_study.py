"""Every defense, three seeds, against plain training: the table in recipes/README.md.

Run:    python benchmarks/defense_study.py run --jobs 2      (finished runs are not repeated)
Table:  python benchmarks/defense_study.py table

Needs the real data, models and lexical resources in ../shared. What a run measured is one line of
benchmarks/defense_study.jsonl: which items were answered right, as bits in the order of their ids. The table and its
intervals are made from these lines; records and texts are in checkpoints/defense_study.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robust.results import Effect, effect, holm, load_study
from lightning_robust.results.statistics import accuracy

SHARED = Path("../shared")
RESULTS = Path("benchmarks/defense_study.jsonl")
OUTPUT = Path("checkpoints/defense_study")
SEEDS = 3
HYBRIDS = ("freelb_vrex", "smart_wise_ft", "augmentation_group_dro", "r3f_coral")
LORA = ("erm", "fgm", "freelb", "smart", "group_dro", "vrex", "coral", "wise_ft")
SIZES = [
    "--trainer.max_epochs=2",
    "--trainer.precision=bf16-mixed",
    "--model.init_args.backbone.max_length=48",
]
EPOCHS = {"jtt": 3, "lp_ft": 3}
"""Those whose first epoch is a stage of its own get as many epochs after it as all others have."""
ADAPTER = ["--model.init_args.backbone.adaptation=lora", "--model.init_args.learning_rate=5.0e-4"]
# At 0.15 more than half of the items that plain training gets right fall (one seed); at 1.0 all of them do.
ATTACKS: list[Any] = ["deepwordbug", "pwws", {"name": "embedding_pgd", "epsilon": 0.15}]
MONITOR: dict[str, Any] = {
    "class_path": "lightning_robust.callbacks.RobustnessMonitor",
    # Only after the last epoch: what training went through is not asked here.
    "init_args": {"attacks": ATTACKS, "num_examples": 150, "every_n_epochs": 1000, "autocast": "bfloat16"},
}
COLUMNS = {
    "clean": ["clean/clean"],
    "deepwordbug": ["attack/deepwordbug"],
    "pwws": ["attack/pwws"],
    "embedding_pgd": ["attack/embedding_pgd"],
    "AdvGLUE": ["adversarial/advglue"],
    "OOD mean": ["ood/imdb", "ood/yelp", "ood/contrast", "ood/style"],
}
"""What the table shows, and the parts that each is the mean of."""

Bits = np.ndarray[Any, np.dtype[np.bool_]]


def rows() -> list[str]:
    """Return the names of the table's rows; those of LoRA end in ``+lora``."""
    recipes = sorted(path.stem for path in Path("recipes/sentiment").glob("*.yaml"))
    single = [name for name in recipes if name not in ("erm", "freelb_lora", *HYBRIDS)]
    return ["erm", *single, *HYBRIDS, *(f"{name}+lora" for name in LORA)]


def finished() -> dict[tuple[str, int], dict[str, Any]]:
    """Return what was measured, by row and seed."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(run["row"], run["seed"]): run for run in map(json.loads, lines)}


def train(row: str, seed: int) -> str:
    """Train, evaluate, and note what was measured."""
    folder = OUTPUT / f"{row}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    monitor = {**MONITOR, "init_args": {**MONITOR["init_args"], "records_dir": str(folder)}}
    fragment = folder / "monitor.yaml"
    fragment.write_text(json.dumps({"trainer": {"callbacks+": [monitor]}}))  # JSON is YAML too
    recipe, _, adapter = row.partition("+")
    command = [sys.executable, "-m", "lightning_robust.cli", "fit", "-c", f"sentiment/{recipe}"]
    command += ["-c", "data/shared_domains", "-c", str(fragment)]
    command += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    command += [f"--model.init_args.backbone.seed={seed}", f"--trainer.default_root_dir={folder}"]
    command += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    command += ["--trainer.enable_progress_bar=false", *SIZES, *(ADAPTER if adapter else [])]
    command += [f"--trainer.max_epochs={EPOCHS[recipe]}"] if recipe in EPOCHS else []
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), check=False)
    if done.returncode:
        return f"{row}, seed {seed}: FAILED, see {folder}/log.txt"
    _note(row, seed, folder)
    return f"{row}, seed {seed}: done"


def _environment() -> dict[str, str]:
    # One thread each: processor times then mean the same whatever runs beside.
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "NLTK_DATA": str(SHARED / "lexical/nltk_data"),
        "LIGHTNING_ROBUST_NEIGHBORS": str(SHARED / "lexical/counterfitted/counterfitted_neighbors.json"),
    }


def _note(row: str, seed: int, folder: Path) -> None:
    (run,) = load_study(folder).runs
    parts = run.evaluations[-1].parts
    monitor = sum(evaluation["cpu_seconds"] for evaluation in run.info["evaluations"])
    line = {
        "row": row,
        "seed": seed,
        "right": {
            "/".join(key): _packed(part.correct[np.argsort(part.items.ids)]) for key, part in parts.items()
        },
        "majority": round(parts["clean", "clean"].majority, 6),
        "training_seconds": round(run.info["finished"]["cpu_seconds"] - monitor, 1),
        "monitor_seconds": round(monitor, 1),
        "commit": (run.info.get("git") or {}).get("commit"),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _packed(right: Bits) -> str:
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def _unpacked(text: str) -> Bits:
    number, _, bits = text.partition(":")
    packed = np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)
    return np.unpackbits(packed, count=int(number)).astype(bool)


def table() -> str:
    """Return the table: plain training's accuracies, and for each defense the changes against it, in points."""
    runs, lines, effects = finished(), [], {}
    for row in rows():
        plain = _baseline(row)
        seeds = [s for s in range(SEEDS) if (row, s) in runs and (plain, s) in runs]
        if seeds and row != plain:
            for column, parts in COLUMNS.items():
                effects[row, column] = _change(runs, row, plain, seeds, parts)
    adjusted = dict(zip(effects, holm([one.p_value for one in effects.values()]).tolist(), strict=True))
    for row in rows():
        plain = _baseline(row)
        seeds = [s for s in range(SEEDS) if (row, s) in runs and (plain, s) in runs]
        if not seeds:
            continue
        if row == plain:
            cells = [_level(_accuracy(runs, row, seeds, parts)) for parts in COLUMNS.values()]
        else:
            cells = [_cell(effects[row, column], adjusted[row, column]) for column in COLUMNS]
        times = [runs[row, s]["training_seconds"] / runs[plain, s]["training_seconds"] for s in seeds]
        name = f"`{row}`" + (" (collapsed)" if _is_collapsed(runs, row, seeds) else "")
        spread = "" if row == plain else f" ({min(times):.2f}–{max(times):.2f})"
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {np.mean(times):.2f}{spread} |")
    return "\n".join(
        [f"| row | seeds | {' | '.join(COLUMNS)} | time |", f"|---|---|{'---|' * (len(COLUMNS) + 1)}", *lines]
    )


def _baseline(row: str) -> str:
    return "erm+lora" if row.endswith("+lora") else "erm"


def _change(
    runs: dict[tuple[str, int], dict[str, Any]], row: str, plain: str, seeds: list[int], parts: list[str]
) -> Effect:
    treated, baseline = ([_right(runs[name, s], parts) for s in seeds] for name in (row, plain))
    return effect(treated, baseline, strata=_strata(runs[row, seeds[0]], parts))


def _right(run: dict[str, Any], parts: list[str]) -> Bits:
    return np.concatenate([_unpacked(run["right"][part]) for part in parts])


def _strata(run: dict[str, Any], parts: list[str]) -> list[str] | None:
    """Return what part each item is of; None where there is one part only."""
    return [part for part in parts for _ in _unpacked(run["right"][part])] if len(parts) > 1 else None


def _accuracy(
    runs: dict[tuple[str, int], dict[str, Any]], row: str, seeds: list[int], parts: list[str]
) -> Effect:
    right = [_right(runs[row, s], parts) for s in seeds]
    return accuracy(right, strata=_strata(runs[row, seeds[0]], parts))


def _is_collapsed(runs: dict[tuple[str, int], dict[str, Any]], row: str, seeds: list[int]) -> bool:
    """Return whether half of the runs are hardly better on clean items, whose labels are even, than a constant answer."""
    constant = [_unpacked(runs[row, s]["right"]["clean/clean"]).mean() < 0.55 for s in seeds]
    return bool(sum(constant) >= len(seeds) / 2)


def _level(found: Effect) -> str:
    return f"{100 * found.delta:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _cell(found: Effect, adjusted: float) -> str:
    """Points with the 95 % interval, in bold where Holm's correction over the table leaves p below 0.05."""
    # The sum makes 0 of -0.
    delta, low, high = (f"{round(100 * one, 1) + 0.0:+.1f}" for one in (found.delta, found.low, found.high))
    return f"{f'**{delta}**' if adjusted < 0.05 else delta} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=rows(), default=rows(), metavar="ROW")
    options = parser.parse_args()
    if options.command == "run":
        # Seed by seed, so that an early stop leaves whole columns to compare.
        known = finished()
        todo = [(row, seed) for seed in range(SEEDS) for row in options.only if (row, seed) not in known]
        with ThreadPoolExecutor(options.jobs) as pool:
            for line in pool.map(lambda one: train(*one), todo):
                print(line, flush=True)
    print(table())


if __name__ == "__main__":
    main()
