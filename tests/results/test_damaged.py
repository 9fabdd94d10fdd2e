from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_robust.results import (
    RecordsError,
    to_table,
    write_records,
)
from lightning_robust.results.study import (
    load_study,
    scores,
)
from tests.results.studies import (
    FGM,
    attacked,
    make_run,
    make_study,
    run_named,
    said,
    static,
)


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "empty", "version", "no records file", "kind", "twice"]
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, damage: str) -> None:
    folder = make_study(tmp_path, seeds=1) / "fgm-seed0"
    path = folder / "records" / "epoch=001.parquet"
    table, content = pq.read_table(path), path.read_bytes()
    if damage == "version":
        threes = pa.array(np.full(table.num_rows, 3, np.int16))
        pq.write_table(table.set_column(table.num_columns - 1, "schema_version", threes), path)
    elif damage == "no records file":
        pq.write_table(pa.table({"a": [1]}), path)
    elif damage == "twice":
        pq.write_table(table.append_column("label", table["label"]), path)
    elif damage == "kind":
        at = table.column_names.index("kind")
        pq.write_table(table.set_column(at, "kind", pa.array(["new"] * table.num_rows)), path)
    else:
        path.write_bytes({"truncated": content[:-100], "garbage": b"PAR1" + b"x" * 999, "empty": b""}[damage])
    study = load_study(tmp_path)
    said(study, f"{path} is left out", {"version": "schema version 1 or 2"}.get(damage, ""))
    assert [len(run.evaluations) for run in study.runs] == [2, 1, 2]
    said(study, "The last evaluation of fgm-seed0 is that of epoch 1", "that of epoch 0 stands in for it")
    assert not [problem for problem in study.problems if "Stopped early" in problem]


def test_a_file_that_says_no_epoch_may_hold_the_last_evaluation(tmp_path: Path) -> None:
    make_run(tmp_path, "erm-seed0", epochs=2)
    folder = make_run(tmp_path, "fgm-seed0", epochs=2, defenses=[FGM])
    (folder / "records" / "epoch=001.parquet").rename(folder / "records" / "last.parquet")
    (folder / "records" / "last.parquet").write_bytes(b"PAR1")
    study = load_study(tmp_path)
    said(
        study,
        "The last evaluation of fgm-seed0 may be in a file that could not be read; that of epoch 0 stands",
    )
    assert not [problem for problem in study.problems if "Stopped early" in problem]


def test_an_early_stop_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "fgm-seed0", epochs=3, max_epochs=5)
    (folder / "records" / "epoch=001.parquet").write_bytes(b"PAR1")
    study = load_study(tmp_path)
    assert not [problem for problem in study.problems if "stands in" in problem]
    said(study, "Stopped early, last evaluated after 3 of 5 epochs")
    (folder / "records" / "epoch=002.parquet").write_bytes(b"PAR1")
    study = load_study(tmp_path)
    said(study, "is that of epoch 2, which could not be read; that of epoch 0 stands")
    said(study, "Stopped early, last evaluated after 3 of 5 epochs")


def test_bytes_damaged_in_the_middle_leave_no_half_file(tmp_path: Path) -> None:
    folder = make_study(tmp_path, seeds=1) / "fgm-seed0"
    path = folder / "records" / "epoch=001.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    study = load_study(tmp_path)
    said(study, f"{path} is left out")
    assert len(run_named(study, "fgm-seed0").evaluations) == 1


