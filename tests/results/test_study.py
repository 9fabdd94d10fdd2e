from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_robust.results import (
    RecordsError,
)
from lightning_robust.results.study import (
    columns,
    load_study,
)
from tests.results.studies import FGM, LEVELS, VOTE, condition, make_run, make_study, said
from tests.results.synthetic import evaluation


def test_a_study_without_faults(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    assert [(one.name, one.aim, one.seeds) for one in study.conditions] == [
        ("erm", "none", [0, 1]),
        ("fgm", "adversarial", [0, 1]),
        ("vrex", "ood", [0, 1]),
    ]
    assert {one.backbone for one in study.conditions} == {"minilm"}
    assert [run.name for run in study.runs][:3] == ["erm-seed0", "erm-seed1", "fgm-seed0"]
    assert [run.condition for run in study.runs][:3] == ["erm", "erm", "fgm"]
    erm = condition(study, "erm")
    assert study.baseline(erm) is None
    assert study.baseline(condition(study, "fgm")) is study.baseline(condition(study, "vrex")) is erm
    assert [column.key for column in columns(study)] == [
        "clean", "adv", "adv_mean", "attack/deepwordbug", "attack/pwws", "attack/embedding_pgd",
        "adversarial/advglue", "ood_mean", "ood/imdb", "ood/yelp",
    ]  # fmt: skip
    assert study.problems == []


def test_conditions_are_the_same_recipe_but_for_seeds_and_places(tmp_path: Path) -> None:
    def recipe(seed: int, weight: float) -> dict[str, Any]:
        monitor = {"class_path": "lightning_robust.callbacks.RobustnessMonitor", "init_args": {"seed": seed}}
        monitor["init_args"]["records_dir"] = f"out/{seed}"
        return {
            "seed_everything": seed,
            "model": {"init_args": {"backbone": {"path": "minilm", "seed": seed}}},
            "data": {
                "init_args": {"batch_size": 32, "seed": seed, "train": [{"path": "sst2", "seed": seed}]}
            },
            "trainer": {
                "callbacks": [{"class_path": "FGM", "init_args": {"weight": weight}}, monitor],
                "default_root_dir": f"out/{seed}",
                "logger": bool(seed % 2),
                "enable_progress_bar": bool(seed % 2),
            },
        }

    for seed, weight in ((0, 1.0), (1, 1.0), (0, 2.0), (1, 2.0)):
        make_run(
            tmp_path, f"{seed}-{weight}", seed=None, recipe=recipe(seed, weight),
            defenses=[{**FGM, "settings": {"weight": weight, "seed": seed}}], name=f"lightning_logs/version_{seed}",
        )  # fmt: skip
    study = load_study(tmp_path)
    assert [(one.name, one.seeds) for one in study.conditions] == [
        ("FGM (weight=1.0)", [0, 1]),
        ("FGM (weight=2.0)", [0, 1]),
    ]
    assert len({run.name for run in study.runs}) == 4


def test_equal_names_are_told_apart_by_the_backbone(tmp_path: Path) -> None:
    large = {"backbone": {"path": "hub/large", "adaptation": "lora", "quantization": "4bit"}}
    make_run(tmp_path / "a", "fgm-seed0", defenses=[FGM])
    make_run(tmp_path / "b", "fgm-seed0", defenses=[FGM], hyperparameters=large, run_id="b")
    study = load_study([tmp_path])
    assert [one.name for one in study.conditions] == ["fgm (minilm)", "fgm (large + lora + 4bit)"]


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"model": {"a": 1}, "data": {"init_args": {"balance_domains": True}}}},
        {"recipe": {"model": {"a": 2}}},
        {"recipe": {"model": {"a": 1}, "trainer": {"gradient_clip_val": 1.0}}},
        {"recipe": {"model": {"a": 1}, "trainer": {"callbacks": [{"class_path": "Freeze"}]}}},
        {"defenses": [{**FGM, "settings": {"epsilon": 9.0}}]},
        {"hyperparameters": {"learning_rate": 1.0}},
        {"max_epochs": 7},
        {"precision": "bf16-mixed"},
    ],
    ids=["data", "model", "trainer", "callback", "settings", "hyperparameters", "epochs", "precision"],
)
def test_what_else_differs_makes_another_condition(tmp_path: Path, change: dict[str, Any]) -> None:
    same: dict[str, Any] = {"defenses": [FGM], "recipe": {"model": {"a": 1}, "trainer": {"callbacks": []}}}
    make_run(tmp_path, "fgm-seed0", **same)
    make_run(tmp_path, "fgm-seed1", **same)
    make_run(tmp_path, "fgm-seed2", **(same | change))
    assert [one.seeds for one in load_study(tmp_path).conditions] == [[0, 1], [2]]


