"""`lightning-robust compare` and `lightning-robust power` on synthetic runs."""

from __future__ import annotations

import re
import shutil

import pytest

from lightning_robust.cli import main
from tests.results.synthetic import write_run

PLAIN = {
    "clean/clean": 0.85,
    "attack/deepwordbug": 0.2,
    "attack/pwws": 0.15,
    "ood/yelp": 0.7,
    "ood/imdb": 0.6,
}
ROBUST = {**PLAIN, "attack/deepwordbug": 0.6, "attack/pwws": 0.5}
FGM = [{"name": "FGM", "aim": "adversarial", "settings": {"epsilon": 0.2}}]


def write(folder, name, levels, *, seeds=(0, 1, 2), defenses=(), **settings):
    for seed in seeds:
        info = {"seed": seed, "defenses": list(defenses), **settings}
        write_run(folder / f"{name}-seed{seed}", f"{name}-seed{seed}", [levels], num_items=200, **info)
    return folder


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "erm", "erm", PLAIN)
    write(tmp_path / "fgm", "fgm", ROBUST, defenses=FGM)
    return tmp_path


def call(capsys, *arguments):
    code = main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_compare_seeds_of_two_methods(runs, capsys):
    code, text = call(capsys, "compare", runs / "erm", runs / "fgm")
    assert code == 0
    assert "3 pairs of training runs: intervals are about the method" in text
    assert re.search(
        r"deepwordbug \d+\.\d \d+\.\d \+\d+\.\d (< )?0\.0\d\d 200 "
        r"\[\d+\.\d, \d+\.\d\] \[\d+\.\d, \d+\.\d\] \[\+\d+\.\d, \+\d+\.\d\] pwws",
        text,
    )
    assert "Transfer from adversarial to OOD robustness: inconclusive" in text
    assert "seeds and" in text
    assert "Always answering the most frequent label would score 50.0 (Clean, Adversarial" in text


def test_compare_two_runs_says_what_one_run_can_show(runs, capsys):
    _, text = call(capsys, "compare", runs / "erm" / "erm-seed0", runs / "fgm" / "fgm-seed0")
    assert "about these two runs, not about the method" in text
    assert "one seed shows one training run" in text


def test_compare_two_seeds_of_one_recipe(runs, capsys):
    code, text = call(capsys, "compare", runs / "erm" / "erm-seed0", runs / "erm" / "erm-seed1")
    assert code == 0
    assert "B needs defenses of one aim" in text
    assert re.search(r"OOD \(mean\) .{1,40} 400 ", text)  # OOD mean: two environments of 200


def test_compare_says_what_is_paired_with_what(runs, capsys):
    same = runs / "erm" / "erm-seed0"
    _, text = call(capsys, "compare", same, same)
    assert "A and B share erm-seed0: a run does not differ from itself." in text
    _, text = call(capsys, "compare", same, runs / "fgm" / "fgm-seed1")
    assert "A and B have no seed in common (0; 1): runs are paired in order." in text
    shutil.rmtree(runs / "fgm" / "fgm-seed2")
    _, text = call(capsys, "compare", runs / "erm", runs / "fgm")
    assert "Only runs of seeds that A and B share are compared (0, 1, 2; 0, 1)." in text
    assert "share erm" not in text
    assert "seed in common" not in text


def test_compare_says_which_attacks_it_left_out(runs, tmp_path, capsys):
    fewer = {key: level for key, level in ROBUST.items() if key not in ("attack/pwws", "ood/imdb")}
    write(tmp_path / "fewer", "fgm", fewer, defenses=FGM)
    _, text = call(capsys, "compare", runs / "erm", tmp_path / "fewer")
    assert "Not in the table, as A and B have no items in common there: pwws, imdb." in text
    assert (
        "Adversarial accuracy is made from deepwordbug; it leaves out pwws (not measured in all runs of fgm)."
        in text
    )
    assert "OOD accuracy is made from yelp; it leaves out imdb (not measured in all runs of fgm)." in text
    levels = [re.search(name + r" ([\d.]+ [\d.]+) ", text)[1] for name in ("Adversarial", "deepwordbug")]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("margin", ["0", "100", "-1", "nan"])
def test_a_margin_is_in_points(runs, margin, capsys):
    for command in (("compare", runs / "erm", runs / "fgm"), ("report", runs, "-o", runs / "r.html")):
        code, text = call(capsys, *command, f"--margin={margin}")
        assert code == 1
        assert f"Expected --margin to be between 0 and 100 points, but got {margin}." in text
    assert not (runs / "r.html").exists()


def test_compare_names_a_rule_that_peeks(runs, capsys):
    _, text = call(capsys, "compare", runs / "erm", runs / "fgm", "--select", "oracle")
    assert "this peeks" in text


