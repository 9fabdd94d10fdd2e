from __future__ import annotations

import copy
import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_robust import Backbone, RobustClassifier, TextDataModule, TextSource
from lightning_robust.attacks import AttackEngine, AttackResult, Item
from lightning_robust.defenses.adversarial_augmentation import AdversarialAugmentation
from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.extra_rows import join_rows, rows_like
from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.group_dro import GroupDRO
from lightning_robust.defenses.jtt import JTT
from lightning_robust.defenses.sam import SAM
from lightning_robust.errors import ConfigError, RobustError
from lightning_robust.modules.victim import find_victim
from tests.attacks.tiny import NgramVictim, sentences, tiny_tokenizer, tiny_victim
from tests.callbacks.test_foreign_project import HuggingFaceProject
from tests.defenses.training import assert_same_weights
from tests.foreign import VOCABULARY, PlainEncoder
from tests.modules.models import save_model

LENGTH = 8


def word_ids(text: str) -> list[int]:
    return [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in text.split()]


def collate(items: list[Item]) -> dict:
    ids = torch.zeros(len(items), LENGTH, dtype=torch.long)
    for row, item in zip(ids, items, strict=True):
        words = torch.tensor(word_ids(item.text)[:LENGTH])
        row[: len(words)] = words
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([item.label for item in items]),
        "domain": torch.tensor([int(item.domain) for item in items]),
    }


def victim(module):
    def predict(texts):
        batch = collate([Item("", text, 0, "0") for text in texts])
        with torch.no_grad():
            return module(batch["input_ids"], batch["attention_mask"]).softmax(-1)

    return predict


def labelled(number: int = 24) -> list[Item]:
    """Two classes of which the untrained module has an idea, so that there is something to attack."""
    texts = sentences(number, seed=2, shortest=3, longest=LENGTH)
    scores = victim(PlainEncoder())(texts)[:, 1]
    labels = (scores > scores.median()).long().tolist()
    return [Item(f"id{i}", t, c, str(i % 3)) for i, (t, c) in enumerate(zip(texts, labels, strict=True))]


ITEMS = labelled()


def plain(**settings) -> AdversarialAugmentation:
    given = {"items": ITEMS, "collate": collate, "victim": victim, "progress": False, "share": 0.5}
    return AdversarialAugmentation(**given | settings)


def train(module, callbacks, folder: Path, data=None, ckpt_path=None, own_data=False, **settings) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **settings},
    )
    if data is None and not own_data:
        data = DataLoader(ITEMS, batch_size=6, collate_fn=collate)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class Recording(PlainEncoder):
    """Keeps every batch that its step is called on, by epoch and number."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls: dict[tuple[int, int], list[dict]] = {}

    def training_step(self, batch, batch_idx):
        self.calls.setdefault((self.trainer.current_epoch, batch_idx), []).append(batch)
        return super().training_step(batch, batch_idx)


class Watching(AdversarialAugmentation):
    """Keeps the pool of each epoch and the weights that it was made with."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            self.seen = {**getattr(self, "seen", {}), trainer.current_epoch: list(self._pool)}
            self.weights = {**getattr(self, "weights", {}), trainer.current_epoch: copy.deepcopy(pl_module)}


def watching(**settings) -> Watching:
    given = {"items": ITEMS, "collate": collate, "victim": victim, "progress": False, "share": 0.5}
    return Watching(**given | settings)


def rows_of(batch) -> list[tuple]:
    ids, labels, domains = (batch[key].tolist() for key in ("input_ids", "labels", "domain"))
    return sorted(zip(map(tuple, ids), labels, domains, strict=True))


def losses(module, batch):
    return nn.functional.cross_entropy(
        module(batch["input_ids"], batch["attention_mask"]), batch["labels"], reduction="none"
    )


