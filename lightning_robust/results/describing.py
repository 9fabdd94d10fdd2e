"""What a run was: its seed, its backbone, its defenses, and which runs differ in nothing but seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Aim = Literal["adversarial", "ood", "both", "none"]

_SEED = re.compile(r"[-_./ ]*seed[-_= ]?(\d+)(?:-\d+)?(?!\d)", re.IGNORECASE)
_VERSION = re.compile(r"[-_./ ]*version_\d+$")
_STAGE = re.compile(r"(?P<stage>validate|test)(?:-\d+)?(?: \+ [\w-]+)?")
_WITHOUT_MEANING = ("", "lightning_logs", "robustness", "evaluation")  # default folders
_BASELINE = re.compile(r"(?<![a-z])(erm|undefended|baseline|plain)(?![a-z])", re.IGNORECASE)
_SEEDS = ("seed", "seed_everything")
_TRAINER = (
    "max_epochs", "max_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm",
    "accumulate_grad_batches", "limit_train_batches", "overfit_batches", "reload_dataloaders_every_n_epochs",
)  # fmt: skip
_WATCHING = (
    "RobustnessMonitor", "ModelCheckpoint", "LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor",
    "Timer", "ModelSummary", "RichModelSummary", "TQDMProgressBar", "RichProgressBar", "OnExceptionCheckpoint",
)  # fmt: skip


def run_name(info: Mapping[str, Any], run_id: str, folder: Path, alone: bool) -> str:
    """Return what a run is called: as ``run.json`` says, else by its id or folder.

    Args:
        info: Its ``run.json``.
        run_id: As in its records.
        folder: Where it is.
        alone: Whether the folder holds no other run.
    """
    if not alone:
        return run_id or folder.name
    name = str(info.get("name") or run_id or folder.name) if info else folder.name
    if stage_of(info):
        # Named after their folder: «test» says nothing of what was tested.
        place = folder.parent if info.get("inference_defense") else folder
        return f"{place.parent.name}/{name}"
    return name


def stage_of(info: Mapping[str, Any]) -> str:
    """Return ``validate`` or ``test`` for a monitor's evaluation outside training, else nothing."""
    found = _STAGE.fullmatch(str(info.get("name") or ""))
    notes = info.get("evaluations")
    trained = (
        any(_dict(note).get("epoch") is not None for note in notes) if isinstance(notes, list) else False
    )
    return found["stage"] if found and not trained else ""


def seed_of(info: Mapping[str, Any], name: str) -> int | None:
    """Return the training's seed; None where neither ``run.json`` nor the name has one."""
    for seed in (info.get("seed"), _dict(info.get("recipe")).get("seed_everything")):
        if isinstance(seed, int) and not isinstance(seed, bool):
            return seed
    found = _SEED.search(name)
    return int(found[1]) if found and not info else None


def without_seed(name: str, seed: int | None = None) -> str:
    """Return a run's name without its seed and its logger's version; nothing where only that was its name.

    Args:
        name: Of the run.
        seed: Of the run; a name that ends in it loses it.

    >>> without_seed("fgm-seed0"), without_seed("fgm_1", seed=1), without_seed("gpt2-seed2", seed=2)
    ('fgm', 'fgm', 'gpt2')
    """
    told = _SEED.sub("", name)
    short = _VERSION.sub("", told)
    if seed is not None and told == name:
        short = re.sub(rf"(?<!\d)[-_./ ]*{seed}$", "", short)
    return "" if short in _WITHOUT_MEANING else short


