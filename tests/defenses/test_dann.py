from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_robust.defenses.dann import DANN, reverse_gradient
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder, loader, rows


def in_domains(*domains: int, number: int = 16) -> DataLoader:
    """Rows whose domains are given in order, again and again, in batches of four."""
    data = rows(number)
    for index, row in enumerate(data):
        row["domain"] = torch.tensor(domains[index % len(domains)])
    return DataLoader(data, batch_size=4)


def make_trainer(*callbacks, **settings):
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "precision": "64-true", **settings},
    )


def first_classifier(num_domains=3, hidden_size=4, seed=0):
    """Weights and biases uniform in ±1/sqrt(inputs), as in a fresh torch.nn.Linear."""
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Sequential(nn.Linear(5, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_domains))
    for layer in (classifier[0], classifier[2]):
        for parameter in layer.parameters():
            drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data.copy_(drawn / layer.in_features**0.5)
    return classifier


def by_hand(module, data, *, weight, learning_rate, num_domains=3, accumulate=1, epochs=2):
    """Two players without a reversal: the classifier goes down D, the module down L − λ D."""
    classifier = first_classifier(num_domains).double()
    mine = torch.optim.SGD(module.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    steps, total = 0, epochs * len(data) // accumulate
    sums, counted = [torch.zeros_like(p) for p in classifier.parameters()], 0
    for _ in range(epochs):
        for index, batch in enumerate(data):
            mask = batch["attention_mask"].unsqueeze(-1).double()
            features = torch.tanh(module.hidden(module.embed(batch["input_ids"]))) * mask
            features = features.sum(1) / mask.sum(1)
            loss = nn.functional.cross_entropy(module.head(features), batch["labels"])
            known = batch["domain"] != -1
            strength = weight * (2 / (1 + math.exp(-10 * steps / total)) - 1)
            if len(batch["domain"][known].unique()) > 1:
                guesses = classifier(features[known])
                domain_loss = nn.functional.cross_entropy(guesses, batch["domain"][known])
                found = torch.autograd.grad(domain_loss, list(classifier.parameters()), retain_graph=True)
                sums = [s + known.sum() * g for s, g in zip(sums, found, strict=True)]
                counted += int(known.sum())
                loss = loss - strength * domain_loss
            weights = list(module.parameters())
            for p, g in zip(weights, torch.autograd.grad(loss / accumulate, weights), strict=True):
                p.grad = g if p.grad is None else p.grad + g
            if (index + 1) % accumulate == 0:
                mine.step()
                mine.zero_grad()
                steps += 1
                if counted:
                    for p, s in zip(classifier.parameters(), sums, strict=True):
                        p.grad = s / counted
                    theirs.step()
                sums, counted = [torch.zeros_like(p) for p in classifier.parameters()], 0
    return classifier


def dann(**settings):
    return DANN(**{"head": "head", "num_domains": 3, "hidden_size": 4, "learning_rate": 0.05, **settings})


def test_the_reversal_changes_gradients_only():
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 3, dtype=torch.float64)
    moved = reverse_gradient(values, 0.3)
    assert torch.equal(moved, values)
    (moved * other).sum().backward()
    torch.testing.assert_close(values.grad, -0.3 * other)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "domains", [(0, 1, 2), (0, 0, 1, -1), (0, 1, 2, 1, 0, 0, 0, 0), (-1, -1, -1, -1, 0, 0, 1, 2)]
)
def test_equals_the_update_written_out(domains, accumulate):
    ours = PlainEncoder().double()
    theirs = copy.deepcopy(ours)
    data = in_domains(*domains)
    defense = dann(weight=2.0)
    fit(ours, [defense], data, precision="64-true", accumulate_grad_batches=accumulate)
    classifier = by_hand(theirs, data, weight=2.0, learning_rate=0.05, accumulate=accumulate)
    assert_same_weights(ours, theirs, rtol=1e-8)
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(defense.state_dict()["classifier"][name], value)


def test_the_strength_ramps_from_0_to_the_weight():
    found = []

    class Watch(Callback):
        def on_train_batch_start(self, *args):
            found.append(defense.strength)

    defense = dann(weight=3.0)
    fit(PlainEncoder(), [defense, Watch()], max_epochs=5)
    assert found[0] == 0
    assert found[10] == pytest.approx(3 * (2 / (1 + math.exp(-5)) - 1))
    assert found == sorted(found)
    assert 2.9 < found[-1] < 3


def test_zero_strength_and_a_single_domain_are_plain_training():
    plain, off, alone = PlainEncoder(), PlainEncoder(), PlainEncoder()
    fit(plain, [], in_domains(1))
    fit(off, [dann(weight=0)], in_domains(0, 1, 2))
    fit(alone, [dann()], in_domains(1))
    assert_same_weights(off, plain, rtol=0, atol=0)
    assert_same_weights(alone, plain, rtol=0, atol=0)


def test_same_seed_same_weights_and_global_rng_untouched():
    def run(*defenses):
        module = PlainEncoder()
        torch.manual_seed(1)
        fit(module, list(defenses))
        return module.head.weight.detach(), torch.rand(1)

    first, second, other, plain = run(dann()), run(dann()), run(dann(seed=1)), run()
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], plain[1])


