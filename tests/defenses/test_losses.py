from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_robust.defenses import (
    ALUM,
    CORAL,
    DANN,
    IRM,
    JTT,
    LISA,
    MMD,
    R3F,
    SIFT,
    SMART,
    TRADES,
    Mixup,
)
from lightning_robust.defenses.focal_loss import FocalLoss
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.label_smoothing import LabelSmoothing
from lightning_robust.defenses.vrex import VREx
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import DictLoss, PlainEncoder, loader


class WithPenalty(PlainEncoder):
    """Its loss is more than a cross-entropy."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.3 * self.hidden.weight.square().sum()


def smoothed(logits, labels, smoothing):
    """Cross-entropy with the distribution that gives (1 - s) + s/classes to the label and s/classes to others."""
    classes = logits.shape[1]
    target = torch.full_like(logits, smoothing / classes)
    target[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(target * torch.log(torch.softmax(logits, dim=1))).sum(1).mean()


def focal(logits, labels, gamma):
    p = torch.softmax(logits, dim=1)[torch.arange(len(labels)), labels]
    return (-((1 - p) ** gamma) * torch.log(p)).mean()


def train_by_hand(module, loss, *, accumulate=1, epochs=2):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(epochs):
        for index, batch in enumerate(loader()):
            logits = module(batch["input_ids"], batch["attention_mask"])
            (loss(logits, batch["labels"]) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


CASES = [
    (LabelSmoothing(head="head"), lambda f, y: smoothed(f, y, 0.1)),
    (LabelSmoothing(0.4, head="head"), lambda f, y: smoothed(f, y, 0.4)),
    (FocalLoss(head="head"), lambda f, y: focal(f, y, 2.0)),
    (FocalLoss(0.5, head="head"), lambda f, y: focal(f, y, 0.5)),
]


@pytest.mark.parametrize(("defense", "loss"), CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cls", [PlainEncoder, DictLoss])
def test_equals_the_loss_written_out(defense, loss, accumulate, cls):
    ours, theirs = cls().double(), PlainEncoder().double()
    fit(ours, [copy.copy(defense)], precision="64-true", accumulate_grad_batches=accumulate)
    train_by_hand(theirs, loss, accumulate=accumulate)
    assert_same_weights(ours, theirs)


def test_agrees_with_pytorchs_label_smoothing():
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    fit(ours, [LabelSmoothing(0.2, head="head")], precision="64-true")
    train_by_hand(theirs, nn.CrossEntropyLoss(label_smoothing=0.2))
    assert_same_weights(ours, theirs)


def test_what_else_the_loss_holds_is_kept():
    ours, theirs = WithPenalty().double(), WithPenalty().double()
    fit(ours, [FocalLoss(head="head")], precision="64-true")
    train_by_hand(theirs, lambda f, y: focal(f, y, 2.0) + 0.3 * theirs.hidden.weight.square().sum())
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("off", [LabelSmoothing(0.0, head="head"), FocalLoss(0.0, head="head")])
def test_zero_strength_is_plain_training_exactly(off):
    plain, defended = PlainEncoder(dropout=0.3), PlainEncoder(dropout=0.3)
    for module, defenses in ((plain, []), (defended, [off])):
        torch.manual_seed(2)
        fit(module, defenses)
    assert_same_weights(defended, plain, rtol=0, atol=0)


def test_inside_a_domain_defense_each_risk_is_the_new_loss():
    """The defense stands first in the list, but changes the loss of each single pass."""
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    fit(ours, [FocalLoss(head="head"), VREx(beta=3.0, warmup_steps=0)], precision="64-true", max_epochs=1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for batch in loader():
        logits = theirs(batch["input_ids"], batch["attention_mask"])
        risks = torch.stack(
            [
                focal(logits[batch["domain"] == d], batch["labels"][batch["domain"] == d], 2.0)
                for d in batch["domain"].unique()
            ]
        )
        optimizer.zero_grad()
        (risks.mean() + 3.0 * ((risks - risks.mean()) ** 2).mean()).backward()
        optimizer.step()
    assert_same_weights(ours, theirs)


def test_both_together_and_with_freelb():
    first, second = PlainEncoder(), PlainEncoder()
    fit(first, [FreeLB(), LabelSmoothing(head="head"), FocalLoss(head="head")])
    fit(second, [FreeLB()])
    assert not torch.allclose(first.head.weight, second.head.weight, atol=1e-4)


class Unmeasured(PlainEncoder):
    """Its accuracy would not take a label of -100."""

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize("defense", [LabelSmoothing(0.3, head="head"), FocalLoss(head="head")])
def test_unlabelled_rows_count_for_nothing(defense):
    labelled = torch.arange(4) < 3
    partly = [{**b, "labels": torch.where(labelled, b["labels"], -100)} for b in loader()]
    short = [{key: values[:3] for key, values in b.items()} for b in loader()]
    ours, theirs = Unmeasured().double(), Unmeasured().double()
    for module, data in ((ours, partly), (theirs, short)):
        fit(module, [copy.copy(defense)], DataLoader(data, batch_size=None), precision="64-true")
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_certain_rows_have_finite_gradients(gamma):
    """In float32 the probability of a label becomes 1, where a power below 1 is infinitely steep."""
    module = PlainEncoder()
    with torch.no_grad():
        module.head.weight.mul_(1e3)
    fit(module, [FocalLoss(gamma, head="head")])
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("defense", [LabelSmoothing(), FocalLoss()])
@pytest.mark.parametrize(("kind", "lora"), [("bert", False), ("bert", True), ("llama", True)])
def test_heads_of_hugging_face_models_are_found(defense, kind, lora):
    def train(*defenses):
        torch.manual_seed(0)
        module = HuggingFaceProject(kind, lora)
        data = batches(module)
        torch.manual_seed(1)
        return fit(module, list(defenses), data, max_epochs=1).callback_metrics, module

    _, plain = train()
    _, defended = train(copy.copy(defense))
    changed = [
        name
        for (name, p), q in zip(plain.named_parameters(), defended.parameters(), strict=True)
        if p.requires_grad and not torch.equal(p, q)
    ]
    assert changed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothing(-0.1), "Expected `smoothing` to be a number from 0 to 1, but got -0.1"),
        (lambda: LabelSmoothing(1.5), "Expected `smoothing`"),
        (lambda: LabelSmoothing(float("nan")), "Expected `smoothing`"),
        (lambda: FocalLoss(-1.0), "Expected `gamma` to be a number >= 0, but got -1.0"),
        (lambda: FocalLoss(float("nan")), "Expected `gamma`"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("defense", [LabelSmoothing(), FocalLoss()])
def test_without_logits_it_fails_when_fit_starts(defense):
    with pytest.raises(ConfigError, match=r"Expected to find the layer of PlainEncoder .* head="):
        fit(PlainEncoder(), [defense])


def test_missing_or_strange_labels_are_named():
    with pytest.raises(ConfigError, match=r"hold 'label', but it holds: .* Did you mean «labels»"):
        fit(PlainEncoder(), [FocalLoss(label_key="label", head="head")])
    soft = DataLoader([{**b, "soft": b["labels"].float()} for b in loader()], batch_size=None)
    with pytest.raises(ConfigError, match=r"Expected class numbers under .soft., but got torch\.float32"):
        fit(PlainEncoder(), [FocalLoss(label_key="soft", head="head")], soft)


class OneLogit(PlainEncoder):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())


@pytest.mark.parametrize(
    "defense",
    [
        R3F,
        SMART,
        SIFT,
        ALUM,
        TRADES,
        IRM,
        JTT,
        FocalLoss,
        LabelSmoothing,
        LISA,
        partial(Mixup, layers=["hidden"]),
    ],
)
def test_one_logit_has_no_classes_to_compare(defense):
    with pytest.raises(ConfigError, match="Expected logits for 2 or more classes from Linear, but got 1"):
        fit(OneLogit(), [defense(head="head")])


@pytest.mark.parametrize("defense", [CORAL, MMD, partial(DANN, num_domains=3)])
def test_features_matter_before_one_logit_too(defense):
    plain, defended = OneLogit(), OneLogit()
    defended.load_state_dict(plain.state_dict())
    fit(plain, [])
    fit(defended, [defense(head="head")])
    assert not torch.equal(plain.hidden.weight, defended.hidden.weight)