# The rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_equals_the_update_written_out(weight, accumulate, tmp_path):
    ours, theirs = Recording().double(), PlainEncoder().double()
    defense = watching(weight=weight)
    settings = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    train(ours, [defense], tmp_path, **settings)
    loaded = list(DataLoader(ITEMS, batch_size=6, collate_fn=collate))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for epoch in range(3):
        used = []
        for number, batch in enumerate(loaded):
            calls = ours.calls[epoch, number]
            if weight == 1:
                (whole,) = calls
                extra = {key: value[6:] for key, value in whole.items()}
                assert all(torch.equal(whole[key][:6], batch[key]) for key in batch)
            else:
                extra = calls[0] if len(calls) == 2 else {key: value[:0] for key, value in batch.items()}
                assert all(torch.equal(calls[-1][key], batch[key]) for key in batch)
            used += rows_of(extra)
            clean, new = losses(theirs, batch), losses(theirs, extra)
            loss = (clean.sum() + weight * new.sum()) / (len(clean) + weight * len(new))
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        pool = defense.seen[epoch]
        assert sorted(used) == (rows_of(collate(pool)) if pool else []), "each of the pool once per epoch"
        assert bool(pool) == (epoch > 0)
    assert_same_weights(ours, theirs)


def test_the_pool_is_of_successes_on_a_share_with_the_present_weights(tmp_path):
    defense = watching(share=0.5)
    train(PlainEncoder(), [defense], tmp_path)
    by_id = {item.id: item for item in ITEMS}
    for epoch in (1, 2):
        pool, module = defense.seen[epoch], defense.weights[epoch]
        rows = read(tmp_path, epoch)
        assert len(rows) == 12
        assert {row["item_id"] for row in rows if row["status"] == "success"} == {one.id for one in pool}
        assert pool
        for one in pool:
            before = by_id[one.id]
            assert (one.label, one.domain) == (before.label, before.domain)
            assert one.text != before.text
            assert victim(module)([before.text, one.text]).argmax(1).tolist() == [one.label, 1 - one.label]
    assert {r["item_id"] for r in read(tmp_path, 1)} != {r["item_id"] for r in read(tmp_path, 2)}


