from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_robust.defenses.fish import Fish
from lightning_robust.defenses.lp_ft import LPFT
from lightning_robust.defenses.weight_averaging import WeightAveraging
from lightning_robust.errors import ConfigError
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder, loader, rows

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Watched(PlainEncoder):
    """Notes the order of the domains that it is called on; any optimizer."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.optimizer = optimizer
        self.order, self.rates = [], []

    def training_step(self, batch, batch_idx):
        self.order[-1].append(batch["domain"].unique().tolist())
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        self.order.append([])
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_hand(module, data, order, *, optimizer, epsilon, clip=None, epochs=2):
    optimizer = OPTIMIZERS[optimizer](module.parameters())
    batches = iter(order)
    for _ in range(epochs):
        for batch in data:
            before = [p.detach().clone() for p in module.parameters()]
            for (domain,) in next(batches):
                part = {key: value[batch["domain"] == domain] for key, value in batch.items()}
                logits = module(part["input_ids"], part["attention_mask"])
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, part["labels"]).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
            with torch.no_grad():
                for p, start in zip(module.parameters(), before, strict=True):
                    p.copy_(start + epsilon * (p - start))
            for group in optimizer.param_groups:
                group["lr"] *= 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("epsilon", "clip"), [(0.5, None), (0.3, 0.2), (1.0, None)])
def test_equals_the_update_written_out(optimizer, epsilon, clip):
    ours = Watched(optimizer).double()
    theirs = copy.deepcopy(ours)
    trainer = fit(ours, [Fish(epsilon)], loader(16, 4), precision="64-true", gradient_clip_val=clip)
    assert all(sorted(calls) == [[0], [1], [2]] for calls in ours.order)
    assert len({str(calls) for calls in ours.order}) > 1
    assert trainer.global_step == 8
    torch.testing.assert_close(torch.tensor(ours.rates), ours.rates[0] * 0.9 ** torch.arange(8.0))
    by_hand(theirs, loader(16, 4), ours.order, optimizer=optimizer, epsilon=epsilon, clip=clip)
    assert_same_weights(ours, theirs)


def test_a_batch_with_one_domain_is_a_plain_step_of_which_epsilon_is_kept():
    ours, theirs = Watched().double(), Watched().double()
    data = loader(16, 4, domains=1)
    fit(ours, [Fish(0.25)], data, precision="64-true")
    assert ours.order == [[[0]]] * 8
    by_hand(theirs, data, ours.order, optimizer="sgd", epsilon=0.25)
    assert_same_weights(ours, theirs)


def test_batches_with_absent_domains_and_single_rows():
    ours, theirs = Watched().double(), Watched().double()
    data = loader(10, 2, domains=4)
    fit(ours, [Fish()], data, precision="64-true")
    assert {len(calls) for calls in ours.order} == {2}
    by_hand(theirs, data, ours.order, optimizer="sgd", epsilon=0.5)
    assert_same_weights(ours, theirs)


def test_zero_strength_is_plain_training():
    plain, defended = PlainEncoder(), PlainEncoder()
    fit(plain, [])
    fit(defended, [Fish(epsilon=0.0)])
    assert_same_weights(defended, plain, rtol=0, atol=0)


def test_same_seed_same_weights_and_global_rng_untouched():
    def run(seed):
        module = PlainEncoder()
        torch.manual_seed(1)
        fit(module, [Fish(seed=seed)])
        return module, torch.rand(1)

    first, second, other = run(0), run(0), run(1)
    assert_same_weights(first[0], second[0], rtol=0, atol=0)
    assert not torch.equal(first[0].head.weight, other[0].head.weight)
    undefended = PlainEncoder()
    torch.manual_seed(1)
    fit(undefended, [])
    assert torch.equal(torch.rand(1), first[1])


def test_what_is_logged_is_the_mean_over_the_batch():
    # Learning rate 0: all domains are judged by the same weights.
    reference = fit(PlainEncoder(learning_rate=0.0), [], max_epochs=1).callback_metrics
    measured = fit(PlainEncoder(learning_rate=0.0), [Fish()], max_epochs=1).callback_metrics
    for key in ("train_loss_epoch", "train_loss_step", "train_accuracy"):
        torch.testing.assert_close(measured[key], reference[key])


def test_callbacks_see_the_interpolated_weights():
    ours = Watched().double()
    theirs = copy.deepcopy(ours)
    # The average of decay 0 is the weights of the last step.
    fit(ours, [WeightAveraging(decay=0.0), Fish()], precision="64-true")
    by_hand(theirs, loader(), ours.order, optimizer="sgd", epsilon=0.5)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize("ends", ["skip", "raise"])
def test_a_step_that_ends_early_leaves_the_weights_and_the_optimizer_as_they_were(ends, call):
    class Ends(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(self.order[-1]) < call:
                return loss
            if ends == "raise":
                raise RuntimeError("user code broke")
            return None

    module = Ends()
    before = copy.deepcopy(module.state_dict())
    if ends == "raise":
        with pytest.raises(RuntimeError, match="user code broke"):
            fit(module, [Fish()])
    else:
        trainer = fit(module, [Fish()], max_epochs=1, limit_train_batches=1)
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    def train(**settings):
        module = Watched("adamw")
        ckpt_path = settings.pop("ckpt_path", None)
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[Fish(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=3,
        )
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    whole = train()
    assert_same_weights(train(ckpt_path=tmp_path / "epoch=0.ckpt"), whole, rtol=0, atol=0)


class Sharded(Watched):
    """Each process sees its part of every batch: different numbers of rows, and domains that only one has."""

    def train_dataloader(self):
        whole = list(loader(16, 8, domains=3))
        if self.trainer.world_size == 1:
            return DataLoader(whole, batch_size=None)
        parts = (
            [[0, 3, 6, 1, 4], [2, 5, 7]] if self.trainer.global_rank == 0 else [[2, 5, 7], [0, 1, 3, 4, 6]]
        )
        return DataLoader(
            [{k: v[part] for k, v in b.items()} for b, part in zip(whole, parts, strict=True)],
            batch_size=None,
        )


@pytest.mark.slow
def test_two_processes_train_like_one():
    def train(devices):
        module = Sharded().double()
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            use_distributed_sampler=False,
            callbacks=[Fish()],
            gradient_clip_val=0.3,
            precision="64-true",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module)
        return module

    one, two = train(1), train(2)
    assert not torch.equal(one.head.weight, Sharded().double().head.weight)
    assert_same_weights(two, one, rtol=1e-9, atol=1e-11)


def test_no_inner_step_moves_what_lp_ft_holds_back():
    module, held = Watched("adamw"), []
    before = copy.deepcopy(module.state_dict())
    module.on_train_epoch_end = lambda: held.append(copy.deepcopy(module.state_dict()))
    fit(module, [LPFT(head="head"), Fish()])
    for name in ("embed.weight", "hidden.weight"):
        assert torch.equal(held[0][name], before[name])
        assert not torch.equal(held[1][name], before[name])
    assert not torch.equal(held[0]["head.weight"], before["head.weight"])


class Unmeasured(Watched):
    """Its accuracy would not take a label of -100."""

    def training_step(self, batch, batch_idx):
        self.order[-1].append(batch["domain"].unique().tolist())
        logits = self(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["labels"])


def test_domains_without_a_label_take_no_step():
    ours = Unmeasured().double()
    theirs = copy.deepcopy(ours)
    data = [{**b, "labels": torch.where(b["domain"] == 2, -100, b["labels"])} for b in loader(16, 8)]
    fit(ours, [Fish()], DataLoader(data, batch_size=None), precision="64-true")
    assert {len(calls) for calls in ours.order} == {2}
    by_hand(theirs, data, ours.order, optimizer="sgd", epsilon=0.5)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_bad_settings(epsilon):
    with pytest.raises(ConfigError, match="Expected `epsilon` to be a number from 0 to 1"):
        Fish(epsilon)


class Newton(PlainEncoder):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (PlainEncoder, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=1"),
        (
            PlainEncoder,
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            "instead of fp16",
        ),
        (Newton, {}, "not LBFGS"),
    ],
)
def test_trainings_that_cannot_take_inner_steps_are_refused_when_fit_starts(cls, settings, message):
    module = cls()
    with pytest.raises(ConfigError, match=message):
        fit(module, [Fish()], **settings)


def test_missing_domains_are_one_clear_error():
    data = DataLoader([{k: v for k, v in row.items() if k != "domain"} for row in rows()], batch_size=4)
    with pytest.raises(ConfigError, match="Expected each training batch to hold 'domain'"):
        fit(PlainEncoder(), [Fish()], data)