def test_compare_says_when_a_gain_is_that_of_a_constant_answer(runs, tmp_path, capsys):
    constant = dict.fromkeys(PLAIN, 0.5)
    write(
        tmp_path / "collapsed", "coral", constant, defenses=[{"name": "CORAL", "aim": "ood", "settings": {}}]
    )
    _, text = call(capsys, "compare", runs / "erm", tmp_path / "collapsed")
    assert "hardly better on clean items than a constant answer" in text


def test_compare_refuses_a_study_and_runs_without_common_items(runs, tmp_path, capsys):
    code, text = call(capsys, "compare", runs, runs / "fgm")
    assert code == 1
    assert "it holds: erm, fgm" in text
    write(tmp_path / "other", "other", {"ood/amazon": 0.5}, seeds=[0])
    code, text = call(capsys, "compare", runs / "erm", tmp_path / "other")
    assert code == 1
    assert "no item in common" in text
    code, text = call(capsys, "compare", runs / "erm", tmp_path / "missing")
    assert code == 1
    assert "does not exist" in text


def test_power_assumes_or_measures(runs, capsys):
    code, text = call(capsys, "power", "--effect", "3")
    assert code == 0
    assert text.startswith("Assumed:")
    assert re.search(
        r"An effect of 3 points is seen with a probability of 80 % by .* seeds with [\d,]+ items", text
    )
    code, text = call(capsys, "power", runs, "--effect", "3")
    assert code == 0
    assert "Adversarial: spread as measured, mean of 1 defense; that of seeds as its upper 80 % bound" in text
    assert "OOD (mean): spread as measured" in text


def test_power_of_one_seed_is_refused(tmp_path, capsys):
    write(tmp_path / "erm", "erm", PLAIN, seeds=[0])
    write(tmp_path / "fgm", "fgm", ROBUST, seeds=[0], defenses=FGM)
    code, text = call(capsys, "power", tmp_path)
    assert code == 1
    assert "two seeds or more" in text


@pytest.mark.parametrize(
    "option", ["--effect=0", "--power=100", "--power=20", "--changed=0", "--seed-spread=-1"]
)
def test_power_refuses_numbers_that_make_no_sense(option, capsys):
    code, text = call(capsys, "power", option)
    assert code == 1
    assert f"Expected {option.partition('=')[0]} to be between" in text


def test_a_bar_is_on_terminals_only_and_leaves_nothing_behind(runs, tmp_path, capsys, monkeypatch):
    command = ["report", str(runs), "-o", str(tmp_path / "report.html")]
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "Making the report" in shown
    assert "6/6" in shown
    assert shown.rstrip().endswith("\x1b[2K")


def test_compare_gives_no_verdict_on_a_constant_answer(runs, capsys):
    write(runs / "constant", "constant", dict.fromkeys(PLAIN, 0.5), defenses=FGM)
    _, text = call(capsys, "compare", runs / "erm", runs / "constant")
    assert "constant (" in text
    assert "No verdict on transfer: a constant answer is not robust." in text
    assert "inconclusive" not in text


def test_power_plans_no_fewer_items_than_intervals_need(capsys):
    _, text = call(capsys, "power", "--effect", "40")
    assert "30 items" in text
    assert not re.search(r"with [12]?\d items", text)


def test_power_does_not_plan_from_runs_that_show_no_spread(tmp_path, capsys):
    few = {key: value for key, value in PLAIN.items() if key in ("clean/clean", "ood/imdb")}
    for name, defenses in (("erm", []), ("fgm", FGM)):
        for seed in range(2):
            info = {"seed": seed, "defenses": defenses}
            write_run(tmp_path / f"{name}-seed{seed}", f"{name}-seed{seed}", [few], num_items=6, **info)
    code, text = call(capsys, "power", "--effect", "2", tmp_path)
    assert code == 1
    assert "30 items or more and some answers that differ" in text


def test_compare_says_which_numbers_rest_on_fewer_runs(runs, capsys):
    without = {key: value for key, value in ROBUST.items() if key != "ood/imdb"}
    write(runs / "some", "some", ROBUST, seeds=(0,), defenses=FGM)
    write(runs / "some", "some", without, seeds=(1, 2), defenses=FGM)
    _, text = call(capsys, "compare", runs / "erm", runs / "some")
    assert "imdb: of 1 of 3 pairs of runs only" in text


def test_an_output_that_ends_in_a_separator_is_a_folder(runs, tmp_path, capsys):
    assert main(["report", str(runs / "erm"), "-o", f"{tmp_path}/new/"]) == 0
    assert (tmp_path / "new" / "report.html").is_file()
