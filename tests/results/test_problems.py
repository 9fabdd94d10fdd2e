from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_robust.results import (
    write_run_json,
)
from lightning_robust.results.outcomes import CLEAN
from lightning_robust.results.study import (
    load_study,
    pair,
)
from tests.results.studies import (
    FGM,
    LEVELS,
    condition,
    make_run,
    make_study,
    run_named,
    said,
    static,
    two_runs,
)
from tests.results.synthetic import evaluation


def test_different_items_are_counted(tmp_path: Path) -> None:
    rows = static("clean", "clean", "10" * 30)
    make_run(tmp_path, "erm-seed0", rows=[rows[:50]])
    make_run(tmp_path, "fgm-seed0", rows=[rows[10:]], defenses=[FGM])
    study = load_study(tmp_path)
    problem = said(study, "different items")
    assert problem.startswith(
        "Clean items: 2 runs on different items: 40 items are common to all, 20 are not."
    )
    assert "nothing is estimated" not in problem
    assert "Below 41 nothing is estimated" in said(load_study(tmp_path, min_items=41), "different items")


def test_different_labels_are_left_out(tmp_path: Path) -> None:
    rows = static("clean", "clean", "10" * 20)
    other = [replace(row, label=5) if index < 3 else row for index, row in enumerate(rows)]
    fgm, erm = two_runs(tmp_path, other, rows)
    both = pair(fgm, erm, CLEAN)
    assert both is not None
    assert both.treated.shape == (1, 37)
    assert both.dropped == 3
    said(load_study(tmp_path), "Clean items: 3 items have different labels", "'clean-0'")


def test_a_copied_run_counts_once(tmp_path: Path) -> None:
    folder = make_study(tmp_path, seeds=1) / "fgm-seed0"
    shutil.copytree(folder, tmp_path / "fgm-seed0-copy")
    study = load_study(tmp_path)
    assert len(study.runs) == 3
    said(study, "Run id-fgm-seed0 of", "fgm-seed0-copy is left out", f"{folder}.")
    shutil.move(tmp_path / "fgm-seed0-copy", tmp_path / "a-copy")
    study = load_study(tmp_path)
    assert run_named(study, "fgm-seed0").folder == folder
    said(study, "a-copy is left out", f"{folder}.")
    shutil.move(folder, tmp_path / "b-copy")
    [kept] = [run for run in load_study(tmp_path).runs if run.name.startswith("fgm")]
    assert kept.folder == tmp_path / "a-copy"
    shutil.move(tmp_path / "b-copy", folder)
    assert len(load_study([tmp_path, folder, f"{tmp_path}/../{tmp_path.name}"]).runs) == 3


def test_two_runs_of_one_id_are_told_from_a_copy(tmp_path: Path) -> None:
    make_run(tmp_path, "a-seed0", run_id="same", rows=[static("clean", "clean", "10" * 20)], name="fgm-seed0")
    make_run(tmp_path, "fgm-seed0", run_id="same", rows=[static("clean", "clean", "11" * 20)])
    study = load_study(tmp_path)
    assert [run.folder.name for run in study.runs] == ["fgm-seed0"]
    said(study, "a-seed0 is left out", "fgm-seed0, with other records: see which of them is meant.")


def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path, "erm-seed0", started="2026-01-02")
    make_run(tmp_path, "erm-seed0-2", seed=0, started="2026-01-01")
    study = load_study(tmp_path)
    assert [run.name for run in study.runs] == ["erm-seed0-2"]
    said(study, "erm-seed0 (", "it repeats erm-seed0-2 with the same seed, 0")


def test_runs_without_run_json_are_named_by_their_folders(tmp_path: Path) -> None:
    make_study(tmp_path)
    for path in tmp_path.rglob("run.json"):
        path.unlink()
    study = load_study(tmp_path)
    assert [(one.name, one.seeds, one.backbone) for one in study.conditions] == [
        ("erm", [0, 1], ""), ("fgm", [0, 1], ""), ("vrex", [0, 1], ""),
    ]  # fmt: skip
    base = study.baseline(condition(study, "fgm"))
    assert base is condition(study, "erm")


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    make_study(tmp_path, seeds=1)
    write_run_json(tmp_path / "crashed", {"run_id": "x"})
    said(load_study(tmp_path), "crashed is left out: it has no records")


def test_a_training_that_ended_early_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "erm-seed0", max_epochs=5)
    make_run(tmp_path, "erm-seed1", max_epochs=2, finished=None)
    make_run(tmp_path, "erm-seed2", max_epochs=-1)
    study = load_study(tmp_path)
    assert said(study, "Stopped early").endswith(
        "last evaluated after 2 of 5 epochs, counted as they are: erm-seed0."
    )
    assert said(study, "Not finished").endswith(
        "last evaluated after 2 epochs, counted as they are: erm-seed1."
    )


