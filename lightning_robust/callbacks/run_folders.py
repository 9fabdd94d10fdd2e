"""The folders of a monitor's runs: opened or gone on with, described, and written to."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_robust.callbacks.context import is_dry
from lightning_robust.callbacks.evaluation import When, free_folder
from lightning_robust.callbacks.predictor import Predictor
from lightning_robust.results import Record, read_run_json, run_info, write_records, write_run_json


class RunFolders:
    """Keep one run for each predictor: the plain one's folder holds those of the defended ones.

    Args:
        predictors: The plain predictor, then the defended ones.
        records_dir: The plain predictor's folder; by default the logger's, or else ``robustness`` in the
            trainer's root. Where it holds another run's records, ``<records_dir>-2`` is used.
    """

    def __init__(self, predictors: Sequence[Predictor], records_dir: str | Path | None) -> None:
        self.predictors = predictors
        self.records_dir = records_dir
        self._began = clock()

    def open(self, trainer: Trainer, pl_module: LightningModule, settings: Mapping[str, Any]) -> None:
        """Open every predictor's run of a training, on all ranks.

        Args:
            trainer: About to train.
            pl_module: What it trains.
            settings: The monitor's, for ``run.json``.
        """
        self._began = clock()
        for predictor in self.predictors:
            self._open(trainer, pl_module, predictor, settings)

    def open_stage(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictor: Predictor,
        stage: str,
        settings: Mapping[str, Any],
    ) -> str:
        """Open a predictor's run of ``validate`` or ``test``, on all ranks, and return its id."""
        base = self._base(trainer, predictor)
        predictor.folder = _free(trainer, base if predictor.name or base is None else base / stage)
        run_id: str = trainer.strategy.broadcast(uuid.uuid4().hex[:12])
        if trainer.is_global_zero:
            predictor.info = self._describe(trainer, pl_module, predictor, run_id, settings)
        return run_id

    def keep(
        self,
        predictor: Predictor,
        name: str,
        when: When,
        records: Sequence[Record],
        began: tuple[float, float],
    ) -> None:
        """Write one evaluation's records, and a note on it; on rank zero only."""
        if predictor.folder is None:
            return
        write_records(predictor.folder / "records" / f"{name}.parquet", records)
        note: dict[str, Any] = {"epoch": when.epoch, "global_step": when.global_step, **elapsed(began)}
        if predictor.evaluation.doubts:
            note["doubts"] = [asdict(doubt) for doubt in predictor.evaluation.doubts]
        predictor.info["evaluations"].append(note)
        write_run_json(predictor.folder, predictor.info)

    def close(self, trainer: Trainer) -> None:
        """Note that the training is finished, how long it took and how much memory."""
        finished = {**elapsed(self._began), "peak_memory": _peak_memory(trainer)}
        for predictor in self.predictors:
            if predictor.folder is not None and trainer.is_global_zero:
                write_run_json(predictor.folder, predictor.info | {"finished": finished})

    def _base(self, trainer: Trainer, predictor: Predictor) -> Path | None:
        if is_dry(trainer):
            return None
        if predictor.name:
            plain = self.predictors[0].folder
            return None if plain is None else plain / predictor.name
        if self.records_dir is not None:
            return Path(self.records_dir)
        # Without a logger, Lightning's folder is the root itself, which holds other things.
        return (
            Path(trainer.log_dir or ".") if trainer.loggers else Path(trainer.default_root_dir) / "robustness"
        )

    def _open(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictor: Predictor,
        settings: Mapping[str, Any],
    ) -> None:
        """Go on in the folder of the run that is resumed, else take one that holds no other run."""
        base = self._base(trainer, predictor)
        resumed = predictor.run_id is not None and trainer.ckpt_path is not None
        if not resumed:
            predictor.begin(trainer.strategy.broadcast(uuid.uuid4().hex[:12]), _free(trainer, base))
        else:
            predictor.folder = trainer.strategy.broadcast(self._resumed(base, predictor))
        if trainer.is_global_zero:
            folder = predictor.folder
            assert predictor.run_id is not None
            predictor.info = self._describe(trainer, pl_module, predictor, predictor.run_id, settings)
            if resumed and folder is not None and (folder / "run.json").is_file():
                earlier = read_run_json(folder).get("evaluations", [])
                predictor.info["evaluations"] = [
                    e for e in earlier if e["global_step"] <= trainer.global_step
                ]
                _set_aside(folder / "records", trainer.global_step)
            if folder is not None:
                write_run_json(folder, predictor.info)

    def _resumed(self, base: Path | None, predictor: Predictor) -> Path | None:
        """Return the folder of a run that is gone on with: its own, unless another ``records_dir`` is asked for."""
        own = predictor.folder
        if base is None:
            return None
        if own is not None and (own / "run.json").is_file() and free_folder(own, predictor.run_id) == own:
            beside = own.resolve().parent == base.resolve().parent
            if self.records_dir is None or (
                beside and re.fullmatch(rf"{re.escape(base.name)}(-\d+)?", own.name)
            ):
                return own
        return free_folder(base, predictor.run_id)

    def _describe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictor: Predictor,
        run_id: str,
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        from lightning_robust.defenses import Defense

        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        plain = self.predictors[0]
        name = None if plain.folder is None else _name(plain.folder)
        return run_info(
            run_id=run_id,
            name=f"{name} + {predictor.name}" if name is not None and predictor.name else name,
            label_names=pl_module.hparams.get("label_names"),
            module=type(pl_module).__name__,
            hyperparameters=dict(pl_module.hparams),
            defenses=[
                {"name": type(one).__name__, "aim": one.aim, "settings": one.settings}
                for one in callbacks
                if isinstance(one, Defense)
            ],
            inference_defense=predictor.describe(),
            plain_run_id=plain.info["run_id"] if predictor.name else None,
            attacks={attack.name: attack.settings for attack in predictor.evaluation.attacks},
            **settings,
            seed=_training_seed(),
            max_epochs=trainer.max_epochs,
            precision=trainer.precision,
            evaluations=[],
        )


def clock() -> tuple[float, float]:
    """Return wall-clock and processor seconds for `elapsed`."""
    return perf_counter(), process_time()


def elapsed(since: tuple[float, float]) -> dict[str, float]:
    """Return wall-clock and processor seconds since a `clock`; the latter do not suffer from a busy machine."""
    return {"seconds": perf_counter() - since[0], "cpu_seconds": process_time() - since[1]}


def _peak_memory(trainer: Trainer) -> int | None:
    """Return the most bytes that this process held: on its GPU where it trains on one, else altogether."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Kibibytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free(trainer: Trainer, base: Path | None) -> Path | None:
    """Return a folder that holds no run, the same on every rank."""
    return None if base is None else trainer.strategy.broadcast(free_folder(base))


def _set_aside(records: Path, step: int) -> None:
    """Rename the records of evaluations later than the checkpoint that a run goes on from: their weights are gone."""
    for path in records.glob("epoch=*-step=*.parquet"):
        if int(path.stem.rpartition("=")[2]) > step:
            path.replace(path.with_name(f"{path.name}.abandoned"))


def _name(folder: Path) -> str:
    """Name a run by its folder, which loggers call ``version_<n>`` in that of the experiment."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:] if parts[-1].startswith("version_") else parts[-1:])


def _training_seed() -> int | None:
    """Return the seed that `seed_everything` was called with, which Lightning keeps there."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else None
