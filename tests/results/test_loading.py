from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_robust.results import (
    Record,
    evaluations,
    groups,
    iter_records,
    read_records,
)
from lightning_robust.results.study import (
    Study,
    load_study,
    scores,
)
from lightning_robust.results.tables import headline
from tests.results.studies import FGM, attacked, condition, make_run, make_study, static
from tests.results.synthetic import record


def odd_rows() -> list[Record]:
    """Everything that makes an item wrong, several clean environments, and attacks on one of them."""
    rows = [
        *static("clean", "a", "1101"),
        *static("clean", "b", "01"),
        *attacked("pwws", "101"),
        *static("adversarial", "glue", "10"),
        *static("ood", "imdb", "1110"),
    ]
    rows += [record(item_id=s, status=s, correct=True, predicted=None) for s in ("unparsed", "error")]
    rows += [record(item_id="k", kind="attack", attack="pwws", status="skipped", correct=True, queries=0)]
    return rows


@pytest.mark.parametrize("order", ["as they are", "shuffled"])
def test_parts_are_those_of_groups(tmp_path: Path, order: str) -> None:
    rows = [replace(row, seconds=0.25) for row in odd_rows()]
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    make_run(tmp_path, "odd", rows=[rows])
    [run] = load_study(tmp_path).runs
    [one] = run.evaluations
    expected = groups(rows)
    assert list(one.parts) == sorted(expected, key=list(one.parts).index)
    for key, part in one.parts.items():
        group = expected[key]
        found = zip(part.items.ids, part.items.labels, part.correct, part.queries, strict=True)
        wanted = zip(group.item_id, group.label, group.correct, group.queries, strict=True)
        assert sorted(found) == sorted(wanted)
        assert part.statuses == Counter(group.status.tolist())
        assert part.seconds == pytest.approx(group.seconds.sum())
        for name in ("accuracy", "success_rate", "mean_queries", "majority", "unusable"):
            assert getattr(part, name) == pytest.approx(getattr(group, name), nan_ok=True), (key, name)
    for name, score in headline(expected).items():
        assert scores(one)[name].accuracy == pytest.approx(score.accuracy)
        assert scores(one)[name].majority == pytest.approx(score.majority)


def test_six_bytes_are_kept_of_a_record_and_items_are_shared(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path, seeds=2))
    for key in study.runs[0].evaluations[0].parts:
        parts = [one.parts[key] for run in study.runs for one in run.evaluations]
        assert len({id(part.items) for part in parts}) == 1
        for part in parts:
            kept = (part.correct, part.codes, part.queries)
            assert sum(one.itemsize for one in kept) == 6
            assert all(one.base is None for one in kept)


def all_parts(study: Study) -> Mapping[Any, Any]:
    return {
        (run.run_id, one.epoch, one.global_step, key): (
            sorted(zip(part.items.ids, part.correct, part.codes, part.queries, strict=True)),
            part.statuses,
        )
        for run in study.runs
        for one in run.evaluations
        for key, part in one.parts.items()
    }


@pytest.mark.parametrize("row_group", [10_000, 37])
def test_one_file_may_hold_a_whole_study(tmp_path: Path, row_group: int) -> None:
    folder = make_study(tmp_path / "runs", num_items=20)
    table = read_records(folder)
    rng = np.random.default_rng(0)
    together = tmp_path / "all.parquet"
    for order in (np.arange(table.num_rows), rng.permutation(table.num_rows)):
        pq.write_table(table.take(pa.array(order)), together, row_group_size=row_group)
        study = load_study(together)
        assert all_parts(study) == all_parts(load_study(folder))
        assert all(run.info == {} for run in study.runs)
    assert [run.seed for run in study.runs] == [0, 1] * 3


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    rows = odd_rows()
    make_run(tmp_path, "plain", rows=[rows])
    expected = all_parts(load_study(tmp_path))
    plain = pa.Table.from_pylist([vars(row) | {"run_id": "id-plain"} for row in rows])
    assert plain.schema.field("kind").type == pa.string()
    pq.write_table(plain, tmp_path / "plain" / "records" / "epoch=000.parquet")
    assert all_parts(load_study(tmp_path)) == expected


def test_schema_version_1_is_read(tmp_path: Path) -> None:
    make_run(tmp_path, "new-seed0")
    old = make_run(tmp_path, "new-seed1")
    for path in old.glob("records/*.parquet"):
        table = pq.read_table(path).drop_columns(["certified_radius", "certificate_confidence"])
        ones = pa.array(np.ones(table.num_rows, np.int16))
        pq.write_table(table.set_column(table.num_columns - 1, "schema_version", ones), path)
    study = load_study(tmp_path)
    assert condition(study, "new").seeds == [0, 1]
    assert not [problem for problem in study.problems if "left out" in problem]


def test_single_files_of_one_run_are_one_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", epochs=3)
    files = sorted(folder.glob("records/*.parquet"))
    [run] = load_study(files[:2]).runs
    assert [one.epoch for one in run.evaluations] == [0, 1]
    assert run.info["name"] == "a"


