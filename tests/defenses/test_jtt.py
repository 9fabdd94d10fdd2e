from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.jtt import JTT
from lightning_robust.defenses.vrex import VREx
from lightning_robust.defenses.weight_averaging import WeightAveraging
from lightning_robust.errors import ConfigError
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.test_lp_ft import OnlyTrainable, UnfreezesLate
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder, rows


def jtt(**settings):
    return JTT(**{"head": "head", **settings})


class Momentum(PlainEncoder):
    """Its optimizer has a state, and its learning rate a schedule."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def shuffled(with_ids: bool, seed: int = 0) -> DataLoader:
    """Rows in another order in each epoch, padded to the longest of the batch."""
    data = rows()
    for number, row in enumerate(data):
        row["number"] = number

    def collate(part):
        longest = max(int(row["attention_mask"].sum()) for row in part)
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0] if name != "number"}
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name][:, :longest]
        return batch | ({"ids": [f"row {row['number']}" for row in part]} if with_ids else {})

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate, generator=generator)


class Seen(Callback):
    """The batches of a fit, as they came."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch)


def by_hand(module, data, *, first_stage, upweight, accumulate=1):
    """Algorithm 1 of the paper on given batches, four an epoch, with errors as they occur in training."""
    start = copy.deepcopy(module.state_dict())
    optimizer, wrong = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), {}
    for index, batch in enumerate(data):
        epoch = index // 4
        if index == 4 * first_stage:
            module.load_state_dict(start)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        optimizer.param_groups[0]["lr"] = 0.1 * 0.95 ** (index // accumulate)
        logits = module(batch["input_ids"], batch["attention_mask"])
        each = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        names = [str(ids[ids != 0].tolist()) for ids in batch["input_ids"]]
        if epoch == first_stage - 1:
            wrong |= dict(zip(names, (logits.argmax(1) != batch["labels"]).tolist(), strict=True))
        if epoch >= first_stage:
            weights = torch.tensor([upweight if wrong[name] else 1.0 for name in names])
            each = each * weights / ((len(wrong) + (upweight - 1) * sum(wrong.values())) / len(wrong))
        (each.mean() / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert 0 < sum(wrong.values()) < len(wrong) == 16


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(("first_stage", "accumulate"), [(1, 1), (2, 1), (1, 2)])
def test_equals_the_training_written_out(with_ids, first_stage, accumulate):
    ours = Momentum().double()
    theirs = copy.deepcopy(ours)
    seen = Seen()
    fit(
        ours,
        [jtt(identification_epochs=first_stage, upweight=5.0), seen],
        shuffled(with_ids),
        precision="64-true",
        max_epochs=first_stage + 2,
        accumulate_grad_batches=accumulate,
    )
    by_hand(theirs, seen.batches, first_stage=first_stage, upweight=5.0, accumulate=accumulate)
    assert_same_weights(ours, theirs)


def test_no_identification_is_plain_training_exactly():
    plain, defended = Momentum(dropout=0.3), Momentum(dropout=0.3)
    for module, defenses in ((plain, []), (defended, [jtt(identification_epochs=0)])):
        torch.manual_seed(2)
        fit(module, defenses)
    assert_same_weights(defended, plain, rtol=0, atol=0)


def test_equal_weights_are_plain_training_from_the_start():
    seen, twice, once = Seen(), PlainEncoder(), PlainEncoder()
    fit(twice, [jtt(upweight=1.0), seen], shuffled(False), max_epochs=3)
    fit(once, [], DataLoader(seen.batches[4:], batch_size=None), max_epochs=1)
    assert_same_weights(twice, once, rtol=1e-6, atol=1e-7)


def test_the_optimizers_state_is_the_first_one_again():
    """Adagrad, for one, has a state before its first step."""

    class Eager(PlainEncoder):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters(), lr=0.1, initial_accumulator_value=0.25)

    seen, twice, once = Seen(), Eager(), Eager()
    fit(twice, [jtt(upweight=1.0), seen], shuffled(False), max_epochs=3)
    fit(once, [], DataLoader(seen.batches[4:], batch_size=None), max_epochs=1)
    assert_same_weights(twice, once, rtol=1e-6, atol=1e-7)


def test_an_average_of_the_weights_begins_anew_with_them():
    class Ends(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.is_last_batch:
                self.weights.append(pl_module.head.weight.detach().clone())

    module, ends = PlainEncoder(), Ends()
    fit(module, [WeightAveraging(mode="swa"), jtt(), ends], max_epochs=3)
    torch.testing.assert_close(module.head.weight.detach(), (ends.weights[1] + ends.weights[2]) / 2)


@pytest.mark.parametrize("first_stage", [1, 2])
def test_layers_may_be_unfrozen_within_a_stage_or_between(first_stage):
    """They train from the second epoch on; after the restart all weights are the first ones."""
    module, restarted = OnlyTrainable(), []
    start = copy.deepcopy(module.state_dict())

    class Restart(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            if trainer.current_epoch == first_stage and not restarted:
                restarted.append(copy.deepcopy(pl_module.state_dict()))

    fit(module, [jtt(identification_epochs=first_stage), UnfreezesLate(), Restart()], max_epochs=3)
    assert all(torch.equal(restarted[0][name], start[name]) for name in start if "accuracy" not in name)
    assert not torch.equal(module.embed.weight, start["embed.weight"])


def test_share_of_errors_is_logged():
    seen, module = Seen(), PlainEncoder()
    wrong = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            wrong.append(float(pl_module.train_accuracy.tp))

    trainer = fit(module, [jtt(), seen, Spy()], shuffled(False))
    assert float(trainer.callback_metrics["jtt/error_share"]) == pytest.approx(1 - wrong[3] / 16)


# Which pass counts ----------------------------------------------------------------------------------


class Negated(Defense):
    """Calls the step on the batch and, before or after that, on a model that predicts the contrary."""

    def __init__(self, plain_first: bool, plain: bool = True):
        super().__init__()
        self.plain_first, self.plain = plain_first, plain

    def training_loss(self, step, batch):
        module = self.chain.module

        def contrary():
            hook = module.head.register_forward_hook(lambda *a: -a[2])
            with self.chain.perturbing():
                loss = step(batch)
            hook.remove()
            return loss

        if not self.plain:
            return contrary()
        calls = [lambda: step(batch), contrary]
        return sum(call() for call in (calls if self.plain_first else reversed(calls)))


def errors_of(defense, *others):
    # Learning rate 0: all passes are judged by the same weights.
    fit(PlainEncoder(learning_rate=0.0), [defense, *others], shuffled(True))
    return defense.state_dict()["wrong"]


def test_errors_are_those_of_the_plain_pass_or_else_of_the_last():
    plain = errors_of(jtt())
    assert 0 < sum(plain.values()) < len(plain)
    for plain_first in (True, False):
        assert errors_of(jtt(), Negated(plain_first)) == plain
    assert errors_of(jtt(), Negated(True, plain=False)) == {key: not wrong for key, wrong in plain.items()}


def test_a_domain_defense_around_it_changes_no_error():
    assert errors_of(jtt(), VREx()) == errors_of(jtt())


def test_rows_are_the_loaded_ones_whatever_a_defense_does_to_their_tokens():
    class Masks(Defense):
        def training_loss(self, step, batch):
            ids = batch["input_ids"].clone()
            ids[:, self.chain.trainer.current_epoch] = 1
            return step({**batch, "input_ids": ids})

    defense, batches_seen = jtt(), Seen()
    fit(PlainEncoder(learning_rate=0.0), [defense, Masks(), batches_seen], shuffled(False))
    known = {key for batch in batches_seen.batches for key in defense._keys_of(batch)}
    assert set(defense.state_dict()["wrong"]) == known
    assert len(known) == 16


def test_unlabelled_rows_are_no_errors():
    class Unmeasured(PlainEncoder):
        def training_step(self, batch, batch_idx):
            logits = self(batch["input_ids"], batch["attention_mask"])
            return nn.functional.cross_entropy(logits, batch["labels"])

    data = [{**b, "labels": torch.tensor([*b["labels"][:3], -100])} for b in shuffled(True)]
    defense = jtt()
    fit(Unmeasured(), [defense], DataLoader(data, batch_size=None))
    assert set(defense.state_dict()["wrong"]) == {name for batch in data for name in batch["ids"][:3]}


@pytest.mark.parametrize("same_ids", [True, False])
def test_rows_that_a_defense_adds_leave_no_mark_on_the_others(same_ids):
    class Adds(Defense):
        def training_loss(self, step, batch):
            new = {**batch, "input_ids": batch["input_ids"].flip(0), "labels": batch["labels"].flip(0)}
            new["attention_mask"] = batch["attention_mask"].flip(0)
            new["ids"] = [name if same_ids else f"new {name}" for name in reversed(batch["ids"])]
            more = {
                key: [*v, *new[key]] if key == "ids" else torch.cat([v, new[key]]) for key, v in batch.items()
            }
            return step(more)

    plain = errors_of(jtt())
    for inner in ([], [VREx()]):
        assert errors_of(jtt(), Adds(), *inner) == plain


@pytest.mark.parametrize("same_ids", [True, False])
def test_an_added_row_weighs_like_its_original_where_it_has_its_id(same_ids):
    class Adds(Defense):
        place = "data"

        def training_loss(self, step, batch):
            ids = batch["ids"] if same_ids else [f"new {name}" for name in batch["ids"]]
            more = {k: torch.cat([v, v]) if k != "ids" else [*v, *ids] for k, v in batch.items()}
            with self.chain.replacing(more):
                return step(more)

    weighed = []

    class Spy(JTT):
        def _weights_of(self, keys):
            weighed.append(super()._weights_of(keys))
            return weighed[-1]

    fit(PlainEncoder(), [Adds(), Spy(head="head")], shuffled(True))
    own, added = torch.stack(weighed).chunk(2, dim=1)
    assert len(own.unique()) == 2
    assert torch.equal(added, own if same_ids else own.min().expand_as(added))


def test_rows_behind_the_loaded_ones_are_known_by_what_they_are():
    class Adds(Defense):
        def training_loss(self, step, batch):
            loss = step(batch)
            number = len(batch["ids"])
            changed = {**batch, "ids": [f"new {name}" for name in batch["ids"]]}
            with self.chain.perturbing(), self.chain.on_rows(torch.arange(number, 2 * number)):
                return loss + step(changed)

    asked = []

    class Spy(JTT):
        def _weights_of(self, keys):
            asked.append(keys)
            return super()._weights_of(keys)

    fit(PlainEncoder(), [Spy(head="head"), Adds()], shuffled(True))
    assert len(asked) == 8
    assert all([f"new {key}" for key in a] == b for a, b in zip(asked[::2], asked[1::2], strict=True))


@pytest.mark.parametrize("outer", [FreeLB, VREx])
def test_composes(outer):
    with_both, alone = PlainEncoder(), PlainEncoder()
    fit(with_both, [jtt(), outer()], shuffled(True), max_epochs=3)
    fit(alone, [outer()], shuffled(True), max_epochs=3)
    assert not torch.allclose(with_both.head.weight, alone.head.weight, atol=1e-4)


def test_rows_are_told_apart_by_tokens_and_label_without_padding():
    short = {"input_ids": [[5, 6, 0]], "attention_mask": [[1, 1, 0]], "labels": [1]}
    long = {"input_ids": [[5, 6, 0, 0, 0]], "attention_mask": [[1, 1, 0, 0, 0]], "labels": [1]}
    left = {"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]], "labels": [1]}
    other = {**short, "labels": [0]}
    longer = {**short, "attention_mask": [[1, 1, 1]]}

    def key(values):
        return jtt()._keys_of({name: torch.tensor(value) for name, value in values.items()})[0]

    assert key(short) == key(long) == key(left)
    assert len({key(short), key(other), key(longer)}) == 3


def test_ids_may_be_numbers_and_stand_in_a_tuple():
    ids = torch.tensor([7, 8])
    assert jtt(id_key=1)._keys_of((torch.zeros(2, 3), ids)) == ["7", "8"]
    assert jtt(id_key="row")._keys_of({"row": ids}) == ["7", "8"]


# Resuming -------------------------------------------------------------------------------------------


class Resumable:
    """Batches in another order in each epoch, from where a checkpoint was made."""

    def __init__(self, epoch):
        self.whole, self.epoch, self.done = list(shuffled(False)), epoch, 0

    def __len__(self):
        return len(self.whole)

    def __iter__(self):
        if self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        while self.done < len(self):
            self.done += 1
            yield self.whole[order[self.done - 1]]

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state_dict):
        self.epoch, self.done = state_dict["epoch"], state_dict["done"]


def steady(folder, *callbacks, ckpt_path=None, perturb=0.0, epoch=0):
    module = Momentum().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(perturb)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[jtt(upweight=5.0), *callbacks],
        default_root_dir=folder,
        precision="64-true",
        max_epochs=4,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Resumable(epoch), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


def test_resumes_exactly_in_either_stage(tmp_path):
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path, filename="end-{epoch}", save_top_k=-1)
    whole = steady(tmp_path, steps, ends)
    # Lightning puts a data loader back where it was within an epoch, not between two.
    names = {f"step={step}": 0 for step in (1, 3, 4, 5, 8, 10)} | {"end-epoch=0": 1, "end-epoch=1": 2}
    for name, epoch in names.items():
        resumed = steady(tmp_path, ckpt_path=tmp_path / f"{name}.ckpt", perturb=1.0, epoch=epoch)
        try:
            assert_same_weights(resumed, whole)
        except AssertionError as error:
            raise AssertionError(f"resumed from {name}") from error


def test_starting_weights_are_stored_only_while_they_are_needed(tmp_path):
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    steady(tmp_path, steps)

    def stored(step):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        return next(state for key, state in checkpoint["callbacks"].items() if key.startswith("JTT"))

    start = stored(4)["start"]["weights"]
    assert set(start) == {name for name, _ in Momentum().named_parameters()}
    assert all(torch.equal(value, Momentum().double().state_dict()[name]) for name, value in start.items())
    assert stored(4)["retraining"] is False
    assert stored(5)["start"] is None
    assert stored(5)["retraining"] is True
    assert len(stored(5)["wrong"]) == 16


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    module = PlainEncoder()
    trainer = fit(module, [], shuffled(True), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    again = Trainer(
        accelerator="cpu", callbacks=[jtt()], max_epochs=3, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match="goes on from a checkpoint that was made without it"):
        again.fit(PlainEncoder(), shuffled(True), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)


def test_a_second_fit_starts_anew():
    defense, first, second = jtt(), PlainEncoder(), PlainEncoder()
    fit(first, [defense], shuffled(True), max_epochs=3)
    fit(second, [defense], shuffled(True), max_epochs=3)
    assert_same_weights(second, first, rtol=0, atol=0)


def test_a_second_fit_keeps_nothing_of_the_first(tmp_path):
    """Nor when it goes on from a checkpoint that was made without the defense."""
    defense = jtt()
    fit(PlainEncoder(), [], shuffled(True), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    fit(PlainEncoder(), [defense], shuffled(True))
    again = Trainer(
        accelerator="cpu", callbacks=[defense], max_epochs=2, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match="goes on from a checkpoint that was made without it"):
        again.fit(PlainEncoder(), shuffled(True), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert not defense.state_dict()["wrong"]


class FailsOnce(Callback):
    def __init__(self):
        self.failed = False

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")


def test_a_fit_that_goes_on_after_an_error_goes_back_to_the_first_weights():
    defense, module = jtt(), PlainEncoder()
    first = copy.deepcopy(module.state_dict())
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[defense, FailsOnce()],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, shuffled(True))
    assert trainer.global_step == 2
    start = defense.state_dict()["start"]["weights"]
    trainer.fit(module, shuffled(True))
    assert defense.state_dict()["retraining"]
    assert all(torch.equal(start[name], value) for name, value in first.items() if name in start)
    assert {"embed.weight", "head.weight"} <= set(start)


def test_only_what_trains_goes_back():
    torch.manual_seed(0)
    module = HuggingFaceProject(lora=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stored = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            stored.append(trainer.callbacks[0].state_dict()["start"])

    fit(module, [JTT(), Spy()], batches(module))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert trained <= set(stored[0]["weights"])
    assert not frozen & set(stored[0]["weights"])
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in frozen)


# Two processes --------------------------------------------------------------------------------------


class Sharded(Momentum):
    """Each of n processes sees its share of the same eight rows a step: another share in each epoch."""

    def train_dataloader(self):
        number = self.trainer.world_size
        part = (self.trainer.global_rank + self.trainer.current_epoch) % number
        return DataLoader(rows()[part::number], batch_size=8 // number)


@pytest.mark.slow
def test_two_processes_train_like_one():
    def train(devices):
        module = Sharded().double()
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[jtt(upweight=5.0)],
            precision="64-true",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module)
        return module.state_dict()

    one, two = train(1), train(2)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-11, msg=name)


# Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"identification_epochs": -1},
            "Expected `identification_epochs` to be a whole number >= 0, but got -1",
        ),
        ({"identification_epochs": 0.5}, "Expected `identification_epochs`"),
        ({"upweight": 0.5}, "Expected `upweight` to be a number >= 1, but got 0.5"),
        ({"upweight": float("nan")}, "Expected `upweight`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        JTT(**settings)


def test_training_that_ends_with_the_first_stage_is_refused():
    with pytest.raises(ConfigError, match=r"max_epochs. to be more than identification_epochs=2.*but got 2"):
        fit(PlainEncoder(), [jtt(identification_epochs=2)])
    fit(PlainEncoder(), [jtt()], fast_dev_run=True)


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="Expected to find the layer of PlainEncoder"):
        fit(PlainEncoder(), [JTT()])
    with pytest.raises(ConfigError, match="Did you mean «labels»"):
        fit(PlainEncoder(), [jtt(label_key="label")])
    with pytest.raises(ConfigError, match="'ids' or 'input_ids', by which JTT tells rows apart"):
        jtt()._keys_of({"tokens": torch.zeros(2, 3)})