def test_the_number_of_domains_of_the_data_module():
    class Listed(LightningDataModule):
        domains = ("books", "films", "hotels")

        def train_dataloader(self):
            return loader()

    named, counted = dann(num_domains=None), dann()
    modules = PlainEncoder(), PlainEncoder()
    fit(modules[0], [named], Listed())
    fit(modules[1], [counted])
    assert_same_weights(*modules, rtol=0, atol=0)
    listed = Listed()
    listed.domains = ["films"]
    with pytest.raises(ConfigError, match="2 or more domains, which DANN compares"):
        fit(PlainEncoder(), [dann(num_domains=None)], listed)


def test_resumed_training_ends_the_same(tmp_path):
    modules, defenses = [PlainEncoder().double(), PlainEncoder().double()], [dann(), dann()]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make_trainer(defenses[0], saver, max_epochs=3).fit(modules[0], loader())
    again = make_trainer(defenses[1], max_epochs=3)
    again.fit(modules[1], loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert_same_weights(*modules, rtol=0, atol=0)
    states = [defense.state_dict() for defense in defenses]
    for name, value in states[0]["classifier"].items():
        assert torch.equal(states[1]["classifier"][name], value)


def test_a_fit_that_goes_on_keeps_the_classifier():
    defense, module = dann(), PlainEncoder()
    trainer = fit(module, [defense], max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    (steps,) = {int(state["step"]) for state in defense.state_dict()["optimizer"]["state"].values()}
    assert steps == trainer.global_step == 12


def test_each_fit_starts_anew():
    defense, modules = dann(), [PlainEncoder(), PlainEncoder()]
    for module in modules:
        fit(module, [defense])
    assert_same_weights(*modules, rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_with_another_defense(order):
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    # A FreeLB whose δ stays 0 repeats the pass.
    still = FreeLB(num_steps=3, step_size=0.0, init_magnitude=0.0)
    fit(ours, [dann(weight=2.0), still][::order], precision="64-true")
    by_hand(theirs, loader(), weight=2.0, learning_rate=0.05)
    assert_same_weights(ours, theirs, rtol=1e-6, atol=1e-9)


class Sharded(PlainEncoder):
    """Of two processes, one may see one domain only; one process has both parts of a batch."""

    def train_dataloader(self):
        number, rank = self.trainer.world_size, self.trainer.global_rank
        data = rows(16)
        for index, row in enumerate(data):
            row["domain"] = torch.tensor((0, 1, 0, 1, 2, 0, 1, 2)[index % 8])
        mine = [row for index, row in enumerate(data) if number == 1 or index % 8 // 4 == rank]
        return DataLoader(mine, batch_size=8 // number)

    def on_train_end(self):
        self.trainer.callbacks[0].ended(self)


class Compared(DANN):
    """Checks, on each process, the domain classifier against what one process came to."""

    expected: dict[str, torch.Tensor] | None = None

    def ended(self, module):
        found = {**self.state_dict()["classifier"], "module": module.hidden.weight.detach()}
        if self.expected is None:
            self.found = {name: value.clone() for name, value in found.items()}
        else:
            for name, value in self.expected.items():
                torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.slow
def test_two_processes_train_like_one():
    settings = {"head": "head", "num_domains": 3, "hidden_size": 4, "learning_rate": 0.05}
    one, two = Compared(**settings), Compared(**settings)
    make_trainer(one, use_distributed_sampler=False).fit(Sharded().double())
    two.expected = one.found
    make_trainer(two, use_distributed_sampler=False, devices=2, strategy="ddp_fork").fit(Sharded().double())
    assert one.found


@pytest.mark.slow
def test_a_process_with_nothing_to_tell_apart_does_not_hold_up_the_others():
    class Lopsided(Sharded):
        def train_dataloader(self):
            return in_domains(0, 1) if self.trainer.global_rank else in_domains(-1, 2)

        def on_train_end(self):
            weight = self.trainer.callbacks[0].state_dict()["classifier"]["0.weight"]
            others = [torch.zeros_like(weight) for _ in range(2)]
            torch.distributed.all_gather(others, weight)
            assert torch.equal(*others)
            assert not torch.equal(weight, first_classifier()[0].weight.to(weight))

    make_trainer(dann(), use_distributed_sampler=False, devices=2, strategy="ddp_fork").fit(
        Lopsided().double()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "Expected `weight` to be a number >= 0"),
        ({"num_domains": 1}, "Expected `num_domains` to be a whole number >= 2"),
        ({"hidden_size": 0}, "Expected `hidden_size`"),
        ({"learning_rate": float("nan")}, "Expected `learning_rate`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        DANN(**settings)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from rows()


def test_what_cannot_work_says_so():
    with pytest.raises(ConfigError, match="Say it: num_domains=3"):
        fit(PlainEncoder(), [DANN(head="head")])
    with pytest.raises(ConfigError, match="Name it: head="):
        fit(PlainEncoder(), [DANN(num_domains=3)])
    with pytest.raises(
        ConfigError, match="Expected domains from 0 to 1, and -1 for unknown ones, but a batch holds"
    ):
        fit(PlainEncoder(), [dann(num_domains=2)])
    with pytest.raises(ConfigError, match="Expected a fit with an end"):
        fit(PlainEncoder(), [dann()], DataLoader(Endless(), batch_size=4), max_epochs=-1)
    with pytest.raises(ConfigError, match="List DANN before VREx"):
        fit(PlainEncoder(), [VREx(), dann()])
