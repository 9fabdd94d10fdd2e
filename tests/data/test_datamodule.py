from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_robust.data.collate import TextCollator
from lightning_robust.data.datamodule import TextDataModule
from lightning_robust.data.demo import demo_tokenizer
from lightning_robust.data.items import Item
from lightning_robust.data.sources import TextSource
from lightning_robust.errors import ConfigError, DataError


class Recorder(pl.LightningModule):
    """Remembers which ids it saw in which epoch."""

    def __init__(self, num_labels: int = 2) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.tokenizer = demo_tokenizer()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch["ids"])
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.setdefault(-1, []).extend(batch["ids"])

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.setdefault(-2, []).extend(batch["ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **settings,
        }
    )


def demo_module(**settings: Any) -> TextDataModule:
    return TextDataModule(
        train=TextSource("demo", num_examples=40, domain_column="domain"),
        clean=TextSource("demo", split="test", num_examples=10),
        ood={"gadgets": TextSource("demo", split="ood_gadgets", num_examples=10)},
        adversarial={"typos": TextSource("demo", split="typos", num_examples=10)},
        **{"batch_size": 8, "tokenizer": demo_tokenizer(), **settings},
    )


def write(path: Path, rows: list[tuple[str, int]]) -> TextSource:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return TextSource(str(path))


def test_batch_has_the_promised_keys_and_is_padded_to_its_longest() -> None:
    module = demo_module()
    module.setup("fit")
    for batch in module.train_dataloader():
        assert {"input_ids", "attention_mask", "labels", "domain", "ids"} <= set(batch)
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
        assert batch["labels"].dtype == batch["domain"].dtype == torch.long
        assert len(batch["ids"]) == len(batch["labels"])


def test_domains_index_the_batch() -> None:
    module = demo_module()
    module.setup("fit")
    by_id = {item.id: item.domain for item in module.train_items}
    assert sorted(module.domains) == ["books", "films", "hotels"]
    for batch in module.train_dataloader():
        assert [by_id[id_] for id_ in batch["ids"]] == [module.domains[index] for index in batch["domain"]]


def test_domains_are_the_sources_where_none_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "books.tsv", [("good", 1), ("bad", 0)])
    second = write(tmp_path / "films.tsv", [("fine", 1), ("poor", 0)])
    module = TextDataModule([first, second], validation_fraction=0)
    assert module.domains == ["books", "films"]
    with pytest.raises(ConfigError, match=r"different names.*'books' twice"):
        TextDataModule([first, first])


def test_environments_have_names_and_roles() -> None:
    environments = demo_module().environments()
    assert {name: environment.role for name, environment in environments.items()} == {
        "clean": "clean",
        "gadgets": "ood",
        "typos": "adversarial",
    }
    assert list(environments) == ["clean", "gadgets", "typos"]
    assert all(len(environment.items) == 10 for environment in environments.values())


def test_clean_environment_falls_back_to_validation() -> None:
    module = TextDataModule(TextSource("demo", num_examples=40))
    assert module.environments()["clean"].items == module.validation_items
    assert len(module.validation_items) == 4
    assert not {i.id for i in module.validation_items} & {i.id for i in module.train_items}


def test_held_out_part_does_not_depend_on_row_order(tmp_path: Path) -> None:
    rows = [(f"text number {n}", n % 2) for n in range(50)]
    first = TextDataModule(write(tmp_path / "a.tsv", rows))
    (tmp_path / "other").mkdir()
    second = TextDataModule(write(tmp_path / "other" / "a.tsv", rows[::-1]))
    assert {i.id for i in first.validation_items} == {i.id for i in second.validation_items}


def test_validation_and_test_loops_read_their_sets(tmp_path: Path) -> None:
    module, data = Recorder(), demo_module(tokenizer=None, eval_batch_size=3)
    loop = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    loop.fit(module, data)
    loop.test(module, data, verbose=False)
    assert module.seen[-1] == [item.id for item in data.validation_items]
    assert module.seen[-2] == [item.id for item in data.environments()["clean"].items]


