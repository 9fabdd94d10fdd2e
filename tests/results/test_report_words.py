"""Sentences of the report where a study is not the plain case."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_robust.results import RecordsError, load_study, read_records, write_report
from lightning_robust.results.report.bundle import table_files, write_bundle
from lightning_robust.results.report.content import Content, look
from lightning_robust.results.report.measures import title
from lightning_robust.results.selection import Rule, select
from lightning_robust.results.study import Column, Items
from tests.results.synthetic import write_run
from tests.results.synthetic_study import Plan, write_study
from tests.results.test_report_study import ERM, FREELB, read

PLAIN = {"clean/clean": 0.85, "attack/deepwordbug": 0.2, "ood/yelp": 0.7}
LOSER = Plan("freelb", "adversarial", {"attack": -0.2})


def contents(folder: Path, rule: Rule = "last") -> Content:
    return look(load_study(folder), rule, 0.01)


def with_constant(folder: Path, evaluations: int = 2) -> Path:
    """Write a baseline, a defense, and one that answers like a constant."""
    for name, levels, aims in (
        ("erm", PLAIN, ()),
        ("fgm", {**PLAIN, "attack/deepwordbug": 0.8}, ("adversarial",)),
        ("coral", dict.fromkeys(PLAIN, 0.5), ("ood",)),
    ):
        defenses = [{"name": name.upper(), "aim": aim, "settings": {}} for aim in aims]
        for seed in range(2):
            run = folder / f"{name}-seed{seed}"
            write_run(run, run.name, [levels] * evaluations, num_items=100, seed=seed, defenses=defenses)
    return folder


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    """Change the entries of every run.json whose run's name starts with ``name``."""
    for path in folder.glob("*/run.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["name"].startswith(name):
            path.write_text(json.dumps(info | changes), encoding="utf-8")


def test_a_loss_on_target_is_said_plainly(tmp_path: Path) -> None:
    (statement,) = contents(write_study(tmp_path, [ERM, LOSER], evaluations=1, num_items=400)).statements
    words = " ".join([statement.sentence, *statement.basis])
    assert statement.label == "inconclusive"
    assert re.search(r"aimed at adversarial robustness lowered it by \d+\.\d points: there is no gain", words)
    assert "yet" not in words
    assert "needed" not in words
    assert "Seeds differ" not in words
    assert "Each point gained" not in words
    assert "How much of a gain" not in words


def test_several_defenses_are_judged_by_their_mean(tmp_path: Path) -> None:
    plans = [ERM, FREELB, Plan("pgd", "adversarial", {"attack": 0.25, "ood": 0.1})]
    (statement,) = contents(write_study(tmp_path, plans, evaluations=1, num_items=400)).statements
    assert re.search(
        r"efenses aimed at adversarial robustness raised it by \+\d+\.\d points on the mean, and raised",
        statement.sentence,
    )
    assert "Each point gained came with +" in " ".join(statement.basis)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (0.3, "raised it by +"),
        (-0.25, "lowered it by "),
        (-0.03, "showed no change of it that could be told from none"),
    ],
)
def test_one_seed_still_tells_of_its_target(effect: float, words: str, tmp_path: Path) -> None:
    plans = [ERM, Plan("freelb", "adversarial", {"attack": effect})]
    (statement,) = contents(write_study(tmp_path, plans, seeds=1, evaluations=1, num_items=300)).statements
    said = " ".join([statement.sentence, *statement.basis])
    assert words not in statement.sentence  # which is about the method
    assert "In these runs, " in said
    assert words in said
    assert "one seed shows one training run, not the method" in statement.sentence
    assert "three seeds or more" in said


def test_defenses_that_differ_get_no_single_answer(tmp_path: Path) -> None:
    plans = [
        ERM,
        Plan("up", "adversarial", {"attack": 0.3, "ood": 0.2}),
        Plan("down", "adversarial", {"attack": 0.3, "ood": -0.35}),
    ]
    (statement,) = contents(write_study(tmp_path, plans, evaluations=1, num_items=400)).statements
    assert statement.label == "inconclusive"
    assert "as the defenses differ: up raised the other kind, down lowered it" in statement.sentence
    assert "yet" not in statement.sentence
    assert "Each point gained" not in " ".join(statement.basis)


