from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import replace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console

from lightning_robust.callbacks import console_table
from lightning_robust.callbacks.console_table import Terminal, render, rows
from lightning_robust.results import groups, metrics, transfer_deltas
from lightning_robust.results.statistics import accuracy, effect
from tests.callbacks.test_monitor import monitor
from tests.foreign import PlainEncoder, loader
from tests.results.synthetic import evaluation

FIRST = {
    "clean/clean": 0.7,
    "attack/deepwordbug": 0.3,
    "attack/pwws": 0.4,
    "adversarial/typos": 0.5,
    "ood/a": 0.6,
    "ood/b": 0.7,
}
THEN = {**FIRST, "clean/clean": 0.8, "attack/pwws": 0.6, "ood/a": 0.5, "ood/new": 0.4}


def drawn(table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def points(one, number: str) -> str:
    delta, low, high = (number.format(100 * value) for value in (one.delta, one.low, one.high))
    return f"{delta} [{low}, {high}]"


def test_rows_agree_with_the_metrics_that_are_logged() -> None:
    before, after = evaluation("run", 0, 1, FIRST), evaluation("run", 1, 2, THEN)
    found = {row.name: row for row in rows(after, before)}
    assert list(found) == [
        "clean", "adv/deepwordbug", "adv/pwws", "adv (worst case)", "adv/typos", "ood/a", "ood/b", "ood/new",
        "ood (mean)",
    ]  # fmt: skip
    values = metrics(after) | transfer_deltas(before, after)
    keys = {
        "clean": "clean/accuracy",
        "adv/pwws": "adv/pwws/accuracy",
        "adv (worst case)": "adv/accuracy",
        "adv/typos": "adv/typos/accuracy",
        "ood/b": "ood/b/accuracy",
        "ood (mean)": "ood/accuracy",
    }
    for name, key in keys.items():
        assert found[name].accuracy.delta == pytest.approx(values[key]), name
    for name, measure in (("adv (worst case)", "adv"), ("ood (mean)", "ood")):
        changed = found[name].change
        assert changed is not None
        ends = [values[f"transfer/{measure}_{end}"] for end in ("delta", "low", "high")]
        assert [changed.delta, changed.low, changed.high] == pytest.approx(ends)
    was, now = groups(before)["ood", "a"], groups(after)["ood", "a"]
    assert found["ood/a"].change == effect(now.correct, was.correct)
    assert found["ood/a"].accuracy == accuracy(now.correct)
    assert found["ood/new"].change is None
    assert found["ood (mean)"].accuracy.num_items == 300


def test_a_change_from_a_constant_answer_has_no_ratio_and_is_marked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    constant = [replace(one, predicted=1, correct=one.label == 1) for one in evaluation("run", 0, 1, FIRST)]
    constant = [
        replace(one, status="failed" if one.correct else "skipped") if one.attack else one for one in constant
    ]
    useful, then = evaluation("run", 0, 1, FIRST), evaluation("run", 1, 2, {**FIRST, "attack/pwws": 0.9})
    assert not math.isnan(
        transfer_deltas(useful, evaluation("run", 1, 2, THEN | {"attack/deepwordbug": 0.9}))["transfer/ratio"]
    )
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for before, after, marked in ((constant, then, True), (useful, constant, False)):
        deltas = transfer_deltas(before, after)
        assert deltas["transfer/adv_low"] > 0 or deltas["transfer/adv_high"] < 0
        assert math.isnan(deltas["transfer/ratio"])
        console_table.show_evaluation(trainer, True, "", after, before)
        assert ("constant answer" in capsys.readouterr().err.replace("\n", " ")) is marked


def test_a_single_attack_or_environment_has_no_second_row_for_its_mean() -> None:
    single = evaluation("run", 0, 1, {"attack/pwws": 0.4, "adversarial/a": 0.5, "ood/a": 0.3})
    assert [row.name for row in rows(single)] == ["adv/pwws", "adv/a", "ood/a"]
    static = evaluation("run", 0, 1, {"adversarial/a": 0.5, "adversarial/b": 0.3})
    assert [row.name for row in rows(static)] == ["adv/a", "adv/b", "adv (mean)"]
    assert rows(static)[-1].accuracy.delta == pytest.approx(metrics(static)["adv/accuracy"])


@pytest.mark.parametrize("width", [80, 60, 48])
def test_numbers_are_complete_at_every_width(width: int) -> None:
    before, after = evaluation("run", 0, 1, FIRST), evaluation("run", 1, 2, THEN)
    text = drawn(render("Epoch 1", rows(after, before), width), width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows(after, before):
        for cell in points(row.accuracy, "{:.1f}").split(" ", 1):
            assert cell in text
        if row.change is not None:
            for cell in points(row.change, "{:+.1f}").split(" ", 1):
                assert cell in text
    assert "of this training run" in text
    assert "since the first" in text


def test_the_first_evaluation_has_no_changes() -> None:
    text = drawn(render("Epoch 0", rows(evaluation("run", 0, 1, FIRST))))
    assert "change" not in text
    assert "95 % intervals of this training run" in text


def test_too_few_items_say_so_instead_of_an_interval() -> None:
    few = evaluation("run", 0, 1, {"clean/clean": 0.5}, num_items=8)
    text = drawn(render("Epoch 0", rows(few, few)))
    assert "50.0 no interval" in text
    assert "+0.0 no interval" in text
    assert "no interval where 8 items are too few" in " ".join(text.split())
    assert "nan" not in text


def test_other_items_than_at_first_have_no_change() -> None:
    before, after = (evaluation("run", 0, 1, {"clean/clean": 0.5}, num_items=40) for _ in range(2))
    for row in after:
        object.__setattr__(row, "item_id", f"other {row.item_id}")
    assert "no common items" in drawn(render("Epoch 1", rows(after, before)))


def test_names_are_shown_as_they_are() -> None:
    records = evaluation("run", 0, 1, {"ood/[red]x[/red][/nothing]": 0.5, "ood/\x1b[2Jy\nz": 0.5})
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(render("of [bold]vote", rows(records)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ood/[red]x[/red][/nothing]" in text
    assert "of [bold]vote" in text
    assert "\x1b[2J" not in text
    assert "ood/\N{REPLACEMENT CHARACTER}[2Jy\N{REPLACEMENT CHARACTER}z" in text


class Screen(io.StringIO):
    """A terminal that remembers what was written."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


BARS = {
    "tqdm": lambda: [TQDMProgressBar()],
    "rich": lambda: [RichProgressBar()],
    "none": lambda: [],
}


def fit(tmp_path, callbacks, **settings) -> None:
    Trainer(
        accelerator="cpu", max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, **settings,
    ).fit(PlainEncoder(), loader(), loader())  # fmt: skip


@pytest.mark.parametrize("bar", list(BARS))
def test_on_a_terminal_each_evaluation_prints_one_table(tmp_path, monkeypatch, bar: str) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    watch = monitor(tmp_path, progress=None, inference_defenses={"same": lambda victim: victim})
    fit(tmp_path, [*BARS[bar](), watch], enable_progress_bar=bar != "none")
    text = screen.getvalue()
    for title in ("Epoch 0, accuracy", "Epoch 1, accuracy"):
        assert text.count(f"{title} of same") == 1
        assert text.count(title) == 2
    assert text.count("ood (mean)") == 4
    assert text.count("since the first evaluation") == 2
    if bar == "tqdm":
        # The bars' lines are blanked before the table, and drawn again after it.
        before, after = text.split("Epoch 1, accuracy", 1)
        assert re.search(r"\r {20,}\r(\x1b\[A)?(\x1b\[[0-9;]*m)*$", before), repr(before[-200:])
        assert "Epoch 1: 100%" in after.split("of same")[0].split("since the first")[1]


@pytest.mark.parametrize(("progress", "tables"), [(None, 0), (False, 0), (True, 2)])
def test_where_nothing_is_a_terminal_logs_stay_clean(tmp_path, capsys, caplog, progress, tables: int) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(tmp_path, [monitor(tmp_path, progress=progress)], enable_progress_bar=False)
    out, err = capsys.readouterr()
    assert out.count("ood (mean)") == 0
    assert err.count("ood (mean)") == tables
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Epoch")]
    assert len(lines) == (0 if tables else 2)
    if not tables:
        assert lines[0].startswith("Epoch 0, accuracy: clean 0.")
        assert " · adv " in lines[0]
        assert " · ood " in lines[0]


@pytest.mark.parametrize("error", [BrokenPipeError(), UnicodeEncodeError("ascii", "ä", 0, 1, "no")])
def test_a_terminal_that_fails_stops_nothing(tmp_path, monkeypatch, error: Exception) -> None:
    class Gone(Screen):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(console_table, "_console", lambda bar, progress: Terminal(file=Gone(), width=80))
    watch = monitor(tmp_path)
    fit(tmp_path, [watch], enable_progress_bar=False)
    assert len(watch._predictors[0].path) == 2
