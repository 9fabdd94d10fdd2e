from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_robust.callbacks import AdapterCheckpoint
from lightning_robust.errors import BackboneError, ConfigError
from lightning_robust.modules.backbone import Backbone
from lightning_robust.modules.classifier import RobustClassifier
from tests.modules.models import TEXTS, loader, save_model, tokenizer, trainer


class Scored(RobustClassifier):
    """Logs the given scores, one per validation, and keeps the weights that each was for."""

    def __init__(self, *args, scores=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.scores, self.predictions = list(scores), []

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.predictions.append(self.predict_proba(TEXTS))
            if (score := self.scores[len(self.predictions) - 1]) is not None:
                self.log("score", score)


def predictions(folder):
    return RobustClassifier(Backbone(str(folder))).predict_proba(TEXTS)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_best_and_last_are_exported_beside_the_checkpoints(adaptation, mode, best, tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = Scored(Backbone(path, adaptation), learning_rate=1e-2, scores=[0.5, 0.9, 0.1, 0.5])
    callback = AdapterCheckpoint("score", mode=mode)
    run = trainer(tmp_path, callback, ModelCheckpoint(dirpath=tmp_path / "checkpoints"), max_epochs=4)
    run.fit(module, loader(module), loader(module))
    folder = tmp_path / "checkpoints"
    assert {f.name for f in folder.iterdir() if f.is_dir()} == {"export-best", "export-last"}
    assert (folder / "export-best" / "adapter_config.json").is_file() is (adaptation == "lora")
    torch.testing.assert_close(predictions(folder / "export-best"), module.predictions[best])
    torch.testing.assert_close(predictions(folder / "export-last"), module.predictions[-1])
    assert callback.best_score == pytest.approx(module.scores[best])


def test_resumed_run_keeps_the_best(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module = Scored(Backbone(path, "lora"), scores=[0.9])
    trainer(tmp_path, AdapterCheckpoint("score"), checkpoints).fit(module, loader(module), loader(module))
    best = predictions(tmp_path / "export-best")
    module = Scored(Backbone(path, "lora"), learning_rate=1e-2, scores=[0.5])
    resumed = trainer(tmp_path, AdapterCheckpoint("score"), ModelCheckpoint(dirpath=tmp_path), max_epochs=2)
    resumed.fit(module, loader(module), loader(module), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(predictions(tmp_path / "export-best"), best)
    assert not torch.equal(predictions(tmp_path / "export-last"), best)


def test_score_of_earlier_weights_is_not_credited_to_new_ones(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = Scored(Backbone(path, "lora"), learning_rate=1e-2, scores=[0.5, None, None])
    callback = AdapterCheckpoint("score", dirpath=str(tmp_path / "out"))
    trainer(tmp_path, callback, max_epochs=3).fit(module, loader(module), loader(module))
    torch.testing.assert_close(predictions(tmp_path / "out" / "export-best"), module.predictions[0])


def test_without_validation_the_last_is_exported(tmp_path):
    module = RobustClassifier(Backbone(save_model(tmp_path / "model", "bert"), "lora"), learning_rate=1e-2)
    run = trainer(tmp_path, AdapterCheckpoint(), max_epochs=2, enable_checkpointing=False)
    run.fit(module, loader(module))
    torch.testing.assert_close(predictions(tmp_path / "export-last"), module.predict_proba(TEXTS))


class Foreign(LightningModule):
    def __init__(self, model, tok=None):
        super().__init__()
        self.wrapped = nn.ModuleDict({"net": model})
        self.tokenizer = tok

    def training_step(self, batch, batch_idx):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        return self.wrapped["net"](**inputs).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_foreign_module_with_a_peft_model(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    module = Foreign(model, tokenizer())
    trainer(tmp_path, AdapterCheckpoint(), enable_checkpointing=False).fit(module, loader(module))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "export-last", num_labels=2)
    inputs = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert isinstance(Backbone(str(tmp_path / "export-last")).load()[0], PeftModel)


def test_module_without_a_model_fails_when_fit_starts(tmp_path):
    module = Foreign(nn.Linear(2, 2), tokenizer())
    with pytest.raises(BackboneError, match="one PEFT or Hugging Face model in Foreign, but found 0: none"):
        trainer(tmp_path, AdapterCheckpoint(), enable_checkpointing=False).fit(module, loader(module))


def test_unknown_metric_is_told_with_those_there_are(tmp_path):
    module = RobustClassifier(Backbone("demo"))
    run = trainer(tmp_path, AdapterCheckpoint("val/acuracy"), enable_checkpointing=False)
    with pytest.warns(
        UserWarning, match=r"`val/acuracy` was not logged.*Did you mean «val/accuracy»\? Logged: train"
    ):
        run.fit(module, loader(module), loader(module))


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "export-last").mkdir()
    (tmp_path / "export-last" / "notes.txt").write_text("mine")
    module = RobustClassifier(Backbone("demo"))
    with pytest.raises(ConfigError, match="left alone"):
        trainer(tmp_path, AdapterCheckpoint(), enable_checkpointing=False).fit(module, loader(module))
    assert (tmp_path / "export-last" / "notes.txt").read_text() == "mine"


def test_bad_settings():
    with pytest.raises(ConfigError, match="nothing would be saved"):
        AdapterCheckpoint(save_last=False)
    with pytest.raises(ConfigError, match="max or min, but got 'maximum'"):
        AdapterCheckpoint("score", mode="maximum")
