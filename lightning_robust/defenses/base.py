"""The defense contract: a Lightning callback that wraps the training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import Self

from lightning_robust.defenses.chain import Batch, DefenseChain, Step
from lightning_robust.defenses.checks import check_names, expect_seed
from lightning_robust.defenses.settings import settings_of
from lightning_robust.errors import ConfigError

__all__ = ["Batch", "Defense", "Step", "starts_anew", "take_turns"]


class Defense(Callback):
    """Base of all training-time defenses.

    A defense overrides `training_loss`, or only Lightning's own hooks. Defenses compose in callback order,
    like middleware: the first one is the outermost, and the ``step`` that it is given is the next one's loss.
    Those whose `place` says so come first or last wherever they stand in the list.

    Works on any LightningModule with automatic optimization whose ``training_step`` returns a loss
    or a dict with ``loss``. The module's class, signature and checkpoints stay as they are.

    Example::

        class LabelFree(Defense):
            def training_loss(self, step, batch):
                return 0.5 * (step(batch) + step(batch))
    """

    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "both"
    """The kind of robustness that it was made for."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it needs of the module or the batch besides a loss."""
    cost: ClassVar[float | None] = None
    """Time of training relative to none, see benchmarks/README.md; None where it was not measured."""
    place: ClassVar[Literal["data", "first", "anywhere", "last"]] = "anywhere"
    """``data``: it adds rows to the batch, which all others then see. ``first``: it acts on the weights, around the
    others. ``last``: it changes the loss of each single pass."""

    turn: ClassVar[int] = 3
    """When its hooks are called: the lower come first, see `take_turns`; other callbacks have 3."""

    settings: dict[str, Any]
    """The arguments that it was made with, defaults included."""

    _chain: DefenseChain | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.settings = settings_of(cls.__init__, args, kwargs, without=("args", "kwargs"))
        expect_seed(self.settings.get("seed", 0))
        if cls.__module__.partition(".")[0] == "lightning_robust":
            # What a user's own defense calls `layers` need not be names.
            check_names(self.settings)
        return self

    @property
    def state_key(self) -> str:
        """Tells apart, in checkpoints, the states of several defenses of one class with different settings."""
        plain = {k: v if _is_plain(v) else type(v).__name__ for k, v in self.settings.items()}
        return self._generate_state_key(**plain)

    def training_loss(self, step: Step, batch: Batch) -> Tensor:
        """Return the loss to minimise, a scalar.

        Its gradient with respect to the weights must be the defense's update; ``step`` may be called
        any number of times, on the batch, on a part of it (see `DefenseChain.on_rows`) or on another.
        """
        return step(batch)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `ConfigError` when fit starts if the defense cannot work on this module."""

    @property
    def chain(self) -> DefenseChain:
        """The composition that this defense is part of, while fit runs.

        Raises:
            ConfigError: Outside of fit.
        """
        if self._chain is None:
            raise ConfigError(
                f"Expected {type(self).__name__} to run inside Trainer.fit, but no fit is running."
            )
        return self._chain

    @property
    def wraps_step(self) -> bool:
        """Whether it has a loss of its own, and not Lightning's hooks only."""
        return type(self).training_loss is not Defense.training_loss

    @property
    def hands_loss_on(self) -> bool:
        """Whether it returns what one call of ``step`` on a batch of its own gave, unchanged."""
        return False

    @property
    def is_outermost(self) -> bool:
        """Whether this defense's loss goes to Lightning as it is."""
        defenses = self.chain.defenses
        return self in defenses and all(one.hands_loss_on for one in defenses[: defenses.index(self)])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        defenses = [callback for callback in trainer.callbacks if isinstance(callback, Defense)]  # type: ignore[attr-defined]
        if defenses[0] is self:
            chain = DefenseChain(trainer, pl_module, defenses)
            for defense in defenses:
                defense._chain = chain
                defense.check(trainer, pl_module)
            chain.install()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._chain is not None:
            self._chain.release_gradients()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()

    def _unwrap(self) -> None:
        if self._chain is not None:
            self._chain.restore()
            self._chain = None


def starts_anew(trainer: Trainer) -> bool:
    """Whether what a defense remembers is of another training than the fit that is set up now.

    A checkpoint's state is loaded after that. Otherwise the trainer goes on with what it did before.
    """
    # The path may be that of an evaluation, between two fits that belong together.
    return trainer.current_epoch == 0 and (trainer.global_step == 0 or trainer.ckpt_path is not None)


def take_turns(trainer: Trainer) -> None:
    """Put the trainer's callbacks into the order of their `Defense.turn`, otherwise as they were."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    turn = {id(one): one.turn if isinstance(one, Defense) else Defense.turn for one in callbacks}
    trainer.callbacks = sorted(callbacks, key=lambda one: turn[id(one)])  # type: ignore[attr-defined]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in value.values())
    return value is None or isinstance(value, str | int | float | bool)