def test_no_flipped_bit_changes_an_answer(tmp_path: Path) -> None:
    path = make_study(tmp_path, seeds=1) / "fgm-seed0" / "records" / "epoch=001.parquet"

    def answers() -> list[list[object]]:
        evaluations = run_named(load_study(tmp_path), "fgm-seed0").evaluations
        return [[part.correct.tolist(), part.statuses] for one in evaluations for part in one.parts.values()]

    content, whole, rng, left_out = path.read_bytes(), answers(), np.random.default_rng(0), 0
    first = whole[: len(whole) // 2]
    for position in rng.integers(4, len(content) - 8, 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        found = answers()
        left_out += found == first
        assert found in (whole, first)
    assert left_out


def test_a_linked_file_belongs_to_the_run_that_it_lies_in(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", seeds=1) / "fgm-seed0"
    path = folder / "records" / "epoch=001.parquet"
    path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(tmp_path / "elsewhere.parquet")
    study = load_study(tmp_path / "study")
    assert not [problem for problem in study.problems if "left out" in problem]
    assert len(run_named(study, "fgm-seed0").evaluations) == 2


def test_a_run_of_which_nothing_is_left_is_left_out(tmp_path: Path) -> None:
    folder = make_study(tmp_path, seeds=1) / "fgm-seed0"
    for path in folder.glob("records/*.parquet"):
        path.write_bytes(b"PAR1")
    study = load_study(tmp_path)
    assert [one.name for one in study.conditions] == ["erm", "vrex"]
    said(study, f"{folder} is left out")
    said(study, "epoch=000.parquet and 1 more files of its folder are left out")
    with pytest.raises(
        RecordsError, match=r"None of the 2 records files can be reported(?s:.)*epoch=000.parquet"
    ):
        load_study(folder)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="does not exist"):
        load_study(tmp_path / "nowhere")
    with pytest.raises(RecordsError, match="holds no records"):
        load_study(tmp_path)
    write_records(tmp_path / "records" / "a.parquet", [])
    with pytest.raises(RecordsError, match="hold no rows"):
        load_study(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff\xfe"], ids=["cut", "list", "bytes"])
def test_a_damaged_run_json_is_treated_as_missing(tmp_path: Path, content: str | bytes) -> None:
    make_study(tmp_path, seeds=1)
    path = tmp_path / "fgm-seed0" / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    study = load_study(tmp_path)
    said(study, str(path), "treated as missing")
    run = run_named(study, "fgm-seed0")
    assert (run.info, run.seed, run.condition) == ({}, 0, "fgm")


def test_run_json_of_strange_types_does_no_harm(tmp_path: Path) -> None:
    make_study(tmp_path, seeds=1)
    strange: dict[str, Any] = {
        "name": 7, "seed": "x", "recipe": [1], "defenses": {"a": 1}, "hyperparameters": "h", "max_epochs": "many",
        "inference_defense": "vote", "evaluations": 3, "finished": None, "run_id": None,
    }  # fmt: skip
    (tmp_path / "fgm-seed0" / "run.json").write_text(json.dumps(strange))
    study = load_study(tmp_path)
    assert [one.name for one in study.conditions] == ["erm", "7", "vrex"]
    for one in study.conditions:
        study.baseline(one)


def test_probabilities_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    rows = static("clean", "clean", "10" * 20)
    doubtful = [replace(row, probability=math.nan) if index < 7 else row for index, row in enumerate(rows)]
    missing = [replace(row, probability=None) for row in rows]
    make_run(tmp_path, "erm-seed0", rows=[doubtful])
    make_run(tmp_path, "erm-seed1", rows=[missing])
    study = load_study(tmp_path)
    assert "erm-seed0 (" in said(study, "7 probabilities are NaN", "count as they are")
    assert scores(study.runs[0].evaluations[0])["clean"].accuracy == 0.5


def test_nulls_are_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", rows=[static("clean", "clean", "11" * 20)])
    path = folder / "records" / "epoch=000.parquet"
    table = to_table(static("clean", "clean", "11" * 20))
    for name in ("correct", "queries", "seconds", "status", "attack"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.nulls(40, table.schema.field(name).type))
    pq.write_table(table, path)
    [run] = load_study(tmp_path).runs
    part = run.evaluations[0].parts["clean", "clean"]
    assert (part.accuracy, part.queries.sum(), part.seconds, part.unusable) == (0.0, 0, 0.0, 40)


def test_answers_that_nobody_judged_are_counted(tmp_path: Path) -> None:
    rows = static("clean", "clean", "1" * 40) + attacked("pwws", "10" * 20)
    folder = make_run(tmp_path, "a", rows=[rows])
    path = folder / "records" / "epoch=000.parquet"
    table = pq.read_table(path)
    at, given = table.column_names.index("correct"), table["correct"].to_pylist()
    unknown = [None if i < 7 or 40 <= i < 44 else one for i, one in enumerate(given)]
    pq.write_table(table.set_column(at, "correct", pa.array(unknown, pa.bool_())), path)
    study = load_study(tmp_path)
    parts = study.runs[0].evaluations[0].parts
    assert parts["clean", "clean"].statuses == {"evaluated": 33, "unparsed": 7}
    assert parts["clean", "clean"].accuracy == 33 / 40
    # A success is wrong whatever else a record says: only the two failed attacks are unknown.
    assert parts["attack", "pwws"].statuses == {"failed": 18, "success": 20, "unparsed": 2}
    assert "a (" in said(study, "9 records do not say whether the answer was right", "count as wrong")
