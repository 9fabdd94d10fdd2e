from __future__ import annotations

import inspect
import io
import math
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.colors import to_hex, to_rgba_array
from PIL import Image

from lightning_robust.callbacks.path_figure import PathFigure, draw
from lightning_robust.results.figures import LIGHT, to_png
from tests.callbacks.test_monitor import monitor
from tests.foreign import PlainEncoder, loader

PATH = [(0.2, 0.5), (0.3, 0.6), (0.5, 0.63)]


class Stand(Logger):
    """A logger that needs nothing installed and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[Any, ...]] = []

    name = "stand-in"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert "" not in metrics

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class TensorBoard(Stand):
    @property
    def experiment(self) -> Any:
        return self

    # As in torch.utils.tensorboard.SummaryWriter.
    def add_figure(
        self,
        tag: str,
        figure: Any,
        global_step: int | None = None,
        close: bool = True,
        walltime: float | None = None,
    ) -> None:
        self.taken.append((tag, pixels(figure), global_step))


class Wandb(Stand):
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        (image,) = images
        assert isinstance(image, Image.Image)
        self.taken.append((key, np.asarray(image), step))


class MLFlow(Stand):
    _run_id: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._run_id

    @property
    def experiment(self) -> Any:
        self._run_id = "run"
        return self

    # As in mlflow.MlflowClient.
    def log_figure(self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: Any = None) -> None:
        assert run_id == "run"
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(artifact_file).suffix[1:], **(save_kwargs or {}))
        self.taken.append((artifact_file, np.asarray(Image.open(buffer).convert("RGB")), None))


STANDS = {"TensorBoardLogger": TensorBoard, "WandbLogger": Wandb, "MLFlowLogger": MLFlow}


def stand(name: str) -> Stand:
    """Return a stand-in of the real class's name: that is what tells loggers apart."""
    logger: Stand = type(name, (STANDS[name],), {})()
    return logger


def pixels(figure: Any) -> Any:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def png(figure: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(to_png(figure))).convert("RGB"))


def train(tmp_path: Path, loggers: Any, watch: Any = None, **settings: Any) -> tuple[Trainer, PlainEncoder]:
    module, ckpt_path = PlainEncoder(settings.pop("dropout", 0.3)), settings.pop("ckpt_path", None)
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", logger=loggers, callbacks=[watch or monitor(tmp_path / "run"), *settings.pop("callbacks", [])],
        enable_checkpointing=settings.pop("enable_checkpointing", False), enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1, **{"max_epochs": 2, **settings},
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("name", list(STANDS))
def test_each_evaluation_gives_loggers_the_path_so_far(tmp_path: Path, name: str) -> None:
    logger, watch = stand(name), monitor(tmp_path / "run", inference_defenses={"same": lambda victim: victim})
    train(tmp_path, logger, watch)
    ending, steps = (".png", [None, None]) if name == "MLFlowLogger" else ("", [4, 8])
    for tag in ("robustness/path", "same/robustness/path"):
        taken = [(image, step) for its_tag, image, step in logger.taken if its_tag == tag + ending]
        assert [step for _, step in taken] == steps
    path = watch._predictors[0].path
    assert len(path) == 2
    last = [image for tag, image, _ in logger.taken if tag == "robustness/path" + ending][-1]
    expected = png(draw(path)) if name == "WandbLogger" else pixels(draw(path))
    assert np.array_equal(last, expected)


def test_the_stand_ins_are_called_as_the_real_loggers_are() -> None:
    for one in (WandbLogger.log_image, Wandb.log_image):
        assert list(inspect.signature(one).parameters)[:4] == ["self", "key", "images", "step"]
    for real in (MLFlowLogger, TensorBoardLogger):
        assert isinstance(inspect.getattr_static(real, "experiment"), property)
    assert isinstance(inspect.getattr_static(MLFlowLogger, "run_id"), property)
    assert {WandbLogger.__name__, MLFlowLogger.__name__, TensorBoardLogger.__name__} == set(STANDS)


