"""Results: records, and what is made from them. Imports no Lightning and no torch."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_robust.results.files import RecordsError, read_run_json, write_run_json
from lightning_robust.results.partial import PartialRecords
from lightning_robust.results.records import (
    SCHEMA,
    SCHEMA_VERSION,
    Record,
    decode_text,
    encode_text,
    find_runs,
    iter_records,
    read_records,
    to_table,
    write_records,
)
from lightning_robust.results.runinfo import run_info
from lightning_robust.results.tables import evaluations, groups, metrics, transfer_deltas

_LATER = {
    "write_report": "report",
    "load_study": "study",
    "study_correlations": "correlations",
    "study_effective_robustness": "correlations",
    "study_verdicts": "transfer",
    "transfer_matrix": "transfer",
    "Effect": "statistics",
    "Verdict": "statistics",
    "accuracy": "statistics",
    "effect": "statistics",
    "effective_robustness": "statistics",
    "holm": "statistics",
    "mcnemar": "statistics",
    "transfer_correlation": "statistics",
    "transfer_ratio": "statistics",
    "transfer_verdict": "statistics",
}
"""Names that load scipy or matplotlib, which a training run need not do, and their modules."""

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "Effect",
    "PartialRecords",
    "Record",
    "RecordsError",
    "Verdict",
    "accuracy",
    "decode_text",
    "effect",
    "effective_robustness",
    "encode_text",
    "evaluations",
    "find_runs",
    "groups",
    "holm",
    "iter_records",
    "load_study",
    "mcnemar",
    "metrics",
    "read_records",
    "read_run_json",
    "run_info",
    "study_correlations",
    "study_effective_robustness",
    "study_verdicts",
    "to_table",
    "transfer_correlation",
    "transfer_deltas",
    "transfer_matrix",
    "transfer_ratio",
    "transfer_verdict",
    "write_records",
    "write_report",
    "write_run_json",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"lightning_robust.results.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