def test_fit_without_validation(tmp_path: Path) -> None:
    module = Recorder()
    trainer(tmp_path, max_epochs=1).fit(module, demo_module(validation_fraction=0))
    assert len(module.seen[0]) == 40
    assert -1 not in module.seen


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_order_changes_with_epoch_and_seed_and_survives_resume(tmp_path: Path, at_epoch_end: bool) -> None:
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, demo_module())
    begun = Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=at_epoch_end)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(begun, demo_module())
    assert torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["epoch"] == 1
    resumed = Recorder()
    trainer(tmp_path, max_epochs=3).fit(resumed, demo_module(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert {**begun.seen, **resumed.seen, -1: []} == {**whole.seen, -1: []}
    assert sorted(whole.seen[0]) == sorted(whole.seen[1])
    assert whole.seen[0] != whole.seen[1]
    other = Recorder()
    trainer(tmp_path, max_epochs=2).fit(other, demo_module(seed=1))
    assert other.seen[0] != whole.seen[1]


def test_ranks_share_the_examples() -> None:
    module = demo_module()
    module.setup("fit")
    parts = []
    for rank in range(2):
        twin = copy.copy(module)
        twin.trainer = type("Rank", (), {"world_size": 2, "global_rank": rank})()
        parts.append([id_ for batch in twin.train_dataloader() for id_ in batch["ids"]])
    assert len(parts[0]) == len(parts[1]) == 18
    assert set(parts[0]) | set(parts[1]) == {item.id for item in module.train_items}


def test_global_rng_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    module = demo_module()
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert list(loader)
    assert torch.equal(before, torch.random.get_rng_state())


def test_pairs_are_encoded_as_pairs() -> None:
    collator = TextCollator(demo_tokenizer(), 64)
    batch = collator([Item("1", ("the plot", "the cast was good"), 1), Item("2", ("a", "b"), 0)])
    expected = demo_tokenizer()("the plot", "the cast was good")["input_ids"]
    assert batch["input_ids"][0].tolist() == expected
    assert batch["domain"].tolist() == [-1, -1]


@pytest.mark.parametrize("texts", [[("a", "b", "c")], ["a", ("a", "b")]])
def test_more_than_two_texts_or_a_mixture_is_refused(texts: list[Any]) -> None:
    with pytest.raises(DataError, match="Expected single texts or pairs"):
        TextCollator(demo_tokenizer(), 64)([Item(str(n), text, 0) for n, text in enumerate(texts)])


def test_settings_of_the_tokenizer_file_are_overridden() -> None:
    tokenizer = demo_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=60)
    tokenizer.backend_tokenizer.enable_truncation(4)
    batch = TextCollator(tokenizer, 12)([Item("1", "good " * 8, 1)])
    assert batch["input_ids"].shape == (1, 10)


def test_truncation_to_max_length_of_argument_module_or_tokenizer() -> None:
    long = [Item("1", "the plot was good " * 1000, 1)]
    module = demo_module(max_length=7)
    module.setup("fit")
    assert module._collator is not None
    assert module._collator(long)["input_ids"].shape == (1, 7)
    plain = demo_module()
    plain.setup("fit")
    assert plain._collator is not None
    assert plain._collator(long)["input_ids"].shape == (1, 128)
    held = demo_module()
    module_with_limit = type("Model", (), {"max_length": 9, "num_labels": 2})()
    held.trainer = type("T", (), {"lightning_module": module_with_limit})()  # type: ignore[assignment]
    held.setup("fit")
    assert held._collator is not None
    assert held._collator.max_length == 9


def test_tokenizer_without_padding_token_is_refused() -> None:
    tokenizer = demo_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no padding token"):
        demo_module(tokenizer=tokenizer).setup("fit")


def test_missing_tokenizer_is_named() -> None:
    with pytest.raises(ConfigError, match="There is no tokenizer"):
        demo_module(tokenizer=None).setup("fit")


def test_labels_beyond_the_model_are_refused(tmp_path: Path) -> None:
    data = TextDataModule(write(tmp_path / "a.tsv", [("x", 0), ("y", 1), ("z", 2)]), validation_fraction=0)
    assert data.num_labels == 3
    with pytest.raises(DataError, match=r"2 labels, but «train» holds label 2.*num_labels: 3"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(num_labels=2), data)


def test_overlap_and_one_class_sets_are_warned_about(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", [("x", 0), ("y", 1), ("z", 1)])
    clean = write(tmp_path / "clean.tsv", [("x", 0), ("z", 1), ("w", 1)])
    shifted = write(tmp_path / "shifted.tsv", [("v", 1), ("u", 1)])
    data = TextDataModule(train, validation_fraction=0, clean=clean, ood={"far": shifted})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.environments()
    messages = [str(warning.message) for warning in caught]
    assert any(message.startswith("2 of 3 texts of «clean» are training texts") for message in messages)
    assert any(message.startswith("All 2 examples of «far» have the label 1") for message in messages)
    assert len(messages) == 2


def test_label_names_come_from_the_map(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,pos\ny,neg\n")
    source = TextSource(str(tmp_path / "a.csv"), label_map={"neg": 0, "pos": 1})
    data = TextDataModule(source, validation_fraction=0)
    assert data.label_names == ["neg", "pos"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be >= 1"),
        ({"validation_fraction": 1.0}, "`validation_fraction` to be >= 0 and < 1"),
        ({"ood": {"clean": TextSource("demo")}}, "different names, but got clean twice"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextDataModule(TextSource("demo"), **settings)


def test_nothing_to_train_or_test_on() -> None:
    data = TextDataModule(tokenizer=demo_tokenizer())
    data.setup()
    with pytest.raises(ConfigError, match="nothing to train on"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="nothing to test on"):
        data.test_dataloader()


YAML = """
trainer: {{accelerator: cpu, max_epochs: 1, logger: false, enable_checkpointing: false,
          enable_progress_bar: false, enable_model_summary: false}}
data:
  batch_size: 8
  train:
{train}
  clean: {{path: demo, split: test, num_examples: 6}}
  ood:
    gadgets: {{path: demo, split: ood_gadgets, num_examples: 5}}
  adversarial:
    typos: {{path: demo, split: typos, label_map: {{0: 1, 1: 0}}, num_examples: 5}}
"""


@pytest.mark.parametrize(
    "train",
    [
        "    {path: demo, num_examples: 30, domain_column: domain}",
        "    - {path: demo, num_examples: 30, domain: first}\n    - {path: demo, split: test, domain: second}",
    ],
)
def test_lightning_cli_nests_sources_without_class_paths(tmp_path: Path, train: str) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(train=train))
    cli = LightningCLI(
        Recorder,
        TextDataModule,
        args=["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)],
        save_config_callback=None,
    )
    assert isinstance(cli.datamodule.train[0], TextSource)
    assert [len(e.items) for e in cli.datamodule.environments().values()] == [6, 5, 5]
    assert len(cli.datamodule.domains) == (3 if "domain_column" in train else 2)
