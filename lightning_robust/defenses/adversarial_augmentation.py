"""AdversarialAugmentation: train on the training set and on successful attacks on it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_robust.attacks import Attack, AttackEngine, get_attack
from lightning_robust.attacks.blind import rehearse
from lightning_robust.data.environments import as_environment
from lightning_robust.data.items import Item
from lightning_robust.data.sampling import seeded_sample
from lightning_robust.defenses.base import Batch, Defense, Step, starts_anew, take_turns
from lightning_robust.defenses.batches import batch_size, take_rows
from lightning_robust.defenses.checks import check_epochs, expect
from lightning_robust.defenses.domains import UNKNOWN
from lightning_robust.defenses.extra_rows import join_rows, rows_like
from lightning_robust.defenses.texts import cut_at, length_limit, longest_rows, needed_tokenizer
from lightning_robust.defenses.training_attack import TrainingAttack, perturbed
from lightning_robust.errors import ConfigError
from lightning_robust.modules.unseen import leaving_no_trace
from lightning_robust.modules.victim import find_victim
from lightning_robust.results import Record

logger = logging.getLogger(__name__)

_KEPT_ROWS = 8  # a whole text may be as long as those that were cut
_NOT_IN_KEY = ("items", "collate", "victim", "tokenizer", "max_batch_tokens", "progress")


class AdversarialAugmentation(Defense):
    """Minimise L on the training set and on the attacks that succeeded on a ``share`` of it, made anew as it trains.

    After ``clean_epochs`` epochs, at the start of every ``every_n_epochs``-th one, a random share of the training
    examples is attacked with the weights as they are. The adversarial texts of those that succeed join the data, with
    their example's label and domain, until the next attack: spread evenly over the batches, each once per epoch in
    a new order. With n rows of a batch and m adversarial ones the loss is (n·L(batch) + m·α·L(adversarial)) /
    (n + m·α), where α is ``weight``. Steps per epoch, data loaders and learning-rate schedules stay as they are.
    Where the data loader's longest row before the attack is but the beginning of its text, adversarial ones are cut there.

    Source: Yoo and Qi 2021, arXiv 2109.00544 (A2T); attacking between epochs is theirs. There the training set is
    attacked until a share of its size has succeeded, always with A2T (``attack="a2t"``); here a share is attacked,
    which bounds the queries. The default attack is DeepWordBug: it needs no files and no second model, and two dozen
    queries a text. An attack that is measured afterwards is then one that was trained against.

    Order: adversarial rows are added outside of all other defenses, wherever this one stands in the list, so that
    with GroupDRO or CORAL they count as rows of their domain. With α = 1 they and the batch are one call of
    the step, with another two. What the step logs is that of the one batch, of the loaded batch if there are two.

    An attack leaves no trace in training: random states, modes and gradients stay. Its results are appended to
    ``augmentation/epoch=….jsonl`` in the run's folder as they come, and a resumed run goes on from there. Logged after
    each attack: ``augmentation/share_new`` (successes / training examples), ``augmentation/success_rate`` (among
    those first classified correctly) and ``augmentation/queries`` (mean per attacked example).

    Args:
        attack: Name, or settings with a ``name``, of any attack on texts.
        share: Of the training examples, to attack each time; 0 is training without the defense.
        every_n_epochs: From one attack to the next.
        clean_epochs: Before the first attack.
        query_budget: Queries that one search may make; None means no limit.
        weight: α, of an adversarial row; 0 is training without the defense.
        items: The training examples: a list of ``(text, label)`` or of `Item`, a TextSource or its settings. By
            default those of our data module. An item's domain is the data module's name for it, else the
            number that batches hold.
        collate: Makes a batch of a list of `Item`, as the training data loader does, where the tokenizer alone
            cannot (batches that are no dicts with ``input_ids``).
        victim: Maps the module to a callable ``texts -> probabilities (n, classes)``; by default the module's own
            ``predict_proba``, or the Hugging Face model that it holds.
        tokenizer: By default that of the module or its data module; a name or path is loaded.
        label_key: Where a batch holds its rows' classes.
        domain_key: Where a batch may hold its rows' domains.
        max_batch_tokens: Padded tokens in one call of the victim.
        progress: Whether to show a progress bar; None shows it on a terminal.
        seed: Of examples, attacks and order.

    Raises:
        ConfigError: If a setting is out of range; when fit starts, if there are no training texts, no victim, no
            tokenizer, something that the attack needs is missing, training ends before the first attack, the number
            of batches is not known, or ``weight`` is not 1 together with a defense that compares domains or moves
            the weights; at the first batch, if rows cannot be added to it.
    """

    aim = "adversarial"
    needs: ClassVar[tuple[str, ...]] = ("texts", "tokenizer")
    place = "data"
    turn = 2  # it attacks what the last epoch trained, before JTT puts the starting weights back

    def __init__(
        self,
        attack: str | dict[str, Any] = "deepwordbug",
        share: float = 0.2,
        every_n_epochs: int = 1,
        clean_epochs: int = 1,
        query_budget: int | None = 200,
        weight: float = 1.0,
        items: Any = None,
        collate: Callable[[list[Item]], Any] | None = None,
        victim: Callable[[LightningModule], Any] | None = None,
        tokenizer: Any = None,
        label_key: str | int = "labels",
        domain_key: str | int = "domain",
        max_batch_tokens: int = 16384,
        progress: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.attack = _text_attack(attack)
        self.share = expect("share", share, at_least=0, at_most=1)
        self.every_n_epochs = expect("every_n_epochs", every_n_epochs, at_least=1, whole=True)
        self.clean_epochs = expect("clean_epochs", clean_epochs, at_least=0, whole=True)
        if query_budget is not None:
            expect("query_budget", query_budget, at_least=1, whole=True)
        self.query_budget = query_budget
        self.weight = expect("weight", weight, at_least=0)
        self.items = items
        self.collate = collate
        self.victim = victim
        self.tokenizer = tokenizer
        self.label_key = label_key
        self.domain_key = domain_key
        self.max_batch_tokens = expect("max_batch_tokens", max_batch_tokens, at_least=1, whole=True)
        self.progress = progress
        self.seed = seed
        self._items: Sequence[Item] = ()
        self._domains: dict[str, int] | None = None
        self._tokenizer: Any = None
        self._max_length = 0
        self._longest: list[list[int]] = []
        self._cut_at: int | None = None
        self._tried = False
        self._pool: list[Item] = []
        self._attacked: int | None = None
        self._order: tuple[int, list[int]] | None = None
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        # Without the examples, which would make the key as long as the data set.
        kept = {name: value for name, value in self.settings.items() if name not in _NOT_IN_KEY}
        return self._generate_state_key(**kept)

    # When fit starts ----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        take_turns(trainer)
        if stage == "fit" and starts_anew(trainer):
            self._pool, self._attacked, self._folder = [], None, None
            self._longest, self._cut_at = [], None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active:
            return
        self._tried, self._order = False, None
        first = self.clean_epochs
        check_epochs(trainer, first, f"clean_epochs={first}, after which AdversarialAugmentation attacks")
        self._items = self._training_items(trainer)
        self._tokenizer = self._needed_tokenizer(pl_module)
        if self._tokenizer is not None:
            self._max_length = length_limit(trainer, pl_module, self._tokenizer)
        names = getattr(getattr(trainer, "datamodule", None), "domains", None)
        self._domains = None if names is None else {name: number for number, name in enumerate(names)}
        self._check_composition()
        with leaving_no_trace(trainer, pl_module):
            victim = self._find_victim(pl_module)
            # An engine checks attack and victim before the first item.
            AttackEngine(victim, progress=False).stream(self.attack, [], self.query_budget)
            rehearse([self.attack], victim)

    @property
    def _active(self) -> bool:
        return self.share > 0 and self.weight > 0

    def _training_items(self, trainer: Trainer) -> Sequence[Item]:
        given = self.items
        if given is None:
            given = getattr(getattr(trainer, "datamodule", None), "train_items", None)
        if given is None:
            raise ConfigError(
                "AdversarialAugmentation attacks training examples, but found no texts: the trainer has no data module "
                "with `train_items`, as TextDataModule has. Give them: items=[(text, label), ...]."
            )
        return as_environment(given, "training examples", "clean").items

    def _needed_tokenizer(self, module: LightningModule) -> Any:
        try:
            return needed_tokenizer(self, module, self.tokenizer)
        except ConfigError as error:
            if self.collate is not None and self.tokenizer is None:
                return None
            raise ConfigError(f"{error} Or, without one, give `collate` and `victim`.") from error

    def _find_victim(self, module: LightningModule) -> Any:
        if self.victim is not None:
            return self.victim(module)
        try:
            return find_victim(module, self._tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{error} Or give AdversarialAugmentation(victim=module -> victim).") from error

    def _check_composition(self) -> None:
        others = self.chain.defenses
        one_batch = [one for one in others if "domains" in one.needs or one.place == "first"]
        if one_batch and self.weight != 1:
            raise ConfigError(
                f"Expected `weight` to be 1 together with {_names(one_batch)}, but got {self.weight}: two calls of the step "
                "are two batches to a defense that compares domains or moves the weights."
            )
        names = _names([one for one in others if "domains" in one.needs])
        unknown = [item for item in self._items if self._domain(item) == UNKNOWN]
        if names and self.collate is None and unknown:
            rank_zero_warn(
                f"{len(unknown)} of {len(self._items)} training examples, first {unknown[0].id!r}, have no domain that "
                f"batches know: what attacks make of them is of unknown domain ({UNKNOWN}) for {names}. Give items="
                f'[Item(id, text, label, domain="0"), ...] with the numbers that batches hold under {self.domain_key!r}.'
            )

    def _domain(self, item: Item) -> int:
        if self._domains is not None:
            return self._domains.get(item.domain, UNKNOWN)
        return int(item.domain) if item.domain.isdecimal() else UNKNOWN

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active:
            return
        if math.isinf(trainer.num_training_batches):
            raise ConfigError(
                "Expected a training data loader of known length, over whose batches adversarial rows are spread, but it "
                "has none. Give the data set a `__len__`, or set Trainer(limit_train_batches=1000)."
            )
        resumed = trainer.ckpt_path is not None and self._folder is not None and self._folder.is_dir()
        if not resumed:
            base = trainer.log_dir if trainer.loggers else trainer.default_root_dir
            self._folder = None if _is_dry(trainer) else Path(base or ".") / "augmentation"

    # Attacks ------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the start of an epoch, a hook that is left out by some ways to resume.
        epoch = trainer.current_epoch
        since = epoch - self.clean_epochs
        due = epoch - since % self.every_n_epochs
        if not self._active or since < 0 or (self._attacked is not None and self._attacked >= due):
            return
        chosen = self._chosen(trainer)
        self._cut_at = self._length_of_cut_rows(trainer)
        attack = TrainingAttack(
            self.attack,
            self._find_victim(pl_module),
            self.query_budget,
            self.max_batch_tokens,
            self.progress,
            self.seed,
            self._folder,
        )
        found = attack.run(trainer, pl_module, chosen)
        self._pool = [new for item in chosen if (new := perturbed(item, found.get(item.id))) is not None]
        self._attacked, self._order = epoch, None
        self._log(pl_module, list(found.values()))

    def _chosen(self, trainer: Trainer) -> list[Item]:
        size = 4 if _is_dry(trainer) else max(1, round(self.share * len(self._items)))
        keys = [(trainer.current_epoch, item.id) for item in self._items]
        return seeded_sample(self._items, keys, size, self.seed)

    def _length_of_cut_rows(self, trainer: Trainer) -> int | None:
        if self._tokenizer is None or self.collate is not None:
            return None
        found = cut_at(self._longest, [item.text for item in self._items], self._tokenizer, self._max_length)
        mine = torch.tensor(found or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max")) or None

    def _note_longest(self, batch: Batch) -> None:
        rows = longest_rows(batch, self._tokenizer)
        more = len(rows[0]) - (len(self._longest[0]) if self._longest else 0)
        if more >= 0:
            kept = [] if more else self._longest
            self._longest = [*kept, *(row for row in rows if row not in kept)][:_KEPT_ROWS]

    def _log(self, module: LightningModule, records: Sequence[Record]) -> None:
        attacked = sum(record.status in ("success", "failed") for record in records)
        values = {
            "share_new": len(self._pool) / len(self._items),
            "success_rate": len(self._pool) / max(1, attacked),
            "queries": sum(record.queries for record in records) / max(1, len(records)),
        }
        # Every rank has the same values; sync_dist tells Lightning that this is meant.
        named = {f"augmentation/{name}": value for name, value in values.items()}
        module.log_dict(named, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        rank_zero_info(
            f"Epoch {self._attacked}: {self.attack.name} succeeded on {len(self._pool)} of {len(records)} "
            "training examples, which join the data."
        )

    # Training -----------------------------------------------------------------------------------

    @property
    def hands_loss_on(self) -> bool:
        return self.weight == 1

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        if not self._active:
            return step(batch)
        self._try(batch)
        if self.collate is None:
            self._note_longest(batch)
        items = self._due()
        if not items:
            return step(batch)
        joined = self._joined(batch, items)
        if self.weight == 1:
            with self.chain.replacing(joined):
                return step(joined)
        own, new = batch_size(batch), self.weight * len(items)
        # The batch itself last: where no pass is plain, the last one is logged.
        rows = torch.arange(own, own + len(items))
        with self.chain.perturbing(), self.chain.on_rows(rows):
            adversarial = step(take_rows(joined, rows))
        return (own * step(batch) + new * adversarial) / (own + new)

    def _due(self) -> list[Item]:
        """Return this batch's part of the pool: all of them are the pool, in this epoch's order."""
        trainer = self.chain.trainer
        if self._order is None or self._order[0] != trainer.current_epoch:
            order = list(range(len(self._pool)))
            random.Random(f"{self.seed}:{trainer.current_epoch}").shuffle(order)
            self._order = trainer.current_epoch, order[trainer.global_rank :: trainer.world_size]
        mine = self._order[1]
        number, total = trainer.fit_loop.batch_idx, int(trainer.num_training_batches)
        return [self._pool[i] for i in mine[len(mine) * number // total : len(mine) * (number + 1) // total]]

    def _try(self, batch: Batch) -> None:
        """Raise at a training's first batch, not after the clean epochs, if rows cannot be added to it."""
        if not self._tried:
            with isolate_rng():
                self._joined(batch, list(self._items[:1]))
            self._tried = True

    def _joined(self, batch: Batch, items: list[Item]) -> Batch:
        """Return the batch with a row for each item behind its own."""
        rows = self._rows(batch, items) if self.collate is None else [self._collated(self.collate, items)]
        if self._tokenizer is None:
            return join_rows([batch, *rows])
        return join_rows([batch, *rows], self._tokenizer.pad_token_id, self._tokenizer.padding_side)

    def _rows(self, batch: Batch, items: list[Item]) -> list[Batch]:
        keys: dict[str, Any] = {"label_key": self.label_key, "domain_key": self.domain_key}
        limit = self._max_length if self._cut_at is None else self._cut_at
        return rows_like(batch, items, self._tokenizer, limit, self._domain, **keys)

    def _collated(self, collate: Callable[[list[Item]], Any], items: list[Item]) -> Batch:
        """Make a batch, and treat it as Lightning does what a data loader gives."""
        made = collate(items)
        if batch_size(made) != len(items):
            raise ConfigError(
                f"Expected `collate` to make a batch of {len(items)} rows of as many items, but got {batch_size(made)}."
            )
        trainer = self.chain.trainer
        made = trainer.precision_plugin.convert_input(made)
        made = self.chain.module._on_before_batch_transfer(made, dataloader_idx=0)
        return trainer.strategy.batch_to_device(made, dataloader_idx=0)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        pool = [[one.id, one.text, one.label, one.domain] for one in self._pool]
        folder = None if self._folder is None else str(self._folder)
        lengths = {"longest": self._longest, "cut_at": self._cut_at}
        return {"attacked": self._attacked, "folder": folder, "pool": pool, **lengths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._attacked = state_dict["attacked"]
        self._longest, self._cut_at = state_dict["longest"], state_dict["cut_at"]
        self._folder = None if state_dict["folder"] is None else Path(state_dict["folder"])
        self._pool = [Item(*row) for row in state_dict["pool"]]
        self._order = None


def _text_attack(spec: str | Mapping[str, Any]) -> Attack:
    if isinstance(spec, Mapping) and "name" in spec:
        attack = get_attack(**spec)
    elif isinstance(spec, str):
        attack = get_attack(spec)
    else:
        raise ConfigError(f"Expected `attack` to be a name, or settings with a `name`, but got {spec!r}.")
    if attack.kind in ("embedding", "instruction"):
        raise ConfigError(
            f"Expected `attack` to be one on texts, but `{attack.name}` changes the {attack.kind}: what it finds is no "
            "training example."
        )
    return attack


def _names(defenses: Sequence[Defense]) -> str:
    return ", ".join(type(one).__name__ for one in defenses)


def _is_dry(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
