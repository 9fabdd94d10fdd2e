from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_robust.defenses.asam import ASAM
from lightning_robust.defenses.fish import Fish
from lightning_robust.defenses.sam import SAM
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import DictLoss, PlainEncoder, loader, rows


def loss_of(module, batch):
    logits = module(batch["input_ids"], batch["attention_mask"])
    return nn.functional.cross_entropy(logits, batch["labels"])


def risk_of(module, batch):
    logits = module(batch["input_ids"], batch["attention_mask"])
    each = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    risks = torch.stack([each[batch["domain"] == d].mean() for d in batch["domain"].unique()])
    return risks.mean() + 3.0 * ((risks - risks.mean()) ** 2).mean()


def sharp_gradient(module, batch, defense, loss=loss_of):
    """The gradient at θ + ε on one flat vector of all weights, at a copy of the module."""
    moved = copy.deepcopy(module)
    weights = list(moved.parameters())
    flat = torch.cat([p.detach().flatten() for p in weights])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(moved, batch), weights)])
    if isinstance(defense, ASAM):
        scale = flat.abs() + defense.eta
        epsilon = defense.rho * scale**2 * gradient / (scale * gradient).norm()
    else:
        epsilon = defense.rho * gradient / gradient.norm()
    nn.utils.vector_to_parameters(flat + epsilon, weights)
    return torch.autograd.grad(loss(moved, batch), weights)


def by_hand(module, data, defense, *, accumulate=1, loss=loss_of):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        for index, batch in enumerate(data):
            for p, g in zip(module.parameters(), sharp_gradient(module, batch, defense, loss), strict=True):
                p.grad = g / accumulate if p.grad is None else p.grad + g / accumulate
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("defense", [SAM(rho=0.3), ASAM(rho=0.7, eta=0.05)], ids=["sam", "asam"])
@pytest.mark.parametrize("cls", [PlainEncoder, DictLoss])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_update_written_out(defense, cls, accumulate):
    ours, theirs = cls().double(), cls().double()
    fit(ours, [defense], accumulate_grad_batches=accumulate, precision="64-true")
    by_hand(theirs, loader(), defense, accumulate=accumulate)
    assert_same_weights(ours, theirs)


def test_around_another_defense_equals_the_maths():
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    # SAM goes around V-REx wherever it stands.
    fit(ours, [VREx(beta=3.0, warmup_steps=0), SAM(rho=0.3)], precision="64-true")
    by_hand(theirs, loader(), SAM(rho=0.3), loss=risk_of)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_zero_strength_is_plain_training(cls):
    plain, defended = PlainEncoder(), PlainEncoder()
    fit(plain, [])
    fit(defended, [cls(rho=0.0)])
    assert_same_weights(defended, plain, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_are_back_bit_for_bit_before_the_optimizer_steps(precision):
    seen = []

    class Watched(PlainEncoder):
        def on_train_batch_start(self, batch, batch_idx):
            self.before = copy.deepcopy(dict(self.state_dict()))

        def training_step(self, batch, batch_idx):
            seen.append(torch.equal(self.hidden.weight, self.before["hidden.weight"]))
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            names = [name for name, _ in self.named_parameters()]
            seen.append(all(torch.equal(self.state_dict()[n], self.before[n]) for n in names))

    fit(Watched(), [SAM(rho=0.1)], max_epochs=1, precision=precision)
    assert seen == [True, False, True] * 4


def test_frozen_and_unused_weights_stay():
    class Partly(PlainEncoder):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.embed.weight.requires_grad_(False)

    module = Partly()
    before = copy.deepcopy(module)
    fit(module, [SAM(rho=0.5)])
    assert torch.equal(module.embed.weight, before.embed.weight)
    assert torch.equal(module.unused.weight, before.unused.weight)
    assert not torch.equal(module.hidden.weight, before.hidden.weight)


@pytest.mark.parametrize("ends", ["skip", "raise"])
def test_a_second_pass_that_ends_early_leaves_no_trace(ends):
    class Ends(PlainEncoder):
        def training_step(self, batch, batch_idx):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 2:
                return super().training_step(batch, batch_idx)
            if ends == "raise":
                raise RuntimeError("user code broke")
            return None

    module = Ends()
    before = copy.deepcopy(module.state_dict())
    if ends == "raise":
        with pytest.raises(RuntimeError, match="user code broke"):
            fit(module, [SAM()])
    else:
        fit(module, [SAM()])
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_an_exception_between_the_passes_and_the_step_puts_the_weights_back():
    class Breaks(PlainEncoder):
        def backward(self, loss, *args, **kwargs):
            raise RuntimeError("user code broke")

    module = Breaks()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="user code broke"):
        fit(module, [SAM()])
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_what_is_logged_is_the_first_pass():
    reference = fit(PlainEncoder(learning_rate=0.0), [], max_epochs=1).callback_metrics
    measured = fit(PlainEncoder(learning_rate=0.0), [SAM(rho=1.0)], max_epochs=1).callback_metrics
    for key in ("train_loss_epoch", "train_accuracy"):
        torch.testing.assert_close(measured[key], reference[key])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    fit(PlainEncoder(), [SAM()])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    fit(PlainEncoder(), [])
    assert torch.equal(drawn, torch.rand(1))