def test_evaluations_are_in_the_order_of_steps(tmp_path: Path) -> None:
    rows = [
        static("clean", "clean", "1" * 5, epoch=epoch, global_step=step)
        for epoch, step in ((9, 90), (2, 20), (10, 100))
    ]
    make_run(tmp_path, "a", rows=rows)
    [run] = load_study(tmp_path).runs
    assert [(one.epoch, one.global_step) for one in run.evaluations] == [(2, 20), (9, 90), (10, 100)]
    assert [e.epoch for e in evaluations(read_records(tmp_path))] == [2, 9, 10]


def test_tables_beside_the_runs_are_no_records(tmp_path: Path) -> None:
    folder = make_study(tmp_path, seeds=1)
    pq.write_table(pa.table({"delta": [0.1]}), folder / "transfer.parquet")
    study = load_study(folder)
    assert len(study.runs) == 3
    assert not [problem for problem in study.problems if "left out" in problem]


def test_records_can_be_read_file_by_file(tmp_path: Path) -> None:
    folder = make_study(tmp_path, seeds=1, num_items=20)
    found = list(iter_records(folder, columns=["item_id", "correct"]))
    assert [table.num_rows for table in found] == [140] * 6
    assert pa.concat_tables(found) == read_records(folder, columns=["item_id", "correct"])
    for path in sorted(folder.rglob("*.parquet"))[:5]:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="cut short"):
        assert len(list(iter_records(folder))) == 1


def test_progress_counts_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_study(make_study(tmp_path, seeds=1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(index + 1, 6) for index in range(6)]


def test_an_item_that_a_second_row_group_repeats_costs_only_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "erm-seed0", rows=[static("ood", "imdb", "10" * 50)])
    (path,) = (folder / "records").glob("*.parquet")
    table = pq.read_table(path)
    repeated = table["item_id"].to_pylist()
    repeated[60] = repeated[0]
    at = table.column_names.index("item_id")
    pq.write_table(table.set_column(at, "item_id", pa.array(repeated)), path, row_group_size=50)
    study = load_study(tmp_path)
    assert len(study.runs[0].evaluations[0].parts["ood", "imdb"].items) == 99
    assert any("1 records repeat an item" in problem for problem in study.problems)


@pytest.mark.parametrize("shared", [False, True])
def test_several_clean_environments_are_one_part_with_all_their_items(tmp_path: Path, shared: bool) -> None:
    rows = [*static("clean", "a", "1" * 40), *static("clean", "b", "0" * 40)]
    if shared:
        rows = [replace(row, item_id=row.item_id[2:]) for row in rows]
    for seed in range(2):
        make_run(
            tmp_path, f"erm-seed{seed}", rows=[rows, [replace(row, epoch=1, global_step=20) for row in rows]]
        )
    study = load_study(tmp_path)
    parts = [one.parts["clean", "clean"] for run in study.runs for one in run.evaluations]
    assert len({part.items.ids for part in parts}) == 1
    assert (
        (len(parts[0].items), parts[0].accuracy) == (80, 0.5) == (80, groups(rows)["clean", "clean"].accuracy)
    )
    assert not [problem for problem in study.problems if "repeat" in problem]


def test_clean_environments_with_the_same_ids_keep_the_halves_of_their_items(tmp_path: Path) -> None:
    rows = [
        replace(row, item_id=row.item_id[2:])
        for row in (*static("clean", "a", "1" * 40), *static("clean", "b", "0" * 40))
    ]
    make_run(
        tmp_path,
        "erm-seed0",
        rows=[[*rows, *(replace(row, item_id=row.item_id[6:]) for row in attacked("pwws", "1" * 40))]],
    )
    (run,) = load_study(tmp_path).runs
    clean, attack = (run.evaluations[0].parts[key].items for key in (("clean", "clean"), ("attack", "pwws")))
    assert clean.ids[:2] == ("a: 0", "a: 1")
    assert clean.half.tolist() == [*attack.half.tolist()] * 2
    kept = np.arange(80) % 3 == 0
    assert clean.only(kept).half.tolist() == clean.half[kept].tolist()


def test_runs_behind_links_are_found_once(tmp_path: Path) -> None:
    make_study(tmp_path / "store", seeds=1)
    (tmp_path / "links").mkdir()
    for name in ("erm-seed0", "fgm-seed0"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "links" / "again").symlink_to(tmp_path / "store" / "erm-seed0")
    (tmp_path / "links" / "loop").symlink_to(tmp_path / "links")
    assert sorted(run.name for run in load_study(tmp_path / "links").runs) == ["erm-seed0", "fgm-seed0"]


def test_runs_below_a_run_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, "runs")
    make_run(tmp_path / "runs", "fgm-seed0", defenses=[FGM])
    study = load_study(tmp_path / "runs")
    assert len(study.runs) == 1
    assert any(
        "fgm-seed0 is left out: it lies below a folder that is a run itself" in one for one in study.problems
    )
