"""Our module, our data, our defenses and the monitor together."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust import Backbone, RobustClassifier, TextDataModule, TextSource
from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.defenses import FreeLB, VREx
from lightning_robust.results import read_records


def source(split: str, number: int) -> TextSource:
    return TextSource("demo", split=split, num_examples=number, name=split)


def train(folder, epochs, *, adaptation="full", watched=True, ckpt_path=None, every=1):
    backbone = Backbone("demo", adaptation=adaptation, dropout=0.2)
    module = RobustClassifier(backbone, learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
    data = TextDataModule(
        train=source("train", 48),
        validation=source("validation", 16),
        clean=source("test", 12),
        ood={"gadgets": source("ood_gadgets", 12)},
        adversarial={"typos": source("typos", 12)},
        batch_size=8,
    )
    monitor = RobustnessMonitor(
        ["deepwordbug", "embedding_pgd"],
        num_examples=4,
        records_dir=folder,
        progress=False,
        every_n_epochs=every,
    )
    keep = ModelCheckpoint(folder / "c", save_top_k=-1, filename="{epoch}")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[VREx(warmup_steps=4), FreeLB(), *([monitor] if watched else []), keep],
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def assert_equal(first: RobustClassifier, second: RobustClassifier) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_resumed_training_is_the_uninterrupted_one(adaptation, tmp_path):
    whole, run = train(tmp_path / "whole", 3, adaptation=adaptation)
    train(tmp_path / "parts", 1, adaptation=adaptation)
    torch.rand(7)  # the resumed process would be at another point of the global generator
    checkpoint = tmp_path / "parts" / "c" / "epoch=0.ckpt"
    resumed, again = train(tmp_path / "parts", 3, adaptation=adaptation, ckpt_path=checkpoint)
    assert_equal(whole, resumed)
    tables = [
        read_records(tmp_path / name).drop_columns(["run_id", "seconds"]) for name in ("whole", "parts")
    ]
    assert tables[0].equals(tables[1])
    for key, value in run.callback_metrics.items():
        torch.testing.assert_close(again.callback_metrics[key], value, rtol=0, atol=0, equal_nan=True)


def test_monitored_training_is_the_unmonitored_one(tmp_path):
    watched, _ = train(tmp_path / "watched", 2)
    alone, _ = train(tmp_path / "alone", 2, watched=False)
    assert_equal(watched, alone)


def test_a_checkpoint_gives_the_module_back(tmp_path):
    module, _ = train(tmp_path, 1)
    restored = RobustClassifier.load_from_checkpoint(tmp_path / "c" / "epoch=0.ckpt")
    texts = ["a splendid film", "what a dull, lifeless book"]
    assert torch.equal(restored.predict_proba(texts), module.predict_proba(texts))