def test_what_cannot_be_told_apart_otherwise_is_numbered(tmp_path: Path) -> None:
    for rate in (1, 2, 3):
        hyperparameters = {"learning_rate": rate}
        make_run(tmp_path, f"a{rate}", defenses=[FGM], name="run", hyperparameters=hyperparameters)
    assert [one.name for one in load_study(tmp_path).conditions] == ["run", "run [2]", "run [3]"]


def test_runs_without_a_recipe_need_the_same_name(tmp_path: Path) -> None:
    make_run(tmp_path, "mine-seed0")
    make_run(tmp_path, "mine-seed1")
    make_run(tmp_path, "other-seed0")
    assert [(one.name, one.seeds) for one in load_study(tmp_path).conditions] == [
        ("mine", [0, 1]),
        ("other", [0]),
    ]


def test_a_defended_predictor_is_compared_with_the_undefended_training(tmp_path: Path) -> None:
    for name, defenses in (("erm-seed0", []), ("fgm-seed0", [FGM])):
        folder = make_run(tmp_path, name, defenses=defenses)
        make_run(
            folder, "vote", name=f"{name} + vote", run_id=f"{name}v", seed=0, defenses=defenses,
            inference_defense=VOTE, plain_run_id=f"id-{name}",
        )  # fmt: skip
        make_run(folder, "test", name="test", run_id=f"{name}t", seed=0, defenses=defenses, rows=[
            [replace(row, epoch=None, global_step=None) for row in evaluation("r", 0, 1, LEVELS)]
        ])  # fmt: skip
    study = load_study(tmp_path)
    assert [(one.name, (base := study.baseline(one)) and base.name, one.aim) for one in study.conditions] == [
        ("erm", None, "none"),
        ("erm/test", None, "none"),
        ("erm + vote", "erm", "adversarial"),
        ("fgm", "erm", "adversarial"),
        ("fgm/test", "erm/test", "adversarial"),
        ("fgm + vote", "erm", "adversarial"),
    ]
    alone = load_study(tmp_path / "fgm-seed0")
    assert [run.name for run in alone.runs] == ["fgm-seed0", "fgm-seed0 + vote"]


def test_the_baseline_is_named_where_it_cannot_be_told(tmp_path: Path) -> None:
    for name in ("balanced-seed0", "shuffled-seed0"):
        make_run(tmp_path, name)
    make_run(tmp_path, "fgm-seed0", defenses=[FGM])
    study = load_study(tmp_path)
    assert study.baseline(condition(study, "fgm")) is None
    assert said(study, "--baseline").endswith("balanced, shuffled.")
    named = load_study(tmp_path, baseline="shuffled")
    assert [(b := named.baseline(one)) and b.name for one in named.conditions] == [
        "shuffled",
        "shuffled",
        None,
    ]
    assert not any("--baseline" in problem for problem in named.problems)
    with pytest.raises(RecordsError, match=r"but got 'shufled'\. Did you mean «shuffled»"):
        load_study(tmp_path, baseline="shufled")


def test_the_name_tells_which_of_several_is_the_baseline(tmp_path: Path) -> None:
    for name in ("erm_balanced-seed0", "erm-seed0", "longer_term-seed0"):
        make_run(tmp_path, name)
    study = load_study(tmp_path)
    assert {(one.name, (b := study.baseline(one)) and b.name) for one in study.conditions} == {
        ("erm", None), ("erm_balanced", "erm"), ("longer_term", "erm")
    }  # fmt: skip


def test_a_named_baseline_is_not_one_of_another_backbone(tmp_path: Path) -> None:
    large = {"backbone": {"path": "large"}}
    make_run(tmp_path, "a-seed0")
    make_run(tmp_path, "b-seed0")
    make_run(tmp_path, "c-seed0", hyperparameters=large)
    make_run(tmp_path, "d-seed0", hyperparameters=large, defenses=[FGM])
    make_run(tmp_path, "e-seed0", hyperparameters={}, defenses=[FGM])
    study = load_study(tmp_path, baseline="b")
    assert {one.name: (b := study.baseline(one)) and b.name for one in study.conditions} == {
        "a": "b", "b": None, "c": None, "d": "c", "e": "b"
    }  # fmt: skip


def test_run_json_describes_one_of_several_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first-seed0", defenses=[FGM])
    second = make_run(tmp_path, "second-seed0")
    (second / "records" / "epoch=000.parquet").rename(first / "records" / "more.parquet")
    assert [(run.name, bool(run.info)) for run in load_study(first).runs] == [
        ("id-first-seed0", True), ("id-second-seed0", False)
    ]  # fmt: skip


def test_defenses_of_earlier_versions_are_names(tmp_path: Path) -> None:
    make_run(tmp_path, "a", defenses=["FGM"])
    [only] = load_study(tmp_path).conditions
    assert only.defenses == [{"name": "FGM", "aim": "both", "settings": {}}]
    assert only.aim == "both"
