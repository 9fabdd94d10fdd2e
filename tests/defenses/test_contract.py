from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_robust.defenses import Defense, FreeLB, VREx, defense_classes
from lightning_robust.errors import ConfigError
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import DictLoss, PlainEncoder, loader, rows


def risks_by_hand(module, batch):
    logits = module(batch["input_ids"], batch["attention_mask"])
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return torch.stack([losses[batch["domain"] == d].mean() for d in batch["domain"].unique()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_vrex_equals_the_update_written_out(accumulate):
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    fit(
        ours,
        [VREx(beta=3.0, warmup_beta=0.5, warmup_steps=3)],
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    optimizer, steps = torch.optim.SGD(theirs.parameters(), lr=0.1), 0
    for _ in range(2):
        for index, batch in enumerate(loader()):
            risks = risks_by_hand(theirs, batch)
            beta = 0.5 if steps < 3 else 3.0
            ((risks.mean() + beta * ((risks - risks.mean()) ** 2).mean()) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def hybrid_by_hand(module, batch, *, beta, num_steps, step_size, inside):
    """Both orders of FreeLB and V-REx, all graphs kept, one gradient at the end."""

    def losses(delta):
        mask = batch["attention_mask"].unsqueeze(-1).to(module.embed.weight.dtype)
        embedded = module.embed(batch["input_ids"]) + delta * mask
        pooled = (torch.tanh(module.hidden(embedded)) * mask).sum(1) / mask.sum(1)
        each = nn.functional.cross_entropy(module.head(pooled), batch["labels"], reduction="none")
        return torch.stack([each[batch["domain"] == d].mean() for d in batch["domain"].unique()])

    def vrex(risks):
        return risks.mean() + beta * risks.var(correction=0)

    delta = torch.zeros(*batch["input_ids"].shape, 6, dtype=torch.float64, requires_grad=True)
    seen = []
    for _ in range(num_steps):
        risks = losses(delta)
        seen.append(risks)
        climbed = risks.sum() if inside == "freelb" else vrex(risks)
        gradient = torch.autograd.grad(climbed, delta, retain_graph=True)[0]
        gradient = gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
        delta = (delta + step_size * gradient).detach().requires_grad_()
    if inside == "freelb":
        return vrex(torch.stack(seen).mean(0))
    return torch.stack([vrex(risks) for risks in seen]).mean()


@pytest.mark.parametrize("inside", ["freelb", "vrex"])
def test_hybrid_equals_the_maths_in_either_order(inside):
    ours, theirs = PlainEncoder().double(), PlainEncoder().double()
    freelb = FreeLB(num_steps=3, step_size=0.25, init_magnitude=0.0)
    vrex = VREx(beta=2.0, warmup_steps=0)
    fit(ours, [vrex, freelb] if inside == "freelb" else [freelb, vrex], precision="64-true")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(2):
        for batch in loader():
            loss = hybrid_by_hand(theirs, batch, beta=2.0, num_steps=3, step_size=0.25, inside=inside)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_domain_batches_of_other_kinds():
    class Tuples(PlainEncoder):
        def training_step(self, batch, batch_idx):
            ids, labels, _ = batch
            return nn.functional.cross_entropy(self(ids, (ids != 0).long()), labels)

    data = [
        (torch.stack([r["input_ids"] for r in part]), torch.stack([r["labels"] for r in part]), domains)
        for part, domains in [
            (rows()[:4], torch.tensor([0, 1, 0, 1])),
            (rows()[4:8], torch.tensor([1, 1, 1, 1])),
        ]
    ]
    data = DataLoader(data, batch_size=None)
    fit(Tuples(), [VREx(domain_key=2)], data)
    with pytest.raises(ConfigError, match="domain_key=2 for a tuple"):
        fit(Tuples(), [VREx()], data)


def test_missing_domain_is_one_clear_error():
    data = DataLoader([{k: v for k, v in row.items() if k != "domain"} for row in rows()], batch_size=4)
    with pytest.raises(ConfigError, match=r"hold 'domain', but it holds: input_ids, attention_mask, labels"):
        fit(PlainEncoder(), [VREx()], data)


class Counting(PlainEncoder):
    """Counts what reaches the logger and the metric."""

    def __init__(self):
        super().__init__()
        self.logged, self.counted, self.losses = [], [], []

    def log(self, name, value, *args, **kwargs):
        self.logged.append(name)
        super().log(name, value, *args, **kwargs)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss

    def on_train_batch_end(self, *args):
        self.counted.append(int(self.train_accuracy.tp + self.train_accuracy.fn))


@pytest.mark.parametrize(
    "defenses", [[FreeLB(num_steps=3)], [VREx()], [VREx(), FreeLB()], [FreeLB(), VREx()]]
)
def test_extra_calls_leave_no_trace(defenses):
    module = Counting()
    trainer = fit(module, defenses, max_epochs=1)
    assert module.logged == ["train_loss", "train_accuracy"] * 4
    assert module.counted == [4, 8, 12, 16]
    assert 0 <= trainer.callback_metrics["train_accuracy"] <= 1


def test_what_is_logged_under_a_domain_defense_is_the_plain_mean():
    # Learning rate 0: every batch is judged by the same weights.
    plain, split = PlainEncoder(learning_rate=0.0), PlainEncoder(learning_rate=0.0)
    reference = fit(plain, [], max_epochs=1).callback_metrics
    measured = fit(split, [VREx()], max_epochs=1).callback_metrics
    for key in ("train_loss_epoch", "train_loss_step", "train_accuracy"):
        torch.testing.assert_close(measured[key], reference[key])


def test_the_plain_pass_is_the_one_that_counts():
    class PlainThenOther(Defense):
        def training_loss(self, step, batch):
            clean = step(batch)
            return clean + step({**batch, "labels": 1 - batch["labels"]})

    reference = fit(PlainEncoder(learning_rate=0.0), [], max_epochs=1).callback_metrics
    measured = fit(PlainEncoder(learning_rate=0.0), [PlainThenOther()], max_epochs=1).callback_metrics
    for key in ("train_loss_epoch", "train_accuracy"):
        torch.testing.assert_close(measured[key], reference[key])


class Fails(DictLoss):
    def on_train_batch_end(self, *args):
        raise RuntimeError("user code broke")


@pytest.mark.parametrize("cls", [DictLoss, Fails])
def test_module_is_restored_after_fit_and_after_an_exception(cls):
    module = cls()
    signature = inspect.signature(module.training_step)
    seen = []
    module.on_train_start = lambda: seen.append(
        (inspect.signature(module.training_step), isinstance(module, cls), type(module) is cls)
    )
    if cls is Fails:
        with pytest.raises(RuntimeError, match="user code broke"):
            fit(module, [FreeLB(), VREx()])
    else:
        fit(module, [FreeLB(), VREx()])
    assert seen == [(signature, True, True)]
    assert "training_step" not in module.__dict__
    assert "log" not in module.__dict__
    assert not module.embed._forward_hooks


def test_skipped_batches_stay_skipped():
    class Skips(PlainEncoder):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    fit(Skips(), [FreeLB()])


def test_manual_optimization_is_refused():
    module = PlainEncoder()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="sets automatic_optimization=False"):
        fit(module, [FreeLB()])


def test_frozen_module_is_refused():
    module = PlainEncoder()
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="all are frozen"):
        fit(module, [FreeLB()])


def test_step_without_loss_is_refused():
    class NoLoss(PlainEncoder):
        def training_step(self, batch, batch_idx):
            return {"logits": super().training_step(batch, batch_idx)}

    with pytest.raises(ConfigError, match="a dict with `loss`, but got a dict with logits"):
        fit(NoLoss(), [FreeLB()])


def test_defense_outside_fit_says_so():
    with pytest.raises(ConfigError, match="no fit is running"):
        FreeLB().chain  # noqa: B018


def test_a_step_may_pop_what_the_model_does_not_take():
    class Pops(PlainEncoder):
        def training_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            return nn.functional.cross_entropy(self(batch.pop("input_ids"), batch["attention_mask"]), labels)

    ours, theirs = Pops(), PlainEncoder()
    fit(ours, [FreeLB(num_steps=3)])
    fit(theirs, [FreeLB(num_steps=3)])
    assert torch.equal(ours.head.weight, theirs.head.weight)


def test_float16_weights_need_a_loss_scaler():
    with pytest.raises(ConfigError, match=r"with a loss scaler, but the trainer's precision is 16-true"):
        fit(PlainEncoder(), [FreeLB()], precision="16-true")


def test_inner_gradients_in_float16_are_those_of_the_scaled_loss():
    """No scaler runs on the CPU; one that says its scale stands in for it."""

    class Scaler:
        def get_scale(self):
            return 1024.0

    norms = []

    class Spy(FreeLB):
        def _ascend(self, delta, gradient, embedded):
            norms.append(float(gradient.norm()))
            return super()._ascend(delta, gradient, embedded)

    class Inside(Defense):
        def __init__(self, scaler):
            super().__init__()
            self.scaler = scaler

        def training_loss(self, step, batch):
            self.chain.trainer.precision_plugin.scaler = self.scaler
            loss = step(batch)
            self.chain.trainer.precision_plugin.scaler = None
            return loss

    for scaler in (None, Scaler()):
        fit(
            PlainEncoder().double(),
            [Inside(scaler), Spy()],
            precision="64-true",
            max_epochs=1,
            limit_train_batches=1,
        )
    assert norms[1] == pytest.approx(1024 * norms[0])


class Reversed(Defense):
    """Trains on the rows in reverse order, and may say that it does no more than that."""

    def __init__(self, says_so):
        super().__init__()
        self.says_so = says_so

    @property
    def hands_loss_on(self):
        return self.says_so

    def training_loss(self, step, batch):
        return step({key: value.flip(0) for key, value in batch.items()})


def test_behind_a_defense_that_hands_the_loss_on_graphs_are_freed_early():
    early, kept = PlainEncoder().double(), PlainEncoder().double()
    seen = []
    for module, says_so in ((early, True), (kept, False)):
        inner = FreeLB(num_steps=3, step_size=0.25)
        module.on_train_batch_start = lambda *args, d=inner: seen.append(d.is_outermost)
        fit(module, [Reversed(says_so), inner], precision="64-true", max_epochs=1)
    assert seen == [True] * 4 + [False] * 4
    assert_same_weights(early, kept)


@pytest.mark.parametrize("name", ["VREx", "CORAL", "LISA", "Fish"])
def test_domains_that_never_meet_are_warned_of(name):
    def apart(row):
        return {**row, "domain": torch.tensor(0)}

    settings = {"head": "head"} if name in ("CORAL", "LISA") else {}
    for data, warns in ((DataLoader([apart(row) for row in rows()], batch_size=4), True), (None, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(PlainEncoder(), [defense_classes()[name](**settings)], data)
        messages = [
            str(w.message) for w in caught if "no batch of this epoch held more than one" in str(w.message)
        ]
        assert len(messages) == warns


def test_domains_that_are_all_unknown_are_warned_of():
    data = DataLoader([{**row, "domain": torch.tensor(-1)} for row in rows()], batch_size=4)
    with pytest.warns(UserWarning, match=r"VREx .* no batch of this epoch held a known one \(all are -1\)"):
        fit(PlainEncoder(), [VREx()], data)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compares domains")
        fit(PlainEncoder(), [VREx(beta=0, warmup_beta=0)], data)


@pytest.mark.parametrize("name", ["VREx", "GroupDRO", "IRM"])
def test_domains_without_a_label_are_left_out_of_their_batch(name):
    """There, labels of -100 are 0 / 0."""

    class Unmeasured(PlainEncoder):
        def training_step(self, batch, batch_idx):
            logits = self(batch["input_ids"], batch["attention_mask"])
            return nn.functional.cross_entropy(logits, batch["labels"])

    settings = {"head": "head"} if name == "IRM" else {}
    # Of four domains, -1 among them, two have labels, one of them on one row only.
    whole = [{**b, "domain": torch.tensor([0, 1, 2, -1] * 2)} for b in loader(16, 8)]
    for batch in whole:
        batch["labels"][[2, 3, 6, 7, 5]] = -100
    without = [{key: value[[0, 1, 4, 5]] for key, value in batch.items()} for batch in whole]
    ours, theirs = Unmeasured().double(), Unmeasured().double()
    for module, data in ((ours, whole), (theirs, without)):
        fit(
            module,
            [defense_classes()[name](**settings)],
            DataLoader(data, batch_size=None),
            precision="64-true",
        )
    assert_same_weights(ours, theirs)
    assert all(p.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("name", ["VREx", "GroupDRO", "Fish"])
def test_labels_may_stand_anywhere_in_the_batch(name):
    class Tuples(PlainEncoder):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])

    data = []
    for batch in loader(16, 8):
        labels = torch.where(batch["domain"] == 2, -100, batch["labels"])
        data.append((batch["input_ids"], batch["attention_mask"], labels, batch["domain"]))
    module = Tuples()
    defense = defense_classes()[name](domain_key=3, label_key=2)
    fit(module, [defense], DataLoader(data, batch_size=None))
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", ["VREx", "GroupDRO"])
def test_a_domain_weighs_by_its_labelled_rows(name):
    defense = defense_classes()[name]()
    batch = {"input_ids": torch.ones(5, 2), "labels": torch.tensor([0, -100, 1, -100, 1])}
    assert defense.sizes(batch, torch.tensor([0, 0, 0, 1, -1])) == {0: 2, -1: 1}


@pytest.mark.parametrize("name", ["GroupDRO", "WeightAveraging", "WiSEFT"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_fit_that_goes_on_equals_one_fit(name, evaluated, tmp_path):
    cls = defense_classes()[name]
    whole, parts = PlainEncoder().double(), PlainEncoder().double()
    fit(whole, [cls()], max_epochs=3, precision="64-true")
    trainer = fit(parts, [cls()], max_epochs=1, precision="64-true")
    if evaluated:
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        trainer.validate(parts, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(parts, loader())
    assert_same_weights(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["WeightAveraging", "JTT", "LPFT"])
def test_no_training_at_all_is_no_training_that_is_too_short(name):
    settings = {} if name == "WeightAveraging" else {"head": "head"}
    fit(PlainEncoder(), [defense_classes()[name](**settings)], max_epochs=0)


@pytest.mark.parametrize("defenses", [[VREx()], [defense_classes()["Fish"]()]])
@pytest.mark.parametrize("reduce_fx", ["sum", torch.sum, "min", torch.max, "mean"])
def test_what_parts_of_a_batch_log_is_reduced_as_they_say(defenses, reduce_fx):
    class Logs(PlainEncoder):
        def training_step(self, batch, batch_idx):
            first = batch["input_ids"][:, 0].float()
            name = reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__
            self.log("first", getattr(first, name)(), reduce_fx=reduce_fx, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    plain, defended = (fit(Logs(), d, max_epochs=1).callback_metrics["first"] for d in ([], defenses))
    torch.testing.assert_close(defended, plain)


def test_a_users_own_arguments_mean_what_they_say():
    class Own(Defense):
        def __init__(self, layers: int = 2):
            super().__init__()

    assert Own(layers=3).settings == {"layers": 3}


@pytest.mark.parametrize("name", ["VREx", "Fish"])
def test_what_a_step_returns_for_each_row_is_put_together(name):
    class Returns(PlainEncoder):
        def training_step(self, batch, batch_idx):
            logits = self(batch["input_ids"], batch["attention_mask"])
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            return {"loss": loss, "logits": logits, "labels": batch["labels"], "scale": torch.tensor(2.0)}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert torch.equal(outputs["labels"], batch["labels"])
            assert outputs["logits"].shape == (len(batch["labels"]), 2)
            assert float(outputs["scale"]) == 2.0
            seen.append(batch_idx)

    seen = []
    fit(Returns(), [defense_classes()[name]()], max_epochs=1)
    assert seen == [0, 1, 2, 3]


def test_rows_are_those_of_most_tensors():
    class Weighted(PlainEncoder):
        def training_step(self, batch, batch_idx):
            assert len(batch.pop("class_weight")) == 2
            return super().training_step(batch, batch_idx)

    def collate(part):
        return {"class_weight": torch.ones(2), **torch.utils.data.default_collate(part)}

    fit(Weighted(), [VREx()], DataLoader(rows(), batch_size=4, collate_fn=collate))