def test_one_seed_is_named(tmp_path: Path) -> None:
    assert said(load_study(make_study(tmp_path, seeds=1)), "One seed only").startswith(
        "One seed only: erm, fgm, vrex. What is said of them is about a training run"
    )


@pytest.mark.parametrize(
    ("kind", "words"), [("ood", "no OOD environment"), ("adv", "no adversarial environment")]
)
def test_a_missing_kind_is_named(tmp_path: Path, kind: str, words: str) -> None:
    starts = {"ood": ("ood",), "adv": ("attack", "adversarial")}[kind]
    levels = {key: level for key, level in LEVELS.items() if not key.startswith(starts)}
    without = [evaluation("r", 0, 1, levels, num_items=40)]
    make_run(tmp_path / "some", "erm-seed0", rows=without)
    make_run(
        tmp_path / "some", "fgm-seed0", rows=[evaluation("r", 0, 1, LEVELS, num_items=40)], defenses=[FGM]
    )
    said(load_study(tmp_path / "some"), "The last evaluation of erm-seed0", words)
    said(load_study(tmp_path / "some" / "erm-seed0"), "The last evaluations hold", words)


def test_all_right_and_all_wrong_are_named(tmp_path: Path) -> None:
    make_run(
        tmp_path, "erm-seed0", rows=[static("clean", "clean", "1" * 40) + static("ood", "imdb", "0" * 40)]
    )
    study = load_study(tmp_path)
    said(study, "Clean items: every item is right", "erm-seed0")
    said(study, "OOD imdb: every item is wrong", "erm-seed0")


def test_a_repeated_item_counts_once(tmp_path: Path) -> None:
    rows = static("clean", "clean", "10" * 20)
    make_run(
        tmp_path,
        "erm-seed0",
        rows=[[*rows[:9], replace(rows[0], correct=False), *rows[9:], replace(rows[1], correct=True)]],
    )
    copied = make_run(tmp_path, "erm-seed1", rows=[rows])
    shutil.copy(copied / "records" / "epoch=000.parquet", copied / "records" / "epoch=000 (copy).parquet")
    study = load_study(tmp_path)
    said(study, "erm-seed0", "2 records repeat an item")
    said(study, "erm-seed1", "40 records repeat an item")
    for run in study.runs:
        [one] = run.evaluations
        part = one.parts["clean", "clean"]
        assert part.correct.tolist() == [True, False] * 20
        assert part.statuses == {"evaluated": 40}


def test_an_evaluation_may_be_spread_over_files(tmp_path: Path) -> None:
    rows = static("clean", "clean", "10" * 20)
    make_run(tmp_path, "erm-seed0", rows=[rows[:10], rows[10:], static("ood", "imdb", "11")], max_epochs=1)
    [run] = load_study(tmp_path).runs
    [one] = run.evaluations
    assert one.parts["clean", "clean"].correct.tolist() == [True, False] * 20
    assert one.parts["clean", "clean"].statuses == {"evaluated": 40}
    assert ("ood", "imdb") in one.parts


def test_few_items_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, "erm-seed0", rows=[static("clean", "clean", "10" * 10)])
    said(load_study(tmp_path), "Clean items: 20 items; below 30 nothing is estimated")


def test_texts_from_data_stay_data(tmp_path: Path) -> None:
    name = "<b>{0} [red] %s"
    make_run(tmp_path, "a", rows=[static("ood", name, "1" * 40)], name=name)
    study = load_study(tmp_path)
    assert study.runs[0].name == name
    said(study, f"OOD {name}: every item is right")


def test_attacks_with_other_settings_or_budgets_are_named(tmp_path: Path) -> None:
    weak = {"attacks": {"pwws": {"max_words": 1}, "deepwordbug": {"max_edits": 30}}, "query_budget": 20}
    full = {"attacks": {"pwws": {"max_words": 30}, "deepwordbug": {"max_edits": 30}}, "query_budget": None}
    make_run(tmp_path, "erm-seed0", **full)
    make_run(tmp_path, "fgm-seed0", defenses=[FGM], **weak)
    study = load_study(tmp_path)
    said(study, "Attack pwws: `max_words` is 30 in erm-seed0; 1 in fgm-seed0", "must not be compared")
    said(study, "Attacks: `query_budget` is null in erm-seed0; 20 in fgm-seed0")
    assert not [problem for problem in study.problems if "deepwordbug" in problem]


def test_of_runs_with_the_same_seed_the_finished_one_counts(tmp_path: Path) -> None:
    make_run(tmp_path, "fgm-seed0", defenses=[FGM], finished=None, started="1", epochs=1, max_epochs=2)
    make_run(tmp_path / "again", "fgm-seed0", defenses=[FGM], run_id="again", started="2")
    study = load_study(tmp_path)
    assert [run.run_id for run in study.runs] == ["again"]
    said(study, "is left out: it repeats fgm-seed0 with the same seed")
