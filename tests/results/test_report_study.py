"""What the report of a study says, and the files beside it."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from lightning_robust.errors import ConfigError
from lightning_robust.results import RecordsError, load_study, transfer_matrix, write_report
from lightning_robust.results.report import bundle
from lightning_robust.results.report.content import look
from lightning_robust.results.report.formats import change
from tests.results.synthetic import write_run
from tests.results.synthetic_study import PARTS, Plan, grid, write_study
from tests.results.test_report import Page

ERM = Plan("erm")
FREELB = Plan("freelb", "adversarial", {"attack": 0.25, "ood": 0.1})


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in page.text.lower().replace(",", " ").replace("[", " ").split()
    return page


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "runs", grid(6), num_items=200, unparsed=0.3)


@pytest.fixture(scope="module")
def page(study: Path) -> Path:
    return write_report(study, study.parent / "report.html")


@pytest.mark.parametrize(
    ("ood", "label", "words"),
    [
        (0.1, "positive", ", and raised OOD robustness too."),
        (-0.1, "negative", ", and lowered OOD robustness."),
        (0.0, "inconclusive", "it cannot be told yet"),
    ],
)
def test_the_verdict_comes_first(ood: float, label: str, words: str, tmp_path: Path) -> None:
    plans = [ERM, Plan("freelb", "adversarial", {"attack": 0.25, "ood": ood})]
    write_study(tmp_path / "runs", plans, evaluations=1, num_items=400)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    assert text.index(label) < text.index(words) < text.index("It rests on freelb against erm; 3 seeds, 400")
    assert text.index("It rests on") < text.index("Over the training")
    assert "With all-MiniLM-L6-v2" in text
    if label != "inconclusive":
        assert re.search(
            r"the defense aimed at adversarial robustness raised it by \+\d+\.\d points, and", text
        )


def test_a_wide_margin_makes_neutral(tmp_path: Path) -> None:
    plans = [ERM, Plan("freelb", "adversarial", {"attack": 0.25})]
    write_study(tmp_path / "runs", plans, evaluations=1, num_items=400)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html", margin=0.1)).text
    assert "left OOD robustness unchanged within ±10 points" in text


def test_one_seed_is_no_evidence_on_a_method(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", [ERM, FREELB], seeds=1, evaluations=1)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    assert "inconclusive" in text
    assert "with three seeds or more" in text


@pytest.mark.parametrize(
    ("plans", "parts", "words"),
    [
        ([ERM], PARTS, "this page is about runs of one kind"),
        ([FREELB, Plan("vrex", "ood")], PARTS, "no condition is a baseline for the others"),
        ([ERM, Plan("hybrid", "both", {"attack": 0.2})], PARTS, "aim at both kinds of robustness"),
        ([ERM, FREELB], {"clean/clean": 0.9, "attack/pwws": 0.3}, "OOD accuracy was measured in no run"),
        ([ERM, FREELB], {"clean/clean": 0.9, "ood/yelp": 0.8}, "adversarial accuracy was measured in no run"),
    ],
    ids=["one condition", "no baseline", "both", "no OOD", "no adversarial"],
)
def test_no_verdict_is_said_and_why(
    plans: list[Plan], parts: dict[str, float], words: str, tmp_path: Path
) -> None:
    write_study(tmp_path / "runs", plans, seeds=2, evaluations=2, num_items=40, parts=parts)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    assert text.index("no verdict") < text.index(words) < text.index("Over the training")
    assert "went from its first evaluation (epoch 0) to its last (epoch 1)" in text


def test_the_matrix_shows_every_interval_and_marks_what_is_told_from_zero(study: Path, page: Path) -> None:
    matrix, text = transfer_matrix(load_study(study)), read(page).text.replace(" ▲", "").replace(" ▼", "")
    assert len(matrix.conditions) == 6
    for row in matrix.cells:
        for effect in row:
            assert effect is not None
            assert change(effect) in text
    marked = int((matrix.adjusted < 0.05).sum())
    assert 0 < marked < matrix.adjusted.size
    shown = page.read_text(encoding="utf-8")
    assert len(re.findall(r'<td class="heat-[np]?\d strong"', shown)) == marked
    assert len(re.findall(r'aria-label="told from no change', shown)) == marked


def test_numbers_without_interval_are_reasons(tmp_path: Path) -> None:
    parts = {**PARTS, "adversarial/few": 0.5}
    write_study(tmp_path / "runs", [ERM, FREELB], parts=parts, sizes={"adversarial/few": 12}, evaluations=1)
    html = write_report(tmp_path / "runs", tmp_path / "report.html").read_text(encoding="utf-8")
    row = html[html.index('<th scope="row">1. freelb' if "1. freelb" in html else '<th scope="row">freelb') :]
    cells = re.findall(r"<td class=\"([^\"]*)\"[^>]*>(.*?)</td>", row[: row.index("</tr>")])
    assert [css for css, _ in cells].count("hatched") == 1
    assert all(("interval" in cell) != (css == "hatched") for css, cell in cells)
    assert not re.search(r"\d", next(cell for css, cell in cells if css == "hatched"))
    assert "12 common items are too few for an interval" in html
    pq_rows = pq.read_table(tmp_path / "report_files" / "transfer-matrix.parquet").to_pylist()
    assert "too few" in next(row["reason"] for row in pq_rows if row["column"] == "adversarial/few")


def test_every_caption_names_the_selection(study: Path, tmp_path: Path) -> None:
    html = write_report(study, tmp_path / "report.html", select="joint").read_text(encoding="utf-8")
    rule = "best harmonic mean of clean, adversarial and OOD accuracy on one half of the items"
    captions = re.findall(r"<caption>.*?</caption>", html, flags=re.DOTALL)
    assert len(captions) == 5
    without = [caption for caption in captions if rule not in caption]
    assert ["whichever are reported" in caption for caption in without] == [True]  # cost
    assert html.count(rule) >= len(captions) + 4


def test_wrong_settings_are_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="last, clean, joint, oracle"):
        write_report(study, tmp_path / "report.html", select="best")  # type: ignore[arg-type]
    with pytest.raises(RecordsError, match="baseline"):
        write_report(study, tmp_path / "report.html", baseline="nobody")
    assert list(tmp_path.iterdir()) == []


def test_coverage_and_doubts_are_shown(page: Path, tmp_path: Path) -> None:
    text = read(page).text
    assert "Items without a usable answer, of all seeds together. They count as wrong." in text
    write_study(tmp_path / "runs", [ERM], seeds=1, num_items=40, doubts=[{"message": "gradients are masked"}])
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    assert "erm-seed0: gradients are masked" in text
    assert "Every item got a usable answer" in text


def test_tables_and_figures_are_files_too(page: Path) -> None:
    folder = page.with_name("report_files")
    names = {file.name for file in folder.iterdir()}
    assert set(json.loads((folder / "files.json").read_text())) == names - {"files.json"}
    for figure in ("curves-clean", "curves-adv", "curves-ood-mean", "plane", "transfer-matrix", "changes"):
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{figure}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    for table in (
        "verdicts",
        "transfer-matrix",
        "correlations",
        "accuracies",
        "attacks",
        "evaluations",
        "cost",
    ):
        rows = pq.read_table(folder / f"{table}.parquet")
        assert pacsv.read_csv(folder / f"{table}.csv").num_rows == rows.num_rows > 0
    evaluations = pq.read_table(folder / "evaluations.parquet")
    assert evaluations.num_rows == 7 * 3 * 4 * len(PARTS)
    assert {"erm-seed0", "hybrid1-seed2"} <= set(evaluations["run"].to_pylist())
    assert len(json.loads((folder / "runs.json").read_text(encoding="utf-8"))) == 21


def test_a_failure_leaves_the_old_report_and_nothing_else(
    study: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "notes.txt").write_text("mine")
    content = {"a.csv": b"1", "b.csv": b"2"}
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "b.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(RecordsError, match="Free some space"):
            bundle.write_bundle(tmp_path / "report.html", "new", content)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "report.html", "report_files", "report_files/notes.txt",
    ]  # fmt: skip


def test_a_new_report_replaces_its_own_files_only(tmp_path: Path) -> None:
    folder = tmp_path / "report_files"
    bundle.write_bundle(tmp_path / "report.html", "one", {"a.csv": b"1", "b.csv": b"1"})
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "outside").write_text("mine too")
    listed = json.loads((folder / "files.json").read_text())
    (folder / "files.json").write_text(json.dumps([*listed, "../outside", 3]))
    bundle.write_bundle(tmp_path / "report.html", "two", {"b.csv": b"2", "c.csv": b"2"})
    assert sorted(file.name for file in folder.iterdir()) == ["b.csv", "c.csv", "files.json", "notes.txt"]
    assert (folder / "b.csv").read_bytes() == b"2"
    assert (tmp_path / "outside").exists()
    assert (tmp_path / "report.html").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_in_the_way_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "report_files").write_text("a file")
    with pytest.raises(RecordsError, match="to be a folder"):
        bundle.write_bundle(tmp_path / "report.html", "page", {})
    assert not (tmp_path / "report.html").exists()


def test_what_runs_share_is_said_once(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    made = html[html.index('id="made"') :]
    assert made.count("torch: 2.13.0") == 1
    assert made.count("epsilon: 0.1") == 6  # one for each defense
    assert made.count("recipe.seed_everything: 2") == 7  # one for each condition's third run


def test_many_conditions_stay_readable(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", grid(12), seeds=1, evaluations=2, num_items=40)
    content = look(load_study(tmp_path / "runs"), "last", 0.01)
    (backbone,) = content.backbones
    assert backbone.hidden
    assert 2 <= len(backbone.legend) <= 4
    assert backbone.legend[0][1] == "erm"
    assert {name for _, name in backbone.changes_legend} == {
        "aim at adversarial robustness", "aim at both", "aim at OOD robustness",
    }  # fmt: skip
    accuracies = {
        name: trace[-1].scores["adv"].effect.delta for name, trace in backbone.traces.items() if name != "erm"
    }
    assert max(accuracies, key=lambda name: accuracies[name]) in {name for _, name in backbone.legend}


def test_a_seed_that_stopped_early_ends_the_curve_and_is_named(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", [ERM], seeds=2, evaluations=3, num_items=40)
    next((tmp_path / "runs" / "00-1" / "records").glob("epoch=002*")).unlink()
    content = look(load_study(tmp_path / "runs"), "last", 0.01)
    assert [moment.epoch for moment in content.backbones[0].traces["erm"]] == [0, 1]
    assert any("Stopped early" in problem and "erm-seed1" in problem for problem in content.problems)
    assert (
        "to the last that all seeds have (epoch 1)"
        in read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    )


@pytest.mark.parametrize("defenses", [1, 4])
def test_attacks_on_embeddings_are_told_apart(defenses: int, tmp_path: Path) -> None:
    parts = {"clean/clean": 0.9, "attack/pwws": 0.5, "attack/embedding_pgd": 0.1, "ood/yelp": 0.8}
    write_study(tmp_path / "runs", grid(defenses), seeds=1, evaluations=1, num_items=40, parts=parts)
    text = read(write_report(tmp_path / "runs", tmp_path / "report.html")).text
    assert text.count("embedding_pgd (on embeddings)") == 2  # the matrix and the accuracies


def test_backbones_stand_apart(tmp_path: Path) -> None:
    other: list[Any] = [Plan("plain", backbone="bert"), Plan("fgm", "adversarial", {"attack": 0.2}, "bert")]
    write_study(tmp_path / "runs", [ERM, FREELB, *other], seeds=2, evaluations=2, num_items=40)
    page = write_report(tmp_path / "runs", tmp_path / "report.html")
    text = read(page).text
    assert text.index("With all-MiniLM-L6-v2") < text.index("With bert") < text.index("Over the training")
    assert "It rests on fgm against plain" in text
    names = {file.name for file in page.with_name("report_files").iterdir()}
    assert {"plane-1.svg", "plane-2.svg", "transfer-matrix-2.png"} <= names


def test_the_gains_of_a_constant_answer_are_neither_coloured_nor_marked(tmp_path: Path) -> None:
    plain = {"clean/clean": 0.85, "attack/deepwordbug": 0.2, "ood/yelp": 0.7}
    for name, levels, aims in (
        ("erm", plain, ()),
        ("fgm", {**plain, "attack/deepwordbug": 0.8}, ("adversarial",)),
        ("coral", dict.fromkeys(plain, 0.5), ("ood",)),
    ):
        for seed in range(3):
            defenses = [{"name": name.upper(), "aim": aim, "settings": {}} for aim in aims]
            folder = tmp_path / "study" / f"{name}-seed{seed}"
            write_run(folder, folder.name, [levels], num_items=150, seed=seed, defenses=defenses)
    html = write_report(tmp_path / "study", tmp_path / "r.html").read_text("utf-8")
    matrix = html[html.index('<table class="heat">') :]
    rows = {
        name: re.search(rf"<tr><th[^>]*>[^<]*{name}.*?</tr>", matrix, re.DOTALL) for name in ("fgm", "coral")
    }
    assert rows["fgm"] is not None
    assert rows["coral"] is not None
    assert "▲" in rows["fgm"][0]
    assert "▲" not in rows["coral"][0]
    assert rows["coral"][0].count('<td class="hatched"') == rows["coral"][0].count("<td ")
    assert "counted in no verdict" in html