def identity(info: Mapping[str, Any], name: str, seed: int | None) -> str:
    """Return a text that is the same for runs that differ in nothing but seeds, folders and what watches them.

    With a recipe: its model, data, callbacks and what of the trainer matters. Without one, hyperparameters and
    defenses may not tell two methods apart, so that names must agree too.
    """
    recipe = _dict(info.get("recipe"))
    trainer, known = _dict(recipe.get("trainer")), "defenses" in info
    callbacks = trainer["callbacks"] if isinstance(trainer.get("callbacks"), list) else []
    parts = {
        "stage": stage_of(info),
        "module": info.get("module"),
        "hyperparameters": info.get("hyperparameters"),
        "defenses": info.get("defenses"),
        "inference_defense": info.get("inference_defense"),
        "max_epochs": info.get("max_epochs"),
        "precision": info.get("precision"),
        "model": recipe.get("model"),
        "data": recipe.get("data"),
        "trainer": {key: trainer.get(key) for key in _TRAINER},
        "callbacks": [one for one in callbacks if not _watches(one)],
        "name": "" if known and recipe.get("model") else without_seed(name, seed),
    }
    return json.dumps(_without_seeds(parts), sort_keys=True, default=str)


def backbone_of(info: Mapping[str, Any]) -> str:
    """Return the backbone's name, adaptation and quantization; nothing where they are not known."""
    hyperparameters = _dict(info.get("hyperparameters"))
    model = _dict(_dict(_dict(info.get("recipe")).get("model")).get("init_args"))
    backbone = hyperparameters.get("backbone") or model.get("backbone")
    if isinstance(backbone, str):
        return _last(backbone)
    settings = _dict(backbone)
    extra = [settings.get("adaptation"), settings.get("quantization")]
    parts = [_last(str(settings["path"]))] if settings.get("path") else []
    return " + ".join(parts + [str(one) for one in extra if one not in (None, "full", "none")])


def defenses_of(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the training defenses with ``name``, ``aim`` and ``settings``; earlier versions wrote their names."""
    given = info.get("defenses")
    found = (
        [one if isinstance(one, dict) else {"name": str(one)} for one in given or ()]
        if isinstance(given, list)
        else []
    )
    return [{"name": "?", "aim": "both", "settings": {}, **one} for one in found]


def defense_names(defenses: Sequence[Mapping[str, Any]], inference: Mapping[str, Any] | None) -> str:
    """Return the names of all defenses; «no defense» where there is none."""
    return (
        " + ".join(str(one.get("name")) for one in [*defenses, *([inference] if inference else [])])
        or "no defense"
    )


def flat_settings(
    defenses: Sequence[Mapping[str, Any]], inference: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return all defenses' settings but for seeds, as text by name; of several defenses, by theirs and its name."""
    given = [*defenses, *([inference] if inference else [])]
    return {
        f"{one.get('name')}.{key}" if len(given) > 1 else str(key): str(value)
        for one in given
        for key, value in _dict(one.get("settings")).items()
        if key not in _SEEDS
    }


def aim_of(defenses: Sequence[Mapping[str, Any]]) -> Aim:
    """Return what defenses aim at together."""
    aims = {str(one.get("aim")) for one in defenses}
    if not aims:
        return "none"
    if aims == {"adversarial"}:
        return "adversarial"
    return "ood" if aims == {"ood"} else "both"


def baseline_rank(name: str) -> int:
    """Return 2 for a name that says «baseline», 1 for one that contains such a word, else 0."""
    plain = re.sub(r"(/(validate|test))?( \(.*)?$", "", name)
    return 2 if _BASELINE.fullmatch(plain) else int(bool(_BASELINE.search(name)))


def told_apart(columns: Sequence[Callable[[int], str]], count: int) -> list[str]:
    """Return ``count`` different names.

    Args:
        columns: Each takes a place and returns a name; the next one is asked for those whose names are equal, and
            heard where its answers are not.
        count: How many.
    """
    names = [columns[0](index) for index in range(count)]
    for column in columns[1:]:
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            equal = [index for index, one in enumerate(names) if one == name]
            longer = {index: column(index) for index in equal}
            if len(set(longer.values())) > 1:
                names = [longer.get(index, one) for index, one in enumerate(names)]
    found: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in found or (candidate != name and candidate in names):
            candidate, number = f"{name} [{number}]", number + 1
        found.append(candidate)
    return found


def _watches(callback: Any) -> bool:
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    return str(path).rpartition(".")[2] in _WATCHING


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_seeds(one) for key, one in value.items() if key not in _SEEDS}
    return [_without_seeds(one) for one in value] if isinstance(value, list) else value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