def test_neutral_says_what_few_seeds_cannot_show(tmp_path: Path) -> None:
    study = write_study(
        tmp_path, [ERM, Plan("freelb", "adversarial", {"attack": 0.25})], evaluations=1, num_items=400
    )
    (statement,) = look(load_study(study), "last", 0.1).statements
    assert statement.label == "neutral"
    assert any("Runs that fail rarely cannot be seen in 3 seeds" in one for one in statement.basis)


@pytest.mark.parametrize(("aims", "several"), [(("adversarial",), False), (("adversarial", "ood"), True)])
def test_verdicts_and_matrix_correct_for_different_things(
    aims: tuple[str, ...], several: bool, tmp_path: Path
) -> None:
    plans = [ERM, *(Plan(aim, aim, {"attack": 0.2, "ood": 0.1}) for aim in aims)]
    write_study(tmp_path / "runs", plans, seeds=2, evaluations=1, num_items=60)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    told = text.index("one question asked in advance, with its own 95 % interval")
    assert text.index("It rests on") < told < text.index("Over the training")
    assert ("are not corrected for each other" in text) == several


def test_without_a_verdict_nothing_is_said_of_corrections(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", [ERM], seeds=1, evaluations=1, num_items=40)
    assert "asked in advance" not in read(write_report(tmp_path / "runs", tmp_path / "report.html")).text


def test_a_verdict_is_a_heading(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", [ERM, FREELB], seeds=2, evaluations=1, num_items=60)
    page = write_report(tmp_path / "runs", tmp_path / "report.html").read_text(encoding="utf-8")
    (sentence,) = (one.sentence for one in contents(tmp_path / "runs").statements)
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page)[0] == sentence


def test_constant_answers_are_not_in_the_plane_but_named(tmp_path: Path) -> None:
    study = with_constant(tmp_path / "study")
    (backbone,) = contents(study).backbones
    assert backbone.plane is not None
    paths = [line for line in backbone.plane.figure.axes[0].lines if np.size(line.get_xdata()) == 2]
    assert len(paths) == 2  # of erm and fgm
    assert not backbone.hidden
    text = read(write_report(study, tmp_path / "report.html")).text
    assert "Left out as collapsed: coral." in text
    assert "Grey, as collapsed (hardly better on clean items than a constant answer): coral." in text
    assert "Grey lines are the other defenses" not in text


def test_a_plane_of_constant_answers_only_is_not_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "run", [dict.fromkeys(PLAIN, 0.5)] * 2, num_items=400)
    assert contents(tmp_path / "run").backbones[0].plane is None
    assert "Left out as collapsed: run." in read(write_report(tmp_path / "run", tmp_path / "r.html")).text


@pytest.mark.parametrize("evaluations", [1, 2])
def test_points_are_not_called_paths(evaluations: int, tmp_path: Path) -> None:
    study = with_constant(tmp_path / "study", evaluations)
    text = read(write_report(study, tmp_path / "report.html")).text
    plane = text[text.index("Adversarial against OOD robustness") : text.index("What the defenses change")]
    assert ("path" in plane) == ("hollow" in plane) == ("(baseline, dashed)" in plane) == (evaluations == 2)
    assert ("(baseline)" in plane) == ("one point is one condition at its only evaluation" in plane)
    assert ("(baseline)" in plane) == (evaluations == 1)


@pytest.mark.parametrize("rule", ["last", "clean"])
def test_counts_are_of_the_reported_items(rule: Rule, tmp_path: Path) -> None:
    study = write_study(tmp_path / "runs", [ERM, FREELB], seeds=2, evaluations=2, num_items=100, unparsed=0.5)
    write_report(study, tmp_path / "report.html", select=rule)
    rows = pq.read_table(tmp_path / "report_files" / "attacks.parquet").to_pylist()
    (row,) = (one for one in rows if (one["condition"], one["attack"]) == ("erm", "pwws"))
    statuses: Counter[str] = Counter()
    queries = 0
    for run in load_study(study).runs:
        if run.condition != "erm":
            continue
        epoch = select(run, rule).evaluation.epoch
        for record in read_records(run.folder).to_pylist():
            half = Items([record["item_id"]], np.zeros(1, np.int32)).half[0]
            asked = (record["attack"], record["epoch"]) == ("pwws", epoch)
            if asked and not (rule == "clean" and half):
                statuses[record["status"]] += 1
                queries += record["queries"]
    assert {name: row[name] for name in statuses} == dict(statuses)
    assert row["answers"] == statuses.total() == 2 * row["num_items"]
    assert row["queries"] == queries
    assert row["num_items"] < 100 if rule == "clean" else row["num_items"] == 100
    assert row["accuracy"] == pytest.approx(statuses["failed"] / statuses.total())


