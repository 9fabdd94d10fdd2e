"""JTT: train, find the training errors, train again with more weight on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_robust.defenses.base import Batch, Defense, Step, starts_anew
from lightning_robust.defenses.batches import UNLABELLED, _holds, batch_size
from lightning_robust.defenses.checks import check_epochs, expect
from lightning_robust.defenses.head import ClassifierHead, Pass, Seen
from lightning_robust.defenses.row_losses import classes_of, cross_entropies, mean_over_rows
from lightning_robust.defenses.weight_averaging import WeightAveraging
from lightning_robust.errors import ConfigError


class JTT(Defense):
    """Train a few epochs, go back to the starting weights, and train on with ``upweight`` on what was misclassified.

    In the second stage the loss is L + mean((w − 1) · CE), with w = ``upweight`` for the errors of the first and 1
    for other rows, divided by its mean over the training set, so that the size of the loss stays. Where the training
    step's loss L is the mean cross-entropy CE, this is the mean of w · CE.

    Both stages are one fit: ``max_epochs`` counts both, the learning rate's schedule goes on, and the optimizers'
    state starts anew with the weights (trainable ones and buffers), as does a WeightAveraging beside it. A checkpoint
    from the first stage, which the best one of the run may be, is an undefended model.

    Source: Liu et al. 2021, arXiv 2107.09044. There the model at the end of the first stage classifies the training
    set once more; here errors are those made while training in the last epoch of the first stage (in a batch's plain
    pass, or the last one where a defense makes none), which costs nothing but counts a few more. There errors are
    repeated ``upweight`` times, which makes epochs longer; here they are weighted.

    Rows are told apart by ``id_key``; where a batch does not hold it, by their label and tokens (``input_ids`` as far
    as ``attention_mask`` goes). A row that the first stage did not see counts as classified correctly, as do unlabelled
    ones. What a defense adds to the batch is no error of its own; with an example's ``id_key`` it has that one's weight.

    Args:
        identification_epochs: Of the first stage; 0 is training without the defense.
        upweight: Weight of the errors relative to other rows.
        id_key: Where a batch holds what identifies its rows: a dict key or a tuple index.
        label_key: Where a batch holds its rows' classes: a dict key or a tuple index.
        head: Name of the submodule whose output is the logits, where it cannot be found.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no logits, training ends with the
            first stage, or goes on from a checkpoint without this defense; at the first batch, if there are no labels
            or rows cannot be told apart.
    """

    aim = "ood"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    place = "last"
    cost = 0.99

    def __init__(
        self,
        identification_epochs: int = 1,
        upweight: float = 20.0,
        id_key: str | int = "ids",
        label_key: str | int = "labels",
        head: str | None = None,
    ) -> None:
        super().__init__()
        self.identification_epochs = expect(
            "identification_epochs", identification_epochs, at_least=0, whole=True
        )
        self.upweight = expect("upweight", upweight, at_least=1)
        self.id_key = id_key
        self.label_key = label_key
        self.head = head
        self._head: ClassifierHead | None = None
        self._start: dict[str, Any] | None = None
        self._wrong: dict[str, bool] = {}
        self._retraining = False
        self._keys: list[str] = []
        self._settled: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and starts_anew(trainer):
            self._start, self._wrong, self._retraining = None, {}, False

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.identification_epochs == 0:
            return
        self._head = ClassifierHead(pl_module, self.head)
        first = self.identification_epochs
        check_epochs(trainer, first, f"identification_epochs={first}, after which JTT starts anew")

    # Stages -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.identification_epochs == 0:
            return
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            optimizers = [_copied(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
            self._start = {"weights": {}, "optimizers": optimizers}
        elif self._start is None and not self._retraining:
            raise ConfigError(
                "Expected JTT to train from the first step on, but training goes on from a checkpoint that was made "
                "without it. Load its weights only, or resume from a checkpoint of a run with JTT."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the start of an epoch, a hook that is left out by some ways to resume.
        if self.identification_epochs == 0:
            return
        if trainer.current_epoch >= self.identification_epochs and not self._retraining:
            self._gather(trainer)
            self._restart(trainer, pl_module)
        if self._start is not None:
            # Each batch anew: layers may be unfrozen at any time.
            for name, value in _weights(pl_module):
                if name not in self._start["weights"]:
                    self._start["weights"][name] = _copied(value)
        if self._identifies(trainer) and batch_idx == 0:
            self._wrong = {}
        if self._retraining or self._identifies(trainer):
            self._keys, self._settled = self._keys_of(batch), set()

    def _identifies(self, trainer: Trainer) -> bool:
        return trainer.current_epoch == self.identification_epochs - 1

    def _restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._start is not None
        now = dict([*pl_module.named_parameters(), *pl_module.named_buffers()])
        with torch.no_grad():
            for name, value in self._start["weights"].items():
                now[name].copy_(value)
        for optimizer, state in zip(trainer.optimizers, self._start["optimizers"], strict=True):
            # The groups, and with them the learning rates, go on.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": _copied(state)})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.reset()
        self._start, self._retraining = None, True
        share = sum(self._wrong.values()) / max(1, len(self._wrong))
        pl_module.log("jtt/error_share", share, sync_dist=True, batch_size=1)

    def _gather(self, trainer: Trainer) -> None:
        if trainer.world_size == 1:
            return
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, self._wrong)
        merged: dict[str, bool] = {}
        for part in parts:
            for key, wrong in part.items():
                merged[key] = merged.get(key, False) or wrong
        self._wrong = merged

    # Loss ---------------------------------------------------------------------------------------

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        trainer = self.chain.trainer
        if self.identification_epochs == 0 or not (self._retraining or self._identifies(trainer)):
            return step(batch)
        assert self._head is not None
        labels = classes_of(batch, self.label_key)
        keys = self._keys_of_call(batch)
        with self._head.watch(self.chain) as seen:
            loss = step(batch)
        if not self._retraining:
            self._note_errors(keys, labels, seen)
            return loss
        excess = self._weights_of(keys) - 1

        def correction(each: Pass) -> Tensor:
            return excess[each.rows].to(each.logits) * cross_entropies(each, labels)

        return loss + mean_over_rows(seen, labels, correction)

    def _note_errors(self, keys: list[str], labels: Tensor, seen: Seen) -> None:
        first = seen.passes()[0]
        predicted, own = first.logits.detach().argmax(-1).cpu(), labels.cpu()[first.rows]
        places = self._places(len(keys))
        for row, guess, label in zip(first.rows.tolist(), predicted.tolist(), own.tolist(), strict=True):
            if label == UNLABELLED or places[row] >= len(self._keys) or keys[row] in self._settled:
                continue
            self._wrong[keys[row]] = guess != label
        if not self.chain.perturbations:
            self._settled.update(keys[row] for row in first.rows.tolist() if places[row] < len(self._keys))

    def _weights_of(self, keys: list[str]) -> Tensor:
        wrong = sum(self._wrong.values())
        mean = 1 + (self.upweight - 1) * wrong / max(1, len(self._wrong))
        weights = [self.upweight if self._wrong.get(key, False) else 1.0 for key in keys]
        return torch.tensor(weights, dtype=torch.float64) / mean

    def _keys_of_call(self, batch: Batch) -> list[str]:
        # Those of the batch as it was loaded: a defense around this one may have changed its tokens.
        places = self._places(batch_size(batch))
        known = len(self._keys)
        new = self._keys_of(batch) if max(places) >= known else []  # it added rows
        return [self._keys[place] if place < known else new[row] for row, place in enumerate(places)]

    def _places(self, size: int) -> Sequence[int]:
        """Where the ``size`` rows of a call stand in the loaded batch, those that a defense added behind it."""
        return self.chain.rows_since(0) or range(size)

    def _keys_of(self, batch: Batch) -> list[str]:
        if _holds(batch, self.id_key):
            ids = batch[self.id_key]
            return [str(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            return _content_keys(batch, classes_of(batch, self.label_key))
        there = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            f"Expected each training batch to hold {self.id_key!r} or 'input_ids', by which JTT tells rows apart, but "
            f'it holds: {there}. Name the entry: id_key="name" for a dict, id_key=2 for a tuple.'
        )

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        # Every rank makes a checkpoint's content, so all can take part.
        if self._chain is not None and not self._retraining:
            self._gather(self.chain.trainer)
        return {"retraining": self._retraining, "wrong": dict(self._wrong), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._retraining = state_dict["retraining"]
        self._wrong = dict(state_dict["wrong"])
        self._start = state_dict["start"]


def _weights(module: LightningModule) -> list[tuple[str, Tensor]]:
    trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    return [*trained, *module.named_buffers()]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return value


def _content_keys(batch: Mapping[str, Any], labels: Tensor) -> list[str]:
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    kept = mask.cpu() != 0 if isinstance(mask, Tensor) else torch.ones_like(ids, dtype=torch.bool)
    rows = zip(ids, kept, labels.tolist(), strict=True)
    texts = (f"{label}:{row[keep].tolist()}" for row, keep, label in rows)
    return [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
