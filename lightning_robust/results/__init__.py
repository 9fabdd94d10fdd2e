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
    read_records,
    to_table,
    write_records,
)
from lightning_robust.results.runinfo import run_info
from lightning_robust.results.tables import evaluations, groups, metrics, transfer_deltas

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "PartialRecords",
    "Record",
    "RecordsError",
    "decode_text",
    "encode_text",
    "evaluations",
    "find_runs",
    "groups",
    "metrics",
    "read_records",
    "read_run_json",
    "run_info",
    "to_table",
    "transfer_deltas",
    "write_records",
    "write_report",
    "write_run_json",
]


def __getattr__(name: str) -> Any:
    # The report draws with matplotlib, which a training run need not load.
    if name == "write_report":
        return importlib.import_module("lightning_robust.results.report").write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