@pytest.mark.parametrize("rule", ["last", "joint"])
def test_every_table_names_its_selection(rule: Rule, tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "runs",
        [ERM, FREELB],
        seeds=1,
        evaluations=3,
        num_items=60,
        doubts=[{"message": "doubtful"}],
    )
    write_report(study, tmp_path / "report.html", select=rule)
    named = {}
    for path in (tmp_path / "report_files").glob("*.parquet"):
        (named[path.stem],) = {row["selection"] for row in pq.read_table(path).to_pylist()}
    whole = {"cost", "evaluations"}
    assert {name for name, selection in named.items() if selection != rule} == whole
    assert {"problems", "verdicts", "attacks", "accuracies"} <= named.keys()
    assert {named[name] for name in whole} == {"all evaluations, on all items"}
    rows = pq.read_table(tmp_path / "report_files" / "evaluations.parquet").to_pylist()
    reported = {(row["run"], row["epoch"]) for row in rows if row["reported"]}
    assert reported == {(run.name, select(run, rule).evaluation.epoch) for run in load_study(study).runs}


def test_doubts_are_said_once_for_all_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path, [ERM, FREELB], seeds=3, evaluations=1, num_items=40)
    for number, name in enumerate(("erm-seed0", "erm-seed1", "erm-seed2", "freelb-seed0", "freelb-seed1")):
        same, own = {"message": "the model is weak"}, {"message": f"breaks {40 + number} of 100 (0.{number})"}
        rewrite(study, name, doubts=[same, own])
    rewrite(study, "freelb-seed2", doubts=[{"message": "masked"}])
    found = [one for one in contents(study).problems if re.search("weak|breaks|masked", one)]
    who = "5 runs (erm-seed0, erm-seed1, erm-seed2 and 2 more)"
    assert found == [
        f"{who}: the model is weak",
        f"{who}, each with numbers of its own. erm-seed0: breaks 40 of 100 (0.0)",
        "freelb-seed2: masked",
    ]


@pytest.mark.parametrize(
    "defenses", [["MyDefense"], [{"name": "MyDefense", "settings": {}}]], ids=["text", "no aim"]
)
def test_a_defense_without_an_aim_is_said_and_how_to_declare_it(defenses: list[Any], tmp_path: Path) -> None:
    study = write_study(tmp_path / "runs", [ERM, FREELB], seeds=2, evaluations=1, num_items=40)
    rewrite(study, "freelb", defenses=defenses)
    text = read(write_report(study, tmp_path / "report.html")).text
    assert "There is no verdict: what the defenses of freelb aim at is not declared." in text
    assert "`aim` is a class attribute of a Defense" in text
    assert '"adversarial", "ood" or "both"' in text
    assert "aim at both kinds" not in text
    assert "Aim not declared" in text


def test_beside_verdicts_a_defense_without_an_aim_is_a_problem(tmp_path: Path) -> None:
    study = write_study(tmp_path, [ERM, FREELB, Plan("mine", "both")], seeds=2, evaluations=1, num_items=40)
    assert not any("not declared" in one for one in contents(study).problems)
    rewrite(study, "mine", defenses=["Mine"])
    found = contents(study)
    assert found.verdicts
    assert any(
        "the defenses of mine aim at is not declared: no verdict counts them" in one for one in found.problems
    )


@pytest.mark.parametrize(
    ("key", "label", "shown"),
    [
        ("attack/embedding_pgd", "embedding_pgd", "embedding_pgd (on embeddings)"),
        ("attack/embedding_pgd on imdb", "embedding_pgd on imdb", "embedding_pgd on imdb (on embeddings)"),
        ("attack/pwws on imdb", "pwws on imdb", "pwws on imdb"),
        ("ood/embedding_pgd", "embedding_pgd", "embedding_pgd"),
    ],
)
def test_attacks_on_embeddings_are_known_in_any_environment(key: str, label: str, shown: str) -> None:
    assert title(Column(key, label, "adv")) == shown


