from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import yaml

from lightning_robust.cli import main
from lightning_robust.commands.defense_list import described_defenses
from lightning_robust.defenses import Defense, defense_classes, inference
from lightning_robust.defenses.checks import expect
from lightning_robust.defenses.inference import InferenceDefense as Wrapper


def test_defenses_are_listed_as_they_are(capsys):
    listed = described_defenses()
    described = {defense.name: defense for defense in listed if not defense.at_inference}
    assert set(described) == set(defense_classes())
    wrappers = [cls for cls in vars(inference).values() if inspect.isclass(cls) and issubclass(cls, Wrapper)]
    assert {d.name for d in listed if d.at_inference} == {cls.__name__ for cls in wrappers} - {
        "InferenceDefense"
    }
    for name, cls in defense_classes().items():
        assert described[name].summary == str(cls.__doc__).splitlines()[0]
        assert (described[name].aim, described[name].needs, described[name].cost) == (
            cls.aim,
            cls.needs,
            cls.cost,
        )
    assert main(["ls", "defenses"]) == 0
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.splitlines() if line[:1].strip()} >= set(described)


def test_ls_defenses_imports_no_heavy_package():
    code = (
        "import sys\nfrom lightning_robust.cli import main\nmain(['ls', 'defenses'])\n"
        "print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def checked(tmp_path, capsys, *callbacks):
    path = tmp_path / "recipe.yaml"
    entries = [{"class_path": name, "init_args": settings} for name, settings in callbacks]
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": entries}}))
    return main(["check", "sentiment/erm", str(path)]), " ".join(capsys.readouterr().err.split())


DEFENSES = "lightning_robust.defenses."
VOTE = "lightning_robust.callbacks.RobustnessMonitor"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (DEFENSES + "FGM", {"epsilon": "strong"}, "callbacks[0]: Expected `epsilon` to be a number >= 0"),
        (DEFENSES + "PGD", {"num_steps": 0}, "Expected `num_steps` to be a whole number >= 1, but got 0"),
        (DEFENSES + "VREx", {"beta": float("nan")}, "Expected `beta` to be a number >= 0, but got nan"),
        (DEFENSES + "R3F", {"seed": "1"}, "Expected `seed` to be a whole number, but got '1'"),
        (DEFENSES + "SMART", {"head": 3}, "Expected `head` to be the name of a submodule, but got 3"),
        (DEFENSES + "LAT", {"layers": "hidden"}, "Expected `layers` to be a list of names"),
        (DEFENSES + "AdversarialAugmentation", {"attack": "pwsw"}, "«pwws»"),
        (DEFENSES + "Fgm", {}, "Did you mean «FGM»?"),
        (VOTE, {"inference_defenses": {"vote": {"name": "RandomMaskVot"}}}, "«RandomMaskVote»"),
    ],
)
def test_check_finds_wrong_values_of_defenses(name, settings, message, tmp_path, capsys):
    code, error = checked(tmp_path, capsys, (name, settings))
    assert code == 1
    assert error.startswith("error: 1 fault:")
    assert message in error


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"vote": {"name": "RandomMaskVote", "share": 3}}, ["vote: Expected `share` to be a number from 0"]),
        (
            {"vote": {"name": "RandomMaskVote", "share": "much", "num_copies": 0, "sed": 1}},
            [
                "`share`",
                "`num_copies`",
                "has no setting 'sed'. Did you mean «seed»? It has: share, num_copies",
            ],
        ),
        ({"vote": {"name": "RandomMaskVote", "victim": "demo"}}, ["has no setting 'victim'"]),
        (
            {"vote": {"name": "SynonymSmoothing", "alpha": 0.9}},
            ["Expected `alpha` to be a number from 1e-12"],
        ),
        ({"vote": {"name": "Ensemble"}}, ["Expected two or more victims in an ensemble, but got 1"]),
        (
            {"vote": {"name": "Ensemble", "members": ["nobody/nothing"], "combine": "max"}},
            ["`combine` to be mean or vote"],
        ),
        (
            {"one": {"name": "TestTimeAugmentation", "rate": 2}, "two": "RandomMaskVot"},
            ["inference_defenses.one: Expected `rate`", "Did you mean «RandomMaskVote»"],
        ),
        ({"clean": "RandomMaskVote"}, ["none of which is clean"]),
        ({"vote": {"share": 0.7}}, ["Expected an inference defense's name"]),
        ({"vote": {"name": 3}}, ["Expected the `name` of an inference defense"]),
        (["RandomMaskVote"], ["Expected `inference_defenses` to map names"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_check_finds_what_is_wrong_with_inference_defenses(given, messages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_robust.modules.victim_loading.load_victim", None)
    monkeypatch.setattr("lightning_robust.defenses.synonyms.load_neighbors", None)
    code, error = checked(tmp_path, capsys, (VOTE, {"inference_defenses": given}))
    assert code == 1
    assert error.startswith(f"error: {len(messages)} fault")
    for message in messages:
        assert message in error


def test_check_lists_all_faults_of_all_defenses(tmp_path, capsys):
    monitor = {"attacks": ["pwsw"], "num_example": 3, "inference_defenses": {"a": {"name": "Ensemble"}}}
    wrong = (DEFENSES + "PGD", {"num_steps": 0, "step_size": "far", "epsilon": -1})
    code, error = checked(tmp_path, capsys, (VOTE, monitor), wrong)
    assert code == 1
    for part in ("'num_example'", "two or more victims", "`num_steps`", "`step_size`", "`epsilon`"):
        assert part in error
    assert error.startswith("error: 5 faults:")


class Needy(Defense):
    def __init__(self, weight, seed=0):
        super().__init__()
        self.weight = expect("weight", weight, at_least=0)
        self.seed = seed


def test_a_setting_that_is_needed_is_not_left_out_to_find_more(tmp_path, capsys):
    code, error = checked(tmp_path, capsys, (f"{__name__}.Needy", {"weight": -1, "seed": "1"}))
    assert code == 1
    assert error.startswith("error: 2 faults:")
    assert "`seed`" in error
    assert "`weight`" in error


def test_check_finds_a_defense_that_is_there_twice(tmp_path, capsys):
    twice = (DEFENSES + "GroupDRO", {"step_size": 0.1})
    code, error = checked(tmp_path, capsys, twice, twice)
    assert code == 1
    assert "GroupDRO is there twice with the same settings. Leave one out." in error