def test_under_a_gradient_scaler_the_move_is_the_same():
    def train(*plugins):
        module = PlainEncoder()
        fit(module, [SAM(rho=0.3)], plugins=list(plugins))
        return module

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = train(MixedPrecision("16-mixed", "cpu", scaler)), train()
    start = PlainEncoder()
    for name, p in plain.named_parameters():
        moved, expected = (
            scaled.get_parameter(name) - start.get_parameter(name),
            p - start.get_parameter(name),
        )
        assert (moved - expected).norm() < 0.05 * expected.norm()


class Sharded(PlainEncoder):
    """Each of n processes sees its share of the same eight rows a step."""

    def train_dataloader(self):
        number, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(rows()[rank::number], batch_size=8 // number)


@pytest.mark.slow
def test_each_process_has_its_own_epsilon_and_all_end_with_the_same_weights():
    ours, theirs = Sharded().double(), PlainEncoder().double()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        use_distributed_sampler=False,
        callbacks=[SAM(rho=0.3)],
        precision="64-true",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(ours)
    halves = [
        batch
        for parts in zip(*(DataLoader(rows()[r::2], batch_size=4) for r in (0, 1)), strict=True)
        for batch in parts
    ]
    by_hand(theirs, halves, SAM(rho=0.3), accumulate=2)
    assert_same_weights(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SAM, {"rho": -0.1}, "Expected `rho` to be a number >= 0, but got -0.1"),
        (SAM, {"rho": float("nan")}, "Expected `rho`"),
        (ASAM, {"eta": -1.0}, "Expected `eta`"),
    ],
)
def test_bad_settings(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)


def test_weights_are_put_back_where_no_backward_pass_follows():
    """So in the last epoch of Lightning's averaging, which is for batch normalisation alone."""

    class Normed(PlainEncoder):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm1d(5), self.head)

    module = Normed()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, device=None)
    fit(module, [averaging, SAM(rho=0.5)], max_epochs=3)
    average = dict(averaging._average_model.named_parameters())
    assert all(torch.equal(p, average[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("two", [[SAM(), Fish()], [SAM(), ASAM()]])
def test_two_defenses_that_move_the_weights_are_refused(two):
    with pytest.raises(ConfigError, match="Expected one defense that moves the weights"):
        fit(PlainEncoder(), two)


def test_reentrant_gradient_checkpointing_is_refused_when_fit_starts():
    module = HuggingFaceProject()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="not reentrant"):
        fit(module, [SAM()], batches(module))
