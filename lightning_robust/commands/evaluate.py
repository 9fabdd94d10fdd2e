"""Clean, adversarial and OOD report of a trained model, without training."""

from __future__ import annotations

import argparse
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_robust.assets import find_asset
from lightning_robust.attacks.blind import rehearse
from lightning_robust.callbacks.attack_plan import make_attacks
from lightning_robust.callbacks.evaluation import Evaluation, free_folder
from lightning_robust.callbacks.item_records import When
from lightning_robust.commands.attack_input import attack_specs
from lightning_robust.commands.check import check_recipe, load_yaml, merge
from lightning_robust.data.environments import as_environments
from lightning_robust.data.items import Environment, Role
from lightning_robust.data.sampling import seeded_sample
from lightning_robust.errors import ConfigError
from lightning_robust.modules.state_key import fingerprint
from lightning_robust.modules.victim_loading import load_victim
from lightning_robust.results import (
    Record,
    groups,
    metrics,
    run_info,
    write_records,
    write_report,
    write_run_json,
)

_ROLES: tuple[Role, ...] = ("clean", "ood", "adversarial")
_NAME = "evaluation"


@dataclass(frozen=True)
class _Plan:
    """What is asked for: the command's options before the recipe's monitor before the defaults."""

    attacks: Sequence[Any]
    num_examples: int
    query_budget: int | None
    total_query_budget: int | None
    time_budget: float | None
    autocast: str | None
    evaluation_seed: int


def evaluate(out: Console, options: argparse.Namespace) -> None:
    """Evaluate ``options.model`` and write records and a report.

    Raises:
        RobustError: If the model or an environment cannot be loaded, or nothing is to be evaluated.
    """
    recipe = _recipe(options.config)
    settings = _monitor_settings(recipe)
    plan = _plan(options, settings)
    if defenses := settings.get("inference_defenses"):
        out.print(
            f"warning: The recipe's inference_defenses ({', '.join(defenses)}) are left out: the plain model is evaluated. "
            "To measure them, use the recipe's monitor: lightning-robust test -c RECIPE --ckpt_path FILE, or fit.",
            soft_wrap=True,
            markup=False,
        )
    environments = _environments(options, recipe)
    evaluation = _evaluation(plan, environments)
    victim, about = load_victim(options.model, options.max_length)
    rehearse(evaluation.attacks, victim)
    name = re.sub(r"[^\w.-]+", "_", str(options.model).strip("./")) or "model"
    folder = free_folder(options.output or Path("checkpoints") / "evaluate" / name)
    when = When(uuid.uuid4().hex[:12])
    info = run_info(
        run_id=when.run_id,
        name=str(options.model),
        recipe=recipe or None,
        label_names=about["hyperparameters"].get("label_names"),
        **about,
        **vars(plan),
    )
    write_run_json(folder, info)
    partial = folder / "records" / f".{_NAME}.jsonl"
    records = evaluation.run(victim, when, partial=partial, weights=fingerprint(victim.model))
    write_records(folder / "records" / f"{_NAME}.parquet", records)
    partial.unlink(missing_ok=True)
    doubts = evaluation.judge(records)
    if doubts:
        write_run_json(folder, info | {"doubts": [asdict(doubt) for doubt in doubts]})
    out.print(_table(records))
    for doubt in doubts:
        out.print(f"warning: {doubt.message}", soft_wrap=True, markup=False)
    out.print(f"Records: {folder / 'records'}", soft_wrap=True)
    out.print(f"Report:  {write_report([folder], folder / 'report.html')}", soft_wrap=True)


def _recipe(names: Sequence[str]) -> dict[str, Any]:
    paths = [find_asset(name) for name in names]
    if faults := check_recipe(paths):
        raise ConfigError("\n  ".join(["faults in the recipe:", *faults]))
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, load_yaml(path))
    return merged


def _monitor_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    callbacks = (recipe.get("trainer") or {}).get("callbacks") or []
    monitors = [c for c in callbacks if str(c.get("class_path")).endswith("RobustnessMonitor")]
    return (monitors[-1].get("init_args") or {}) if monitors else {}


