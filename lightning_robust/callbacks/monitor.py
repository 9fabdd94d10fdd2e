"""RobustnessMonitor: clean, adversarial and OOD accuracy while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_robust.attacks import Attack
from lightning_robust.attacks.blind import rehearse
from lightning_robust.attacks.engine import AUTOCAST
from lightning_robust.callbacks.console_table import show_evaluation
from lightning_robust.callbacks.context import gather, is_dry, leaving_no_trace
from lightning_robust.callbacks.environments import find_environments
from lightning_robust.callbacks.evaluation import Evaluation, Shard, When, check_budget, make_attacks
from lightning_robust.callbacks.path_figure import PathFigure
from lightning_robust.callbacks.predictor import Predictor, make_predictors
from lightning_robust.callbacks.run_folders import RunFolders, clock
from lightning_robust.data.items import Environment, Role
from lightning_robust.data.sampling import seeded_sample
from lightning_robust.errors import ConfigError, RobustError
from lightning_robust.modules.state_key import fingerprint
from lightning_robust.modules.victim import find_victim
from lightning_robust.results import Record, metrics, transfer_deltas

KEY_PREFIXES = ("clean/", "adv/", "ood/", "joint/", "transfer/")


class RobustnessMonitor(Callback):
    """Measure clean accuracy, accuracy under attack and accuracy under shift on the same items every time.

    Runs after every validation epoch (after every training epoch where there is no validation), before
    checkpointing and early stopping act, and in ``Trainer.validate`` and ``Trainer.test``. Logs
    ``clean/*``, ``adv/*``, ``ood/*``, ``joint/*`` and ``transfer/*``, and writes one Parquet file of records
    per evaluation. Training with it gives bit for bit the weights of training without it.

    Where validation runs but the monitor does not (``every_n_epochs``), its metrics are NaN, so that no
    checkpoint is credited with older weights' score.

    Changes since the run's first evaluation, paired by item:

    | key | meaning |
    |---|---|
    | ``transfer/adv_delta``, ``transfer/ood_delta`` | of adversarial, and of mean OOD accuracy; 0.01 is one point |
    | ``transfer/adv_low``, ``_high``, ``transfer/ood_low``, ``_high`` | 95 % interval, of this training run |
    | ``transfer/ratio``, ``_low``, ``_high`` | OOD per adversarial change; NaN where not estimable (`transfer_deltas`) |

    They also stand in a table on the terminal. TensorBoard, W&B, MLflow and CSV loggers get ``robustness/path``, a
    figure of OOD against adversarial accuracy so far.

    With ``inference_defenses``, the plain predictor and each defended one are evaluated side by side on the
    same items: the metrics of the latter begin with its name (``vote/clean/accuracy``), and its records are a
    run of their own in the folder of that name, ``<records_dir>/vote``, so that two runs can be compared. Attacks
    that follow gradients run on the plain predictor only. In a recipe::

        inference_defenses:
          vote: {name: RandomMaskVote, share: 0.7}

    Args:
        attacks: Names, settings with a ``name``, or attacks.
        num_examples: Size of the sample of `clean` that is attacked.
        clean: In-distribution items: a TextSource (or its settings), a ``datasets.Dataset`` or a list of
            ``(text, label)``. Where all three kinds are left out, the data module's ``environments()``.
        ood: Shifted items by environment name.
        adversarial: Items of static adversarial benchmarks by environment name; also a suite's settings, such
            as ``{"suite": "advglue", "task": "sst2"}`` (see `lightning_robust.data.suites.SuiteSource`).
        victim: Maps the module to a callable ``texts -> probabilities (n, classes)``; by default the module's
            own ``predict_proba``, or the Hugging Face model that it holds.
        every_n_epochs: Evaluate after every n-th epoch, and after the last one.
        query_budget: Queries that one search may make.
        total_query_budget: Queries that all attacks of an evaluation may make, shared out evenly.
        time_budget: Seconds that the attacks of an evaluation may take; searches under way then end and count
            as failed, with a warning that says how many, and items that were not reached are left out.
        warm_start: First try the item's last successful perturbation.
        records_dir: Folder of the run's ``records/`` and ``run.json``; by default the logger's, or else
            ``robustness`` in the trainer's root. Where it holds another run's, ``<records_dir>-2`` is used.
        seed: Of the sample and the attacks.
        max_batch_tokens: Padded tokens in one call of the victim.
        progress: Whether to show progress bars and tables; None shows them on a terminal.
        autocast: ``bfloat16`` or ``float16`` makes the victim compute in that type, which is several times
            faster where the hardware has it; None leaves it as it trains.
        inference_defenses: Defended predictors by a name of your choice: the name of a class in
            `lightning_robust.defenses.inference`, its settings with a ``name``, or a function from a victim to a
            victim.

    Raises:
        ConfigError: If a setting is wrong; when fit starts, if there is nothing to evaluate or no victim.
    """

    def __init__(
        self,
        attacks: Sequence[str | dict[str, Any] | Attack] = (),
        num_examples: int = 200,
        clean: Any = None,
        ood: Mapping[str, Any] | None = None,
        adversarial: Mapping[str, Any] | None = None,
        victim: Callable[[LightningModule], Any] | None = None,
        every_n_epochs: int = 1,
        query_budget: int | None = None,
        warm_start: bool = False,
        records_dir: str | Path | None = None,
        seed: int = 0,
        max_batch_tokens: int = 16384,
        progress: bool | None = None,
        total_query_budget: int | None = None,
        time_budget: float | None = None,
        autocast: str | None = None,
        inference_defenses: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_examples", num_examples), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ConfigError(f"Expected `{name}` to be >= 1, but got {value}.")
        check_budget(query_budget)
        if autocast not in AUTOCAST:
            raise ConfigError(f"Expected `autocast` to be bfloat16, float16 or None, but got {autocast!r}.")
        if time_budget is not None and not time_budget > 0:
            raise ConfigError(f"Expected `time_budget` to be > 0 seconds, but got {time_budget}.")
        self.attacks = make_attacks(attacks)
        self.num_examples = num_examples
        self.sources: dict[Role, Any] = {"clean": clean, "ood": ood, "adversarial": adversarial}
        self.victim = victim
        self.every_n_epochs = every_n_epochs
        self.query_budget = query_budget
        self.total_query_budget = total_query_budget
        self.time_budget = time_budget
        self.autocast = autocast
        self.warm_start = warm_start
        self.seed = seed
        self.max_batch_tokens = max_batch_tokens
        self.progress = progress
        self._predictors = make_predictors(inference_defenses)
        self._runs = RunFolders(self._predictors, records_dir)
        self._figure = PathFigure()
        self._last_step: int | None = None
        self.recipe: dict[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """Where the run's ``records/`` and ``run.json`` are; None before the first evaluation."""
        return self._predictors[0].folder

    @property
    def folders(self) -> list[Path]:
        """`folder` and those of the defended predictors."""
        return [one.folder for one in self._predictors if one.folder is not None]

    # Lightning's hooks --------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate", "test"):
            evaluation = self._make_evaluation(trainer)
            for predictor in self._predictors:
                predictor.evaluation = evaluation

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for predictor in self._predictors:
            predictor.forget_victim()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        victim = self._find_victim(pl_module)
        with leaving_no_trace(trainer, pl_module):
            rehearse(self.attacks, victim)
            for predictor in self._predictors:
                predictor.victim(victim)
        left_out = [attack.name for attack in self.attacks if attack.needs_gradients]
        if left_out and len(self._predictors) > 1:
            rank_zero_info(f"Run on the plain predictor only, as they need gradients: {', '.join(left_out)}.")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (
                isinstance(callback, EarlyStopping)
                and self.every_n_epochs > 1
                and self._logs(callback.monitor)
            ):
                raise ConfigError(
                    f"EarlyStopping monitors {callback.monitor!r}, which RobustnessMonitor(every_n_epochs="
                    f"{self.every_n_epochs}) does not measure at every validation. Validate as often as it "
                    f"measures: every_n_epochs=1 and Trainer(check_val_every_n_epoch={self.every_n_epochs})."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._runs.open(trainer, pl_module, self._settings())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._runs.close(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._during_fit(trainer, pl_module)
        else:
            self._outside_fit(trainer, pl_module, "validate")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        ends = _at_last_step(trainer) or trainer.current_epoch + 1 == trainer.max_epochs
        if not validates or (ends and trainer.global_step != self._last_step):
            self._during_fit(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outside_fit(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        states = {predictor.name: predictor.state_dict(self.warm_start) for predictor in self._predictors}
        return states.pop("") | {"defended": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = {"": state_dict, **state_dict.get("defended", {})}
        for predictor in self._predictors:
            if predictor.name in states:
                predictor.load_state_dict(states[predictor.name])

    # What is evaluated --------------------------------------------------------------------------

    def _make_evaluation(self, trainer: Trainer) -> Evaluation:
        environments = find_environments(trainer, self.sources)
        clean = [item for one in environments if one.role == "clean" for item in one.items]
        if self.attacks and not clean:
            raise ConfigError(
                "Expected clean items to attack, but there is no environment with the role `clean`. "
                "Give one: RobustnessMonitor(clean=...)."
            )
        attacked = seeded_sample(clean, [item.id for item in clean], self.num_examples, self.seed)
        if is_dry(trainer):
            few = 4
            attacked = attacked[:few]
            environments = [Environment(e.name, e.role, e.items[:few]) for e in environments]
        return Evaluation(
            environments,
            self.attacks,
            attacked,
            query_budget=self.query_budget,
            total_query_budget=self.total_query_budget,
            time_budget=self.time_budget,
            autocast=self.autocast,
            seed=self.seed,
            max_batch_tokens=self.max_batch_tokens,
            progress=self.progress if trainer.is_global_zero else False,
            warm_start=self.warm_start,
        )

    def _find_victim(self, pl_module: LightningModule) -> Any:
        return self.victim(pl_module) if self.victim is not None else find_victim(pl_module)

    # One evaluation -----------------------------------------------------------------------------

    def _during_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, last = trainer.current_epoch, trainer.max_epochs
        if (epoch + 1) % self.every_n_epochs and epoch + 1 != last and not _at_last_step(trainer):
            # Not logged: loggers would draw the gap, and Lightning wants a key logged in one way only.
            keys = [key for one in self._predictors for key in one.metric_names()]
            trainer.callback_metrics.update(dict.fromkeys(keys, torch.tensor(torch.nan)))
            return
        self._last_step = trainer.global_step
        name = f"epoch={epoch:03d}-step={trainer.global_step:08d}"
        for predictor in self._predictors:
            assert predictor.run_id is not None
            when = When(predictor.run_id, epoch, trainer.global_step)
            records = self._evaluate(trainer, pl_module, predictor, when, name)
            reference = predictor.reference
            predictor.reference = reference or records
            values = metrics(records) | transfer_deltas(predictor.reference, records)
            predictor.path.append((values.get("adv/accuracy", nan), values.get("ood/accuracy", nan)))
            self._log(pl_module, predictor, values)
            if trainer.is_global_zero:
                show_evaluation(trainer, self.progress, predictor.name, records, reference)
                name_of_path = predictor.prefix + PathFigure.NAME
                self._figure.log(trainer.loggers, predictor.path, name_of_path, trainer.global_step)

    def _outside_fit(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for predictor in self._predictors:
            predictor.victim(self._find_victim(pl_module))  # described with what it loads
            when = When(self._runs.open_stage(trainer, pl_module, predictor, stage, self._settings()))
            records = self._evaluate(trainer, pl_module, predictor, when, stage)
            self._log(pl_module, predictor, metrics(records))
            if trainer.is_global_zero:
                show_evaluation(trainer, self.progress, predictor.name, records)

    def _evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictor: Predictor,
        when: When,
        name: str,
    ) -> list[Record]:
        began = clock()
        shard = Shard(trainer.global_rank, trainer.world_size)
        evaluation, folder = predictor.evaluation, predictor.folder
        partial = None if folder is None else folder / "records" / f".{name}.rank{shard.rank}.jsonl"
        mine: list[Record] = []
        failed = None
        with leaving_no_trace(trainer, pl_module):
            try:
                victim = predictor.victim(self._find_victim(pl_module))
                weights = f"{fingerprint(pl_module)}{predictor.describe() or ''}"
                mine = evaluation.run(victim, when, shard=shard, partial=partial, weights=weights)
            except Exception as error:
                if shard.world_size == 1:
                    raise
                what = f"{type(error).__name__} in process {shard.rank}: {error}"
                failed = error if isinstance(error, RobustError) else RobustError(what)
            except KeyboardInterrupt:
                if trainer.state.fn == "fit":
                    rank_zero_warn(_how_to_resume(trainer))
                raise
        records = evaluation.in_order(gather(mine, shard, failed))
        evaluation.remember(records)
        for doubt in evaluation.judge(records):
            rank_zero_warn(f"{predictor.name}: {doubt.message}" if predictor.name else doubt.message)
        if trainer.is_global_zero:
            self._runs.keep(predictor, name, when, records, began)
        trainer.strategy.barrier("RobustnessMonitor")
        if partial is not None:
            partial.unlink(missing_ok=True)
        return records

    def _log(self, pl_module: LightningModule, predictor: Predictor, values: dict[str, float]) -> None:
        # Every rank has the same values; sync_dist tells Lightning that this is meant.
        pl_module.log_dict({predictor.prefix + key: value for key, value in values.items()}, sync_dist=True)

    def _logs(self, key: str | None) -> bool:
        """Whether a metric is the monitor's."""
        starts = tuple(one.prefix + start for one in self._predictors for start in KEY_PREFIXES)
        return key is not None and key.startswith(starts)

    def _settings(self) -> dict[str, Any]:
        """Return what ``run.json`` says of the monitor."""
        return {
            "recipe": self.recipe,
            "query_budget": self.query_budget,
            "total_query_budget": self.total_query_budget,
            "time_budget": self.time_budget,
            "autocast": self.autocast,
            "evaluation_seed": self.seed,
        }


def _how_to_resume(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    if not path:
        return "There is no checkpoint yet: this training starts anew."
    return (
        f"Resume the training from its last checkpoint: ckpt_path={path} (--ckpt_path on the command line)."
    )


def _at_last_step(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
