"""Exports of the best and the last weights while training goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_robust.errors import ConfigError, did_you_mean
from lightning_robust.modules.classifier import RobustClassifier
from lightning_robust.modules.export import export_pretrained, find_pretrained

Mode = Literal["max", "min"]


class AdapterCheckpoint(Callback):
    """Writes the LoRA adapter (or, without one, the whole model) as a folder that PEFT or transformers loads.

    ``export-last`` is written after every validation and epoch; ``export-best`` when ``monitor`` improves.
    They stand beside the checkpoints, which this callback does not replace: training resumes from those.
    Any LightningModule that holds a PEFT or Hugging Face model will do.

    Args:
        monitor: A metric logged by validation, such as ``val/accuracy``; without it only the last is written.
        mode: Whether more or less of it is better.
        save_last: Whether to write ``export-last``.
        dirpath: Folder for the exports; by default that of the checkpoints.

    Raises:
        ConfigError: If nothing would be saved, or the folder is taken or not writable.
        BackboneError: When training starts, if the module holds no such model.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Mode = "max",
        save_last: bool = True,
        dirpath: str | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigError(
                f"Expected `mode` to be max or min, but got {mode!r}.{did_you_mean(mode, ['max', 'min'])}"
            )
        if monitor is None and not save_last:
            raise ConfigError(
                "Expected `monitor` or save_last=True, but got neither: nothing would be saved."
            )
        self.monitor = monitor
        self.mode = mode
        self.save_last = save_last
        self.dirpath = dirpath
        self.best_score = -math.inf if mode == "max" else math.inf
        self._saved_step = -1
        self._warned = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        find_pretrained(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._warn_if_missing(trainer)
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # For epochs without validation; a metric left from an earlier one is no improvement on itself.
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self._saved_step = trainer.global_step
        if self.save_last:
            self._export(trainer, pl_module, "export-last")
        score = self._score(trainer)
        if score is not None and (score > self.best_score if self.mode == "max" else score < self.best_score):
            self.best_score = score
            self._export(trainer, pl_module, "export-best")

    def _score(self, trainer: Trainer) -> float | None:
        if self.monitor is None:
            return None
        value = trainer.callback_metrics.get(self.monitor)
        return None if value is None else float(value)

    def _warn_if_missing(self, trainer: Trainer) -> None:
        if self.monitor is None or self.monitor in trainer.callback_metrics or self._warned:
            return
        self._warned = True
        names = sorted(trainer.callback_metrics)
        rank_zero_warn(
            f"AdapterCheckpoint: `{self.monitor}` was not logged, so export-best is not written."
            f"{did_you_mean(self.monitor, names)} Logged: {', '.join(names) or 'nothing'}."
        )

    def _export(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        folder = self._folder(trainer) / name
        if trainer.is_global_zero:
            if isinstance(pl_module, RobustClassifier):
                pl_module.save_pretrained(folder)
            else:
                export_pretrained(find_pretrained(pl_module), getattr(pl_module, "tokenizer", None), folder)
        trainer.strategy.barrier("AdapterCheckpoint")

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser()
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(checkpoints or trainer.log_dir or trainer.default_root_dir)