def _plan(options: argparse.Namespace, settings: Mapping[str, Any]) -> _Plan:
    def pick(option: Any, name: str, default: Any) -> Any:
        return option if option is not None else settings.get(name, default)

    if options.setting and not options.attack:
        raise ConfigError("Expected --attack with --setting, to say whose setting it is.")
    named = attack_specs(options.attack, options.setting) if options.attack else None
    attacks = [] if options.no_attack else pick(named, "attacks", ["deepwordbug"])
    return _Plan(
        attacks,
        pick(options.num_examples, "num_examples", 200),
        pick(options.query_budget, "query_budget", None),
        pick(None, "total_query_budget", None),
        pick(options.time_budget, "time_budget", None),
        pick(options.autocast, "autocast", None),
        pick(options.seed, "seed", 0),
    )


def _environments(options: argparse.Namespace, recipe: Mapping[str, Any]) -> list[Environment]:
    data = (recipe.get("data") or {}).get("init_args") or {}
    named: dict[Role, dict[str, Any]] = {
        "clean": {"clean": data["clean"]} if data.get("clean") else {},
        "ood": dict(data.get("ood") or {}),
        "adversarial": dict(data.get("adversarial") or {}),
    }
    if options.clean is not None:
        named["clean"] = {"clean": {"path": options.clean}}
    named["ood"] |= _named_files(options.ood, "--ood")
    named["adversarial"] |= _named_files(options.adversarial, "--adversarial")
    model = (recipe.get("model") or {}).get("init_args") or {}
    found = [
        environment
        for role in _ROLES
        for name, source in named[role].items()
        for environment in as_environments(source, name, role, model.get("label_names"))
    ]
    if not found:
        raise ConfigError(
            "There is nothing to evaluate on. Name a recipe whose data to use (-c sentiment/erm), or files: "
            "--clean test.tsv --ood reviews=other.tsv."
        )
    return found


def _named_files(options: Sequence[str], flag: str) -> dict[str, dict[str, str]]:
    files = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"Expected {flag} NAME=FILE, but got {option!r}.")
        if name in files:
            raise ConfigError(f"Expected {flag} names that differ, but {name!r} occurs twice.")
        files[name] = {"path": path}
    return files


def _evaluation(plan: _Plan, environments: Sequence[Environment]) -> Evaluation:
    if plan.num_examples < 1:
        raise ConfigError(f"Expected --num-examples to be >= 1, but got {plan.num_examples}.")
    clean = [item for one in environments if one.role == "clean" for item in one.items]
    attacks = make_attacks(plan.attacks)
    if attacks and not clean:
        raise ConfigError("Expected clean items to attack. Give some with --clean FILE, or say --no-attack.")
    attacked = seeded_sample(clean, [item.id for item in clean], plan.num_examples, plan.evaluation_seed)
    return Evaluation(
        environments,
        attacks,
        attacked if attacks else (),
        query_budget=plan.query_budget,
        total_query_budget=plan.total_query_budget,
        time_budget=plan.time_budget,
        autocast=plan.autocast,
        seed=plan.evaluation_seed,
    )


def _table(records: Sequence[Record]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("", "kind", "items", "accuracy", "macro F1", "majority", "success rate", "queries"):
        table.add_column(column, justify="left" if column in ("", "kind") else "right")
    values = metrics(records)
    prefixes = {"clean": "clean", "ood": "ood/{}", "adversarial": "adv/{}", "attack": "adv/{}"}
    for (kind, name), group in groups(records).items():
        prefix = prefixes[kind].format(name)
        cells = [f"{group.accuracy:.3f}", _cell(values, f"{prefix}/f1"), f"{group.majority:.3f}"]
        attacked = [_cell(values, f"{prefix}/{key}") for key in ("success_rate", "queries")]
        table.add_row(name, kind, str(len(group.item_id)), *cells, *attacked)
    return table


def _cell(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return ""
    return f"{values[key]:.0f}" if key.endswith("queries") else f"{values[key]:.3f}"
