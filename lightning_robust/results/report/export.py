"""The tables of a page as rows of plain values, to be written to files; shares are fractions."""

from __future__ import annotations

import json
import math
from typing import Any

from lightning_robust.results.report.accuracies import finished, peak_memory
from lightning_robust.results.report.bundle import table_files
from lightning_robust.results.report.content import Content
from lightning_robust.results.selection import select
from lightning_robust.results.statistics import Correlation, Effect

Rows = list[dict[str, Any]]
ALL_EVALUATIONS = "all evaluations, on all items"


def tables(content: Content) -> dict[str, bytes]:
    """Return every table as CSV and Parquet, and the runs' ``run.json`` in one file."""
    files: dict[str, bytes] = {}
    for name, rows in (
        ("verdicts", _verdicts(content)),
        ("transfer-matrix", _matrix(content)),
        ("correlations", _correlations(content)),
        ("effective-robustness", _effective(content)),
        ("accuracies", _accuracies(content)),
        ("attacks", _attacks(content)),
        ("evaluations", _evaluations(content)),
        ("cost", _cost(content)),
        ("problems", [{"problem": text, "selection": content.rule} for text in content.problems]),
    ):
        files.update(table_files(name, rows))
    infos = [
        {"condition": run.condition, "run": run.name, "run.json": run.info} for run in content.study.runs
    ]
    files["runs.json"] = (json.dumps(infos, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    return files


def _effect(prefix: str, effect: Effect | None) -> dict[str, Any]:
    """Return an estimate with its interval, both empty where only the reason may be said."""
    if effect is None:
        return {}
    known = effect.known
    return {
        prefix: effect.delta if known else None,
        f"{prefix}_low": effect.low if known else None,
        f"{prefix}_high": effect.high if known else None,
        "p_value": _known(effect.p_value),
        "num_seeds": effect.num_seeds,
        "num_items": effect.num_items,
        "reason": effect.reason,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _verdicts(content: Content) -> Rows:
    rows = []
    for one in content.verdicts:
        verdict = one.verdict
        row = {
            "backbone": one.backbone, "aim": one.aim, "label": verdict.label if verdict else "no verdict",
            "reason": verdict.reason if verdict else one.reason, "baseline": one.baseline.name,
            "defenses": ", ".join(condition.name for condition in one.conditions), "selection": content.rule,
            "margin": verdict.margin if verdict else None,
        }  # fmt: skip
        for side in ("on_target", "off_target"):
            effect: Effect | None = getattr(verdict, side, None)
            for name, value in _effect("change", effect).items():
                row[f"{side}_{name}"] = value
        needed = verdict.needed if verdict else None
        row["needed_seeds"], row["needed_items"] = needed or (None, None)
        rows.append(row)
    return rows


def _matrix(content: Content) -> Rows:
    matrix = content.matrix
    return [
        {
            "backbone": condition.backbone, "condition": condition.name, "aim": condition.aim,
            "baseline": baseline.name, "column": column.key, "kind": column.kind, **_effect("change", cell),
            "p_holm": _known(matrix.adjusted[row, k]), "collapsed": matrix.collapsed[row], "selection": content.rule,
        }
        for row, (condition, baseline) in enumerate(zip(matrix.conditions, matrix.baselines, strict=True))
        for k, (column, cell) in enumerate(zip(matrix.columns, matrix.cells[row], strict=True))
        if cell is not None
    ]  # fmt: skip


def _correlations(content: Content) -> Rows:
    def row(backbone: str, name: str, one: Correlation) -> dict[str, Any]:
        return {
            "backbone": backbone, "correlation": name, "value": _known(one.value), "low": _known(one.low), "high": _known(one.high),
            "num_defenses": one.num_defenses, "reason": one.reason, "selection": content.rule,
        }  # fmt: skip

    return [
        row(one.backbone, name, getattr(one.correlation, name))
        for one in content.correlations
        for name in ("pearson", "spearman", "partial")
    ]


def _effective(content: Content) -> Rows:
    return [
        {
            "backbone": one.condition.backbone, "condition": one.condition.name, "kind": one.kind,
            "clean": one.clean, "robust": one.robust, **_effect("beyond", one.beyond), "selection": content.rule,
        }
        for one in content.effective
    ]  # fmt: skip


def _accuracies(content: Content) -> Rows:
    rows = []
    for condition in content.study.conditions:
        for column in content.columns:
            score = content.scores.get((condition.name, column.key))
            if score is not None:
                rows.append(
                    {
                        "backbone": condition.backbone, "condition": condition.name, "aim": condition.aim,
                        "column": column.key, "kind": column.kind, **_effect("accuracy", score.effect),
                        "majority": score.majority, "selection": content.rule,
                    }
                )  # fmt: skip
                del rows[-1]["p_value"]
    return rows


def _attacks(content: Content) -> Rows:
    return [
        {
            "condition": one.condition, "attack": one.attack, **_effect("accuracy", one.accuracy),
            "answers": one.num_items, **{s: one.statuses.get(s, 0) for s in ("success", "failed", "skipped", "error")},
            "queries": one.queries, "selection": content.rule,
        }
        for one in content.attacks
    ]  # fmt: skip


def _evaluations(content: Content) -> Rows:
    return [
        {
            "condition": run.condition, "run": run.name, "seed": run.seed, "epoch": one.epoch,
            "global_step": one.global_step, "kind": kind, "name": name, "num_items": len(part.items),
            "accuracy": part.accuracy, "majority": part.majority,
            **{s: part.statuses.get(s, 0) for s in ("unparsed", "error", "success", "failed", "skipped")},
            "queries": int(part.queries.sum()), "seconds": part.seconds, "selection": ALL_EVALUATIONS,
            "reported": one is select(run, content.rule).evaluation,
        }
        for run in content.study.runs
        for one in run.evaluations
        for (kind, name), part in one.parts.items()
    ]  # fmt: skip


def _cost(content: Content) -> Rows:
    return [
        {
            "condition": run.condition, "run": run.name, "seed": run.seed,
            "queries": sum(one.queries for one in run.evaluations),
            "evaluation_seconds": sum(one.seconds for one in run.evaluations),
            "run_seconds": _known(finished(run.info, "seconds")), "peak_memory": _known(peak_memory(run.info)),
            "selection": ALL_EVALUATIONS,
        }
        for run in content.study.runs
    ]  # fmt: skip
