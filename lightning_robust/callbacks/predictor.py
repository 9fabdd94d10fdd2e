"""What a monitor watches: a predictor, what it is evaluated on, and the run that its records belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_robust.callbacks.evaluation import Evaluation
from lightning_robust.errors import ConfigError
from lightning_robust.results import Record

RESERVED = ("clean", "adv", "ood", "joint", "transfer", "records", "validate", "test")
"""Names of metrics and folders, which a predictor's name would clash with."""

_REFERENCE_COLUMNS = ("kind", "environment", "attack", "item_id", "label", "predicted", "correct", "status")


class Predictor:
    """The module's own predictor, or the one that an inference defense makes of it.

    Args:
        name: Of the defended predictor; empty for the plain one.
        defense: Of the defended predictor: see `lightning_robust.defenses.inference.as_wrapper`.

    Attributes:
        run_id: Of the run that its records belong to.
        folder: The run's; None where nothing is kept.
        reference: Records of the run's first evaluation.
        path: Adversarial and OOD accuracy of the run's evaluations; NaN where there is none.
        info: The contents of the run's ``run.json``.
    """

    def __init__(self, name: str = "", defense: Any = None) -> None:
        self.name = name
        self.run_id: str | None = None
        self.folder: Path | None = None
        self.reference: list[Record] | None = None
        self.path: list[tuple[float, float]] = []
        self.info: dict[str, Any] = {}
        self._evaluation: Evaluation | None = None
        self._wrapper: Any = None
        if name:
            from lightning_robust.defenses.inference import as_wrapper

            self._wrapper = as_wrapper(defense)
        self._plain: Any = None
        self._built: Any = None

    @property
    def evaluation(self) -> Evaluation:
        """What it is evaluated on; there once the trainer is set up."""
        assert self._evaluation is not None
        return self._evaluation

    @evaluation.setter
    def evaluation(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation if not self.name else _without_gradients(evaluation)

    @property
    def prefix(self) -> str:
        """What its metrics' names begin with."""
        return f"{self.name}/" if self.name else ""

    def metric_names(self) -> list[str]:
        """Return the names of all metrics that an evaluation gives."""
        return [self.prefix + key for key in self.evaluation.keys()]  # noqa: SIM118 (no mapping)

    def begin(self, run_id: str, folder: Path | None) -> None:
        """Begin a new run."""
        self.run_id = run_id
        self.folder = folder
        self.reference = None
        self.path = []

    def victim(self, plain: Any) -> Any:
        """Return the victim that is evaluated."""
        if self._wrapper is None:
            return plain
        # What a defense has loaded serves every evaluation, each with a new victim of the module.
        if self._built is not None and getattr(self._built, "victim", None) is self._plain:
            self._built = self._built.around(plain) if hasattr(self._built, "around") else None
        else:
            self._built = None
        self._built = self._built or self._wrapper(plain)
        self._plain = plain
        return self._built

    def forget_victim(self) -> None:
        """Let go of the module."""
        self._plain = self._built = None

    def describe(self) -> dict[str, Any] | None:
        """Return the defense with its settings for ``run.json``; None for the plain predictor."""
        if not self.name:
            return None
        settings = getattr(self._built, "settings", {})
        aim = getattr(self._built, "aim", "both")  # a function of the user's does not say
        return {"name": self.name, "class": type(self._built).__name__, "aim": aim, "settings": settings}

    def state_dict(self, warm_start: bool) -> dict[str, Any]:
        columns = {
            name: [getattr(record, name) for record in self.reference or ()] for name in _REFERENCE_COLUMNS
        }
        found = self._evaluation.found if self._evaluation is not None and warm_start else {}
        return {
            "run_id": self.run_id,
            "folder": None if self.folder is None else str(self.folder),
            "reference": columns,
            "path": [list(point) for point in self.path],
            "found": [[*key, text, words] for key, (text, words) in found.items()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.run_id = state_dict["run_id"]
        self.folder = None if state_dict["folder"] is None else Path(state_dict["folder"])
        self.path = [(adv, ood) for adv, ood in state_dict.get("path", ())]
        rows = zip(*(state_dict["reference"][name] for name in _REFERENCE_COLUMNS), strict=True)
        self.reference = [
            Record(
                **dict(zip(_REFERENCE_COLUMNS, row, strict=True)),
                run_id=self.run_id or "",
                epoch=None,
                global_step=None,
                probability=None,
            )
            for row in rows
        ] or None
        if self._evaluation is not None:
            for attack, item, text, words in state_dict["found"]:
                self._evaluation.found[attack, item] = (
                    tuple(text) if isinstance(text, list) else text,
                    words,
                )


def make_predictors(inference_defenses: Mapping[str, Any] | None) -> list[Predictor]:
    """Return the plain predictor and the defended ones.

    Raises:
        ConfigError: If a name cannot stand before a metric's name, or a defense is unknown.
    """
    if inference_defenses is not None and not isinstance(inference_defenses, Mapping):
        raise ConfigError(
            "Expected `inference_defenses` to map names of your choice to defenses, such as "
            f"vote: {{name: RandomMaskVote}}, but got {inference_defenses!r:.80}."
        )
    for name in inference_defenses or ():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
            raise ConfigError(
                "Expected names of `inference_defenses` of letters, digits, _ and -, none of which is "
                f"{', '.join(RESERVED)}, but got {name!r}."
            )
    return [Predictor(), *(Predictor(name, spec) for name, spec in (inference_defenses or {}).items())]


def _without_gradients(evaluation: Evaluation) -> Evaluation:
    """Evaluate on the same items; what votes and averages has no gradients to follow."""
    attacks = [attack for attack in evaluation.attacks if not attack.needs_gradients]
    return replace(evaluation, attacks=attacks, found={})