def read(folder: Path, epoch: int, attack: str = "deepwordbug", rank: int = 0) -> list[dict]:
    path = folder / "augmentation" / f"epoch={epoch:03d}-{attack}.rank{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_adversarial_rows_are_spread_evenly_in_an_order_of_each_epochs_own(tmp_path):
    module, defense = Recording(), watching(every_n_epochs=9, share=1.0)
    train(module, [defense], tmp_path)
    numbers = [len(module.calls[1, i][0]["labels"]) - 6 for i in range(4)]
    assert sum(numbers) == len(defense.seen[1])
    assert max(numbers) - min(numbers) <= 1
    orders = [
        [row for i in range(4) for row in module.calls[epoch, i][0]["input_ids"][6:].tolist()]
        for epoch in (1, 2)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_attacks_come_when_they_are_due(tmp_path):
    defense = watching(clean_epochs=2, every_n_epochs=2)
    train(PlainEncoder(), [defense], tmp_path, max_epochs=6)
    assert sorted(p.name[6:9] for p in (tmp_path / "augmentation").iterdir()) == ["002", "004"]
    pools = [[one.text for one in defense.seen[epoch]] for epoch in range(6)]
    assert pools[:2] == [[], []]
    assert pools[2]
    assert pools[2] == pools[3] != pools[4] == pools[5]


def test_what_is_logged(tmp_path):
    defense = watching()
    metrics = train(PlainEncoder(), [defense], tmp_path, max_epochs=2).callback_metrics
    rows = read(tmp_path, 1)
    status = [row["status"] for row in rows]
    assert float(metrics["augmentation/share_new"]) == pytest.approx(status.count("success") / 24)
    rate = status.count("success") / (status.count("success") + status.count("failed"))
    assert float(metrics["augmentation/success_rate"]) == pytest.approx(rate)
    queries = sum(row["queries"] for row in rows) / 12
    assert float(metrics["augmentation/queries"]) == pytest.approx(queries)


def test_a_query_budget_bounds_each_search(tmp_path):
    train(PlainEncoder(), [plain(query_budget=5, share=1.0)], tmp_path, max_epochs=2)
    assert max(row["queries"] for row in read(tmp_path, 1)) == 5


# Without a trace ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"weight": 0.0}, {"query_budget": 1}])
def test_without_adversarial_rows_it_is_plain_training_bit_for_bit(settings, tmp_path):
    """With one query no attack succeeds, but all run."""

    def run(callbacks):
        module = PlainEncoder(dropout=0.3)
        torch.manual_seed(1)
        random.seed(1)
        data = DataLoader(ITEMS, batch_size=6, collate_fn=collate, shuffle=True)
        train(module, callbacks, tmp_path, data)
        return module, torch.rand(1), random.random()

    def drawing(module):
        predict = victim(module)
        return lambda texts: (torch.rand(1), random.random(), predict(texts))[2]

    (undefended, *drawn), (defended, *ours) = run([]), run([plain(victim=drawing, **settings)])
    assert all(torch.equal(a, b) for a, b in zip(undefended.parameters(), defended.parameters(), strict=True))
    assert drawn == ours
    assert (tmp_path / "augmentation").exists() == ("query_budget" in settings)


def test_same_seed_same_weights(tmp_path):
    def run(seed, name):
        module = PlainEncoder()
        train(module, [plain(seed=seed)], tmp_path / name)
        return module.head.weight.detach()

    first, second, other = run(0, "a"), run(0, "b"), run(1, "c")
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_attacks_see_eval_mode_and_modes_are_given_back(tmp_path):
    seen = []

    def modes(module):
        predict = victim(module)
        return lambda texts: (seen.append(module.dropout.training), predict(texts))[1]

    class Checks(PlainEncoder):
        def training_step(self, batch, batch_idx):
            assert self.training
            assert self.dropout.training
            return super().training_step(batch, batch_idx)

    train(Checks(dropout=0.5), [plain(victim=modes)], tmp_path)
    assert seen
    assert not any(seen)


# With other defenses ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["group_dro first", "augmentation first"])
def test_under_group_dro_adversarial_rows_belong_to_their_domain(order, tmp_path):
    ours, theirs = Recording().double(), PlainEncoder().double()
    group_dro, defense = GroupDRO(step_size=0.5), watching()
    both = [group_dro, defense] if order == "group_dro first" else [defense, group_dro]
    train(ours, both, tmp_path, precision="64-true")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    extra = 0
    for epoch in range(3):
        for number in range(4):
            calls = ours.calls[epoch, number]  # one for each domain
            whole = {key: torch.cat([call[key] for call in calls]) for key in calls[0]}
            extra += len(whole["labels"]) - 6
            each = losses(theirs, whole)
            risks = torch.stack([each[whole["domain"] == d].mean() for d in range(3)])
            q = q * torch.exp(0.5 * risks.detach())
            q = q / q.sum()
            optimizer.zero_grad()
            (q * risks).sum().backward()
            optimizer.step()
    assert extra == sum(map(len, defense.seen.values())) > 0
    assert_same_weights(ours, theirs)
    assert [group_dro.weights[d] for d in range(3)] == pytest.approx(q.tolist())


def test_other_defenses_see_one_larger_batch(tmp_path):
    for others in ([FreeLB()], [SAM()], [GroupDRO(), FreeLB()], [plain(seed=5)]):
        module, defense = Recording(), watching()
        trainer = train(module, [*others, defense], tmp_path, max_epochs=2)
        calls = 3 if isinstance(others[0], GroupDRO) else 1
        rows = [sum(len(b["labels"]) for b in module.calls[1, i][:calls]) - 6 for i in range(4)]
        pools = [one._pool for one in (defense, *others) if isinstance(one, AdversarialAugmentation)]
        assert sum(rows) == sum(map(len, pools)) > 0
        assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_one_pass_per_batch_is_counted(weight, tmp_path):
    counted = []

    class Counting(PlainEncoder):
        def on_train_batch_end(self, *args):
            counted.append(int(self.train_accuracy.tp + self.train_accuracy.fn))

    module, defense = Counting(), watching(weight=weight)
    train(module, [FreeLB(), defense] if weight == 2 else [SAM(), defense], tmp_path, max_epochs=2)
    new = len(defense.seen[1]) if weight == 1 else 0
    assert counted[3::4] == [24, 24 + new]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_jtt_weighs_adversarial_rows_as_what_they_are(weight, tmp_path):
    asked = []

    class Spy(JTT):
        def _keys_of_call(self, batch):
            keys = super()._keys_of_call(batch)
            asked.append((len(keys), keys == self._keys_of(batch)))
            return keys

    train(PlainEncoder(), [plain(weight=weight), Spy(head="head")], tmp_path, max_epochs=2)
    assert len({size for size, _ in asked}) > 1
    assert all(are_its_own for _, are_its_own in asked)


class AndFlipped(Defense):
    def training_loss(self, step, batch):
        clean = step(batch)
        return clean + 0 * step({**batch, "labels": 1 - batch["labels"]})


def test_the_larger_batch_is_the_plain_pass_of_the_defenses_inside(tmp_path):
    def accuracies(*inside):
        trainer = train(PlainEncoder(), [plain(), *inside], tmp_path, max_epochs=2)
        return trainer.callback_metrics["train_accuracy"], trainer.callback_metrics["train_loss_epoch"]

    assert accuracies(AndFlipped()) == accuracies()


# Batches of other kinds ---------------------------------------------------------------------------


class Pair(NamedTuple):
    ids: torch.Tensor
    labels: torch.Tensor


def test_tuples_join_where_collate_makes_them(tmp_path):
    def pairs(items):
        batch = collate(items)
        return Pair(batch["input_ids"], batch["labels"])

    sizes = []

    class Tuples(PlainEncoder):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch.labels))
            return nn.functional.cross_entropy(self(batch.ids, (batch.ids != 0).long()), batch.labels)

    data = DataLoader(ITEMS, batch_size=6, collate_fn=pairs)
    train(Tuples(), [plain(collate=pairs)], tmp_path, data, max_epochs=2)
    assert sum(sizes[4:]) == 24 + sum(row["status"] == "success" for row in read(tmp_path, 1))