def test_tensorboard_for_real(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    train(tmp_path, logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    images = events.Images("robustness/path")
    assert [image.step for image in images] == [4, 8]


def test_csv_logger_has_a_whole_png_beside_its_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    watch = monitor(tmp_path / "run", inference_defenses={"same": lambda victim: victim})
    train(tmp_path, logger, watch)
    folder = Path(logger.log_dir)
    assert {path.name for path in folder.glob("*.png")} == {
        "robustness_path.png",
        "same_robustness_path.png",
    }
    image = np.asarray(Image.open(folder / "robustness_path.png").convert("RGB"))
    assert np.array_equal(image, png(draw(watch._predictors[0].path)))
    assert (folder / "metrics.csv").is_file()
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: Any) -> None:
    logger, figure = CSVLogger(tmp_path), PathFigure()
    figure.log([logger], PATH[:1], PathFigure.NAME, 1)
    file = Path(logger.log_dir) / "robustness_path.png"
    before = file.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="CSVLogger did not take .*Free some space"):
        figure.log([logger], PATH, PathFigure.NAME, 2)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_logger_that_fails_is_said_once_and_stops_nothing(tmp_path: Path, recwarn: Any) -> None:
    class WandbLogger(Stand):
        calls = 0

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            self.calls += 1
            random.random()
            torch.rand(1)
            raise RuntimeError(f"no network at step {step}")

    failing, working = WandbLogger(), stand("TensorBoardLogger")
    train(tmp_path, [failing, working])
    said = [str(w.message) for w in recwarn if "did not take" in str(w.message)]
    assert said == [
        "WandbLogger did not take the figure «robustness/path»: RuntimeError: no network at step 4"
    ]
    assert failing.calls == 2
    assert len(working.taken) == 2


def test_training_is_bit_for_bit_the_same_with_loggers_that_draw_random_numbers(tmp_path: Path) -> None:
    class TensorBoardLogger(TensorBoard):
        def add_figure(self, *args: Any, **kwargs: Any) -> None:
            super().add_figure(*args, **kwargs)
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002

    _, without = train(tmp_path, False, monitor(tmp_path / "a"), reload_dataloaders_every_n_epochs=1)
    logger = TensorBoardLogger()
    _, watched = train(tmp_path, logger, monitor(tmp_path / "b"), reload_dataloaders_every_n_epochs=1)
    assert len(logger.taken) == 2
    for name, value in without.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_nothing_is_drawn_without_a_logger_that_takes_figures(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(path: Any) -> Any:
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr("lightning_robust.callbacks.path_figure.draw", refuse)
    logger = Stand()
    train(tmp_path, logger)
    assert not logger.taken
    taker = stand("TensorBoardLogger")
    PathFigure().log([taker], [(0.5, math.nan)], "robustness/path", 1)
    PathFigure().log([taker], [], "robustness/path", 1)
    train(tmp_path, taker, monitor(tmp_path / "clean only", ood=None, adversarial=None, attacks=[]))
    assert not taker.taken


def test_a_resumed_run_shows_the_whole_path(tmp_path: Path) -> None:
    def part(folder: str, epochs: int, ckpt_path: Path | None = None) -> tuple[Stand, Any]:
        logger, watch = (
            stand("TensorBoardLogger"),
            monitor(tmp_path / folder, inference_defenses={"same": lambda victim: victim}),
        )
        keep = ModelCheckpoint(tmp_path / folder / "c", save_top_k=-1, filename="{epoch}")
        train(
            tmp_path, logger, watch, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True,
            ckpt_path=ckpt_path, dropout=0.0,
        )  # fmt: skip
        return logger, watch

    whole, expected = part("whole", 3)
    part("parts", 2)
    # From the first epoch's checkpoint: what the second one of the earlier training found is done again.
    resumed, watch = part("parts", 3, tmp_path / "parts" / "c" / "epoch=0.ckpt")
    for one, other in zip(watch._predictors, expected._predictors, strict=True):
        assert one.path == other.path
        assert len(one.path) == 3
    assert np.array_equal(resumed.taken[-1][1], whole.taken[-1][1])
    assert not np.array_equal(resumed.taken[-1][1], resumed.taken[0][1])


def test_two_fits_have_two_paths(tmp_path: Path) -> None:
    watch = monitor(tmp_path / "run")
    for _ in range(2):
        train(tmp_path, False, watch)
        assert len(watch._predictors[0].path) == 2


def test_colours_are_real_and_no_global_state_is_used(monkeypatch: Any) -> None:
    pyplot = types.ModuleType("matplotlib.pyplot")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)  # whose every use fails
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
    figure = draw(PATH)
    figure.canvas.draw()
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())
    colours = set()
    for artist in figure.findobj():
        for kind in ("color", "markerfacecolor", "markeredgecolor", "facecolor", "edgecolor"):
            if hasattr(artist, f"get_{kind}"):
                colours |= {to_hex(one) for one in to_rgba_array(getattr(artist, f"get_{kind}")())}
    assert {LIGHT["run-0"], LIGHT["muted"], LIGHT["line"], "#ffffff"} <= colours
    image = pixels(figure)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert (np.abs(image.astype(int) - [0x2A, 0x5F, 0xD0]).max(axis=-1) < 8).sum() > 300


def test_one_evaluation_is_a_point() -> None:
    assert not np.array_equal(pixels(draw(PATH[:1])), pixels(draw(PATH[1:2])))