def test_an_attack_and_a_shift_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name, levels, defenses in (
        ("erm", (0.3, 0.8), []),
        ("fgm", (0.5, 0.7), [{"name": "FGM", "aim": "adversarial"}]),
    ):
        parts = {"clean/clean": 0.9, "adversarial/imdb": levels[0], "ood/imdb": levels[1]}
        for seed in range(2):
            write_run(
                tmp_path / f"{name}{seed}",
                f"{name}-seed{seed}",
                [parts],
                num_items=100,
                seed=seed,
                defenses=defenses,
            )
    found = contents(tmp_path)
    assert [column.label for column in found.columns][1:] == [
        "Adversarial",
        "imdb (adversarial)",
        "OOD (mean)",
        "imdb (OOD)",
    ]
    (row,) = (row for _, rows in found.backbones[0].heat.groups for row in rows)  # type: ignore[union-attr]
    effects = [one.delta for one in found.matrix.cells[0] if one]
    assert [cell.value for cell in row.cells] == effects
    text = read(write_report(tmp_path, tmp_path / "report.html")).text
    assert "«Adversarial» is the mean of the static adversarial benchmarks" in text
    assert "No attack ran; nothing is known" in text


def test_a_cell_of_fewer_seeds_than_its_row_is_marked(tmp_path: Path) -> None:
    for name, defenses in (("erm", []), ("fgm", [{"name": "FGM", "aim": "adversarial"}])):
        for seed in range(3):
            parts = PLAIN | ({"attack/bae": 0.4} if seed == 0 else {})
            write_run(
                tmp_path / f"{name}{seed}",
                f"{name}-seed{seed}",
                [parts],
                num_items=100,
                seed=seed,
                defenses=defenses,
            )
    text = read(write_report(tmp_path, tmp_path / "report.html")).text
    assert "1 seed only, unlike the rest of the row" in text
    assert re.search(r"\[-?\+?\d+\.\d, \S+\]", text[text.index("What the defenses change") :])
    html = (tmp_path / "report.html").read_text()
    (cell,) = re.findall(
        r"<td[^>]*>([^<]*)<[^>]*>[^<]*(?:<[^>]*>)?<sup>a</sup>|<td[^>]*>(\S+)<sup>a</sup><span", html
    )
    assert re.fullmatch(r"[+-]\d+\.\d", "".join(cell).strip())


def test_tables_have_all_columns_whichever_row_comes_first(tmp_path: Path) -> None:
    files = table_files("t", [{"a": 1}, {"a": 2, "b": 3}])
    (tmp_path / "t.parquet").write_bytes(files["t.parquet"])
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": 3}]


def test_texts_that_a_spreadsheet_would_run_are_quoted_and_those_without_encoding_replaced() -> None:
    files = table_files("t", [{"name": "=1+1", "change": -0.5}, {"name": "\ud800", "change": 0.5}])
    assert files["t.csv"].decode() == '"name","change"\n"\'=1+1",-0.5\n"?",0.5\n'
    assert pq.read_table(io.BytesIO(files["t.parquet"]))["name"].to_pylist() == ["=1+1", "?"]


def test_a_page_that_cannot_be_put_in_place_leaves_the_earlier_files(
    tmp_path: Path, monkeypatch: Any
) -> None:
    page, folder = tmp_path / "r.html", tmp_path / "r_files"
    write_bundle(page, "old", {"a.csv": b"old", "b.csv": b"old"})
    (folder / "mine.txt").write_text("mine")
    replace, calls = os.replace, []

    def fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:  # the new folder
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(RecordsError):
            write_bundle(page, "new", {"a.csv": b"new"})
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".csv"} == {
        "a.csv": b"old",
        "b.csv": b"old",
    }
    assert (page.read_text(), (folder / "mine.txt").read_text()) == ("old", "mine")
    write_bundle(page, "new", {"a.csv": b"new"})
    assert sorted(file.name for file in folder.iterdir()) == ["a.csv", "files.json", "mine.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.html", "r_files"]