TEXTS = [("film plot charming", 1), ("bleak", 0), ("tedious moving scene of the camera", 1)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_like_a_tokenizers_are_as_if_all_had_been_tokenized_together(side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side

    def made(pairs, domains):
        texts = [text for text, _ in pairs]
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt", return_special_tokens_mask=True))
        batch["labels"] = torch.tensor([label for _, label in pairs], dtype=torch.int32)
        return batch | {"domain": torch.tensor(domains), "ids": [f"{t}!" for t in texts], "scale": 2.0}

    items = [Item(f"{text}!", text, label, str(i)) for i, (text, label) in enumerate(TEXTS)]
    for first in (1, 2):
        batch = made(TEXTS[:first], list(range(first)))
        rows = rows_like(batch, items[first:], tokenizer, 64, lambda item: int(item.domain))
        joined = join_rows([batch, *rows], 0, side)
        whole = made(TEXTS, [0, 1, 2])
        assert list(joined) == list(whole)
        for key, value in whole.items():
            same = (
                torch.equal(joined[key], value) if isinstance(value, torch.Tensor) else joined[key] == value
            )
            assert same, key
            assert getattr(joined[key], "dtype", 0) == getattr(value, "dtype", 0)


def test_rows_that_cannot_join_are_one_clear_error():
    tokenizer = tiny_tokenizer()
    batch = dict(tokenizer(["film"], return_tensors="pt")) | {"labels": torch.tensor([1])}
    rows = rows_like(batch, [Item("a", "film plot", 1)], tokenizer, 64, lambda item: -1)
    with pytest.raises(ConfigError, match=r"a value of 'weights' for each row.*got none.*collate=my_collate"):
        join_rows([batch | {"weights": torch.ones(1)}, *rows])
    with pytest.raises(ConfigError, match="no padding token: set one"):
        join_rows([batch, *rows], None)
    with pytest.raises(ConfigError, match=r"'words'.*one length.*\(2,\) and \(3,\).*fixed length"):
        join_rows([{"words": torch.ones(1, 2)}, {"words": torch.ones(1, 3)}])
    with pytest.raises(ConfigError, match=r"a dict with `input_ids`.*got a tuple"):
        rows_like((1, 2), [], tokenizer, 64, lambda item: -1)
    with pytest.raises(ConfigError, match=r"hold 'label', but it holds: input_ids"):
        rows_like(batch, [], tokenizer, 64, lambda item: -1, label_key="label")


# Hugging Face projects ----------------------------------------------------------------------------

REVIEWS = sentences(18, seed=4)


class Slow(HuggingFaceProject):
    """Stays, within an epoch, near the weights that classify the examples as they are labelled."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def project(kind: str, lora: bool):
    """A module whose predictions small edits change, its data, and the examples as it classifies them."""
    module = Slow(kind)
    module.model = tiny_victim(kind).model.train()
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = "[PAD]"
        module.model.config.pad_token_id = module.tokenizer.pad_token_id
    labels = find_victim(module)(REVIEWS).argmax(1).tolist()
    if lora:
        targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
        module.model = get_peft_model(module.model, config)

    def tokenized(part):
        batch = dict(module.tokenizer([text for text, _ in part], padding=True, return_tensors="pt"))
        batch.pop("token_type_ids", None)
        number = torch.arange(len(part))
        return batch | {"labels": torch.tensor([label for _, label in part]), "domain": number % 3}

    examples = list(zip(REVIEWS, labels, strict=True))
    return module, DataLoader(examples, batch_size=6, collate_fn=tokenized), examples


PRUTHI = {"name": "pruthi", "max_words": 2}


@pytest.mark.parametrize(
    ("kind", "lora", "attack"),
    [
        ("bert", False, "deepwordbug"),
        ("bert", True, "deepwordbug"),
        ("llama", True, "deepwordbug"),
        ("bert", False, PRUTHI),
    ],
)
def test_a_foreign_project_needs_items_only(kind, lora, attack, tmp_path):
    (module, data, examples), sizes = project(kind, lora), []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (sizes.append(batch), step(batch, batch_idx))[1]
    defense = AdversarialAugmentation(attack, share=1.0, items=examples, progress=False)
    train(module, [defense], tmp_path, data, max_epochs=2)
    name = attack if isinstance(attack, str) else attack["name"]
    new = [row for row in read(tmp_path, 1, name) if row["status"] == "success"]
    rows = [
        (b["input_ids"][i][b["attention_mask"][i] == 1].tolist(), int(b["labels"][i]), int(b["domain"][i]))
        for b in sizes[3:]
        for i in range(6, len(b["labels"]))
    ]
    assert new
    assert sorted(rows) == sorted(
        (module.tokenizer(r["perturbed_text"])["input_ids"], r["label"], -1) for r in new
    )


@pytest.mark.parametrize("cut_at", [6, None])
def test_adversarial_rows_are_cut_where_the_loaded_ones_are(cut_at, tmp_path):
    module, _, examples = project("bert", False)
    lengths = []

    def tokenized(part):
        options = {"truncation": cut_at is not None, "max_length": cut_at}
        batch = module.tokenizer([text for text, _ in part], padding=True, return_tensors="pt", **options)
        return {**batch, "labels": torch.tensor([label for _, label in part])}

    step = module.training_step
    module.training_step = lambda batch, batch_idx: (
        lengths.append(batch["attention_mask"].sum(1)),
        step(batch, batch_idx),
    )[1]
    data = DataLoader(examples, batch_size=6, collate_fn=tokenized)
    defense = AdversarialAugmentation(share=1.0, items=examples, progress=False)
    train(module, [defense], tmp_path, data, max_epochs=2)
    loaded, new = torch.cat(lengths[:3]), torch.cat([rows[6:] for rows in lengths[3:]])
    assert len(new)
    assert int(new.max()) == cut_at if cut_at else new.max() > loaded.max()
    again = AdversarialAugmentation(share=1.0, items=examples, progress=False)
    again.load_state_dict(defense.state_dict())
    assert again.state_dict() == defense.state_dict()


@pytest.mark.parametrize("cut", [False, True])
def test_short_rows_are_no_sign_of_a_cut(cut, tmp_path):
    module, _, examples = project("bert", False)
    size = 6 if cut else 50
    limits = []

    class Noting(AdversarialAugmentation):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            limits.append(self._cut_at)

    def tokenized(part):
        texts = [text for text, _ in part]
        batch = module.tokenizer(texts, padding=True, truncation=True, max_length=size, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in part])}

    examples = sorted(examples, key=lambda pair: len(pair[0]))
    lengths = [len(ids) for ids in module.tokenizer([text for text, _ in examples])["input_ids"]]
    assert max(lengths[:6]) < max(lengths)
    # Of the short half and, where they are cut, some of the others.
    data = DataLoader(examples[-6:] if cut else examples[:6], batch_size=6, collate_fn=tokenized)
    defense = Noting(share=1.0, items=examples, progress=False)
    train(module, [defense], tmp_path, data, max_epochs=2)
    assert limits == [None, 6 if cut else None]


def test_the_data_modules_examples_are_attacked(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = RobustClassifier(Backbone(path), learning_rate=1e-3, warmup_ratio=0.0)
    seen = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]
    data = TextDataModule(train=TextSource("demo", num_examples=60), batch_size=16)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[
            AdversarialAugmentation(share=0.5, victim=lambda _: NgramVictim(), progress=False),
            GroupDRO(),
        ],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    domain = {item.id: data.domains.index(item.domain) for item in data.train_items}
    new = sorted(row["item_id"] for row in read(tmp_path, 1) if row["status"] == "success")
    assert new
    pairs = [(i, d) for b in seen for i, d in zip(b["ids"], b["domain"].tolist(), strict=True)]
    assert len(pairs) == 2 * len(data.train_items) + len(new)
    assert all(domain[i] == d for i, d in pairs)


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"])
def test_a_resumed_training_ends_with_the_same_weights(checkpoint, tmp_path):
    whole, resumed = PlainEncoder(), PlainEncoder()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    train(whole, [plain(every_n_epochs=2), keep], tmp_path, max_epochs=4)
    with torch.no_grad():
        resumed.head.weight.add_(1.0)
    folder = tmp_path / "b"
    train(resumed, [plain(every_n_epochs=2)], folder, ckpt_path=tmp_path / checkpoint, max_epochs=4)
    assert_same_weights(resumed, whole, rtol=1e-6, atol=1e-7)
    assert any(row["status"] == "success" for row in read(tmp_path, 3))
    assert not folder.exists(), "the folder of the training that is resumed"


def test_a_training_resumed_within_an_epoch_goes_on_with_its_pool(tmp_path):
    whole, resumed = Recording(), Recording()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    train(whole, [plain(), keep], tmp_path, max_epochs=2)
    train(resumed, [plain()], tmp_path, ckpt_path=tmp_path / "epoch=1-step=6.ckpt", max_epochs=2)
    for number in (2, 3):
        ours, theirs = (module.calls[1, number][0]["input_ids"][6:] for module in (resumed, whole))
        assert torch.equal(ours, theirs)
    assert len(whole.calls[1, 2][0]["labels"]) + len(whole.calls[1, 3][0]["labels"]) > 12


def test_an_interrupted_attack_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = PlainEncoder()
    train(whole, [plain()], tmp_path / "whole")
    rows = read(tmp_path / "whole", 1)

    asked = []
    run = AttackEngine.run

    def stopping(self, attack, items, budget, seed, on_result):
        asked.append(len(items))

        def after(result: AttackResult) -> None:
            on_result(result)
            if len(read(tmp_path, 1)) == 5:
                raise RuntimeError("the machine went down")

        return run(self, attack, items, budget, seed, after if len(asked) == 1 else on_result)

    monkeypatch.setattr(AttackEngine, "run", stopping)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(RuntimeError, match="went down"):
        train(PlainEncoder(), [plain(), keep], tmp_path)
    path = next((tmp_path / "augmentation").iterdir())
    path.write_bytes(path.read_bytes()[:-20])  # and a line was torn
    resumed = PlainEncoder()
    train(resumed, [plain()], tmp_path / "elsewhere", ckpt_path=tmp_path / "epoch=0.ckpt")
    assert asked[:2] == [12, 8]
    assert_same_weights(resumed, whole, rtol=1e-6, atol=1e-7)
    plainly = [{k: v for k, v in row.items() if k != "seconds"} for row in (*rows, *read(tmp_path, 1))]
    key = json.dumps
    assert sorted(map(key, plainly[:12])) == sorted(map(key, plainly[12:]))


def test_results_of_other_weights_are_not_taken_over(tmp_path):
    first = read_after(tmp_path, PlainEncoder(learning_rate=0.1))
    again = read_after(tmp_path, PlainEncoder(learning_rate=0.1))
    other = read_after(tmp_path, PlainEncoder(learning_rate=0.2))
    assert first == again, "seconds included: these are the same lines"
    assert [r["probability"] for r in other] != [r["probability"] for r in first]
    assert len(other) == 12


def read_after(folder, module):
    train(module, [plain()], folder, max_epochs=2)
    return read(folder, 1)


def test_a_second_training_starts_without_the_first_ones_pool(tmp_path):
    defense = watching(clean_epochs=0)
    train(PlainEncoder(), [defense], tmp_path / "a")
    first, defense.seen = defense.seen, {}
    train(PlainEncoder(), [defense], tmp_path / "b")
    assert first == defense.seen


def test_state_is_plain_and_its_key_tells_settings_but_no_texts(tmp_path):
    defense = plain()
    train(PlainEncoder(), [defense], tmp_path, max_epochs=2)
    torch.save(defense.state_dict(), tmp_path / "state")
    other = plain()
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.state_dict() == defense.state_dict()
    assert defense.state_dict()["pool"]
    assert ITEMS[0].text not in defense.state_key
    assert defense.state_key != plain(attack="pruthi").state_key


def test_a_dry_run_writes_nothing(tmp_path):
    train(PlainEncoder(), [plain(clean_epochs=0)], tmp_path, fast_dev_run=True, max_epochs=1)
    assert not list(tmp_path.iterdir())


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": -0.1}, "`share` to be a number from 0 to 1"),
        ({"share": float("nan")}, "`share`"),
        ({"weight": -1.0}, "`weight` to be a number >= 0"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be a whole number >= 1"),
        ({"clean_epochs": -1}, "`clean_epochs`"),
        ({"query_budget": 0}, "`query_budget`"),
        ({"attack": "deepwordbugs"}, "deepwordbug"),
        ({"attack": 3}, "a name, or settings with a `name`, but got 3"),
        ({"attack": "embedding_pgd"}, "changes the embedding"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdversarialAugmentation(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": None}, r"found no texts.*items=\[\(text, label\)"),
        ({"victim": None}, r"one Hugging Face model in Recording.*victim=module -> victim"),
        ({"collate": None}, r"a tokenizer on Recording.*give `collate` and `victim`"),
        ({"attack": "a2t_mlm"}, r"embedding_gradients"),
        ({"collate": lambda items: collate(items[:0] or ITEMS[:2])}, r"a batch of 1 rows.*got 2"),
        ({"weight": 2.0}, r"`weight` to be 1 together with GroupDRO, but got 2.0"),
        ({"items": [*ITEMS, ITEMS[0]]}, r"'id0' occurs again"),
    ],
)
def test_what_is_missing_is_one_error_before_the_first_step(settings, message, tmp_path):
    module = Recording()
    with pytest.raises(RobustError, match=message):
        train(module, [plain(**settings), GroupDRO()], tmp_path)
    assert not module.calls


def test_training_that_ends_before_the_first_attack_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"max_epochs. to be more than clean_epochs=1, .*but got 1"):
        train(PlainEncoder(), [plain()], tmp_path, max_epochs=1)
    train(PlainEncoder(), [plain(share=0)], tmp_path, max_epochs=1)


def test_a_loader_of_unknown_length_is_refused(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from ITEMS * 2

    data = DataLoader(Endless(), batch_size=6, collate_fn=collate)
    with pytest.raises(ConfigError, match=r"of known length.*limit_train_batches=1000"):
        train(PlainEncoder(), [plain()], tmp_path, data)
    train(PlainEncoder(), [plain()], tmp_path, data, limit_train_batches=3, max_epochs=2)


def test_unknown_domains_are_told(tmp_path):
    module, data, examples = project("bert", False)
    defense = AdversarialAugmentation(share=0.5, items=examples, progress=False)
    with pytest.warns(UserWarning, match=r"18 of 18 training examples.*unknown domain \(-1\) for GroupDRO"):
        train(module, [defense, GroupDRO()], tmp_path, data, max_epochs=2)


# Processes ----------------------------------------------------------------------------------------


class Sharded(Recording):
    def train_dataloader(self):
        number, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(ITEMS[rank::number], batch_size=6 // number, collate_fn=collate)

    def on_train_end(self):
        mine = [row for (epoch, _), (batch,) in self.calls.items() if epoch == 1 for row in extra_rows(batch)]
        flat = torch.cat([p.detach().flatten() for p in self.parameters()])
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, (mine, flat, self.trainer.callbacks[0].seen[1]))
        (a, first, pool), (b, second, same) = everyone
        assert torch.equal(first, second)
        assert pool == same
        assert abs(len(a) - len(b)) <= 1
        assert sorted([*a, *b]) == rows_of(collate(pool)), "disjoint parts that are the pool together"


def extra_rows(batch):
    return rows_of({key: value[3:] for key, value in batch.items()})


@pytest.mark.slow
def test_two_processes_share_the_attack_and_the_pool(tmp_path):
    defense = watching()
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 2}
    train(Sharded(), [defense], tmp_path, None, own_data=True, **settings)
    ranks = [{row["item_id"] for row in read(tmp_path, 1, rank=rank)} for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    assert not ranks[0] & ranks[1]
