from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from lightning_robust.defenses import FGM, PGD, VREx
from lightning_robust.defenses.inference import TestTimeAugmentation
from lightning_robust.defenses.settings import settings_of


class Smoothing:
    def __init__(self, victim: Any, share: float = 0.5, *, seed: int = 0, **others: Any) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((print,), {}, {"share": 0.5, "seed": 0, "others": {}}),
        ((print, 0.2), {"seed": 3}, {"share": 0.2, "seed": 3, "others": {}}),
        ((), {"victim": print, "rate": 1}, {"share": 0.5, "seed": 0, "others": {"rate": 1}}),
        ((), {}, {"share": 0.5, "seed": 0, "others": {}}),
        ((1, 2, 3), {}, {"share": 0.5, "seed": 0, "others": {}}),
    ],
    ids=["defaults", "given", "by name", "nothing", "too many"],
)
def test_settings_are_the_arguments_by_name(
    args: tuple[Any, ...], kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert settings_of(Smoothing.__init__, args, kwargs, without=["victim"]) == expected


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_defenses_know_what_they_were_made_with(again: Any) -> None:
    assert FGM(0.5).settings == {"epsilon": 0.5, "weight": 1.0, "embeddings": None}
    assert again(VREx(beta=3.0)).settings["beta"] == 3.0
    assert again(PGD(num_steps=4)).state_key == PGD(num_steps=4).state_key
    defended = TestTimeAugmentation(print, num_copies=2)
    assert "victim" not in defended.settings
    assert again(defended.settings) == defended.settings
