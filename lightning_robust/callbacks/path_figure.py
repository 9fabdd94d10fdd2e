"""A run's path through the plane of adversarial and OOD accuracy, as a figure for loggers that take figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_robust.results.files import write_atomic


class PathFigure:
    """Give a run's path to the loggers that take figures; what fails is said once and stops nothing."""

    NAME = "robustness/path"

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def log(self, loggers: Iterable[Any], path: Sequence[Sequence[float]], name: str, step: int) -> None:
        """Draw the path so far, where there is a logger for it.

        Args:
            loggers: The trainer's; found by their classes' names, so that none needs to be installed.
            path: Adversarial and OOD accuracy ``(evaluations, 2)``, the last one the newest.
            name: The figure's.
            step: The global step.
        """
        takers = [(logger, take) for logger in loggers if (take := _taker(logger)) is not None]
        if not takers or not path or any(math.isnan(value) for value in path[-1]):
            return
        for logger, take in takers:
            kind = type(logger).__name__
            try:
                with isolate_rng():
                    take(logger, draw(path), name, step)
            except Exception as error:  # whatever it is, it is not worth a training
                if kind not in self._failed:
                    rank_zero_warn(
                        f"{kind} did not take the figure «{name}»: {type(error).__name__}: {error}"
                    )
                self._failed.add(kind)


def draw(path: Sequence[Sequence[float]]) -> Any:
    """Return a ``matplotlib.figure.Figure`` of a path; nothing of matplotlib's global state is touched.

    Args:
        path: Adversarial and OOD accuracy ``(evaluations, 2)``; drawn from hollow to filled.
    """
    from lightning_robust.results.figures import LIGHT, Line, plane, slot_style

    figure = plane([Line([x for x, _ in path], [y for _, y in path], slot_style(0))])
    evaluations = "1 evaluation" if len(path) == 1 else f"{len(path)} evaluations, from hollow to filled"
    figure.axes[0].set_title(evaluations, loc="left", fontsize=9, color=LIGHT["muted"])
    return figure


def _tensorboard(logger: Any, figure: Any, name: str, step: int) -> None:
    # Closing is for figures of pyplot, which this is not.
    logger.experiment.add_figure(name, figure, global_step=step, close=False)


def _wandb(logger: Any, figure: Any, name: str, step: int) -> None:
    from PIL import Image

    from lightning_robust.results.figures import to_png

    logger.log_image(key=name, images=[Image.open(BytesIO(to_png(figure))).convert("RGB")], step=step)


def _mlflow(logger: Any, figure: Any, name: str, step: int) -> None:
    client = logger.experiment  # makes the run, whose id is only then there
    client.log_figure(logger.run_id, figure, f"{name}.png")


def _csv(logger: Any, figure: Any, name: str, step: int) -> None:
    from lightning_robust.results.figures import to_png

    data = to_png(figure)
    path = Path(logger.log_dir) / f"{name.replace('/', '_')}.png"
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


_TAKERS: dict[str, Callable[[Any, Any, str, int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CSVLogger": _csv,
}


def _taker(logger: Any) -> Callable[[Any, Any, str, int], None] | None:
    names = [cls.__name__ for cls in type(logger).__mro__]
    return next((_TAKERS[name] for name in names if name in _TAKERS), None)
