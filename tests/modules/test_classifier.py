from __future__ import annotations

import json
import math
import re

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_robust.errors import BackboneError, ConfigError
from lightning_robust.modules.backbone import Backbone
from lightning_robust.modules.classifier import RobustClassifier
from lightning_robust.modules.optimization import learning_rate_schedule
from tests.modules.models import TEXTS, loader, save_model, trained_weights, trainer

VARIANTS = [("full", "none"), ("head", "none"), ("lora", "none"), ("lora", "4bit"), ("head", "8bit")]
STEPS = {"learning_rate": 1e-2}


def every_epoch(folder, **settings):
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, **settings)


def fit(folder, module, *, epochs=1, ckpt_path=None, validate=True, shuffle=True, **settings):
    callback = every_epoch(folder, **settings)
    run = trainer(folder, callback, max_epochs=epochs)
    batches = loader(module, shuffle=shuffle, num_labels=module.hparams["num_labels"])
    run.fit(module, batches, loader(module, shuffle=False) if validate else None, ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize(("adaptation", "quantization"), VARIANTS)
def test_checkpoint_reloads_with_the_same_predictions(adaptation, quantization, tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = RobustClassifier(Backbone(path, adaptation, quantization, seed=5), **STEPS)
    untrained = module.predict_proba(TEXTS)
    fit(tmp_path, module)
    file = tmp_path / "epoch=0.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    everything = {f"model.{key}" for key in module.model.state_dict()}
    if adaptation == "full":
        assert set(checkpoint["state_dict"]) == everything
        (tmp_path / "model" / "model.safetensors").unlink()  # a full checkpoint needs no pretrained weights
    else:
        assert set(checkpoint["state_dict"]) == set(trained_weights(module))
    again = RobustClassifier.load_from_checkpoint(file)
    assert torch.equal(again.predict_proba(TEXTS), module.predict_proba(TEXTS))
    assert not torch.allclose(again.predict_proba(TEXTS), untrained, atol=1e-3)
    assert again.hparams == module.hparams


@pytest.mark.parametrize(("adaptation", "quantization"), VARIANTS)
def test_resumed_run_equals_uninterrupted_run(adaptation, quantization, tmp_path):
    path = save_model(tmp_path / "model", "bert")

    def module():
        return RobustClassifier(
            Backbone(path, adaptation, quantization, dropout=0.3, lora_dropout=0.3), warmup_ratio=0.5, **STEPS
        )

    seed_everything(1)
    whole = module()
    fit(tmp_path / "whole", whole, epochs=3)
    seed_everything(2)
    resumed = module()
    fit(tmp_path / "resumed", resumed, epochs=3, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    expected = trained_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained_weights(resumed).items())
    seed_everything(2)
    other = module()
    fit(tmp_path / "other", other, epochs=3)
    assert not all(torch.equal(value, expected[name]) for name, value in trained_weights(other).items())


@pytest.mark.parametrize(("validate", "at_epoch_end"), [(True, False), (True, True), (False, None)])
def test_resume_from_whatever_moment_the_epoch_was_saved(validate, at_epoch_end, tmp_path):
    path = save_model(tmp_path / "model", "bert")
    weights = []
    for name, start in (("whole", None), ("resumed", tmp_path / "whole" / "epoch=1.ckpt")):
        seed_everything(len(name))
        module = RobustClassifier(Backbone(path, dropout=0.3), **STEPS)
        settings = {"validate": validate, "save_on_train_epoch_end": at_epoch_end}
        fit(tmp_path / name, module, epochs=3, ckpt_path=start, **settings)
        weights.append(trained_weights(module))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resume_in_the_middle_of_an_epoch_restores_the_random_state(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = RobustClassifier(Backbone(path), **STEPS)
    fit(tmp_path, module, every_n_train_steps=2)
    file = next(tmp_path.glob("*.ckpt"))
    saved = torch.load(file, weights_only=True)["lightning_robust"]["random_states"][0]["torch"]
    seen = []

    class Spy(RobustClassifier):
        def training_step(self, batch, batch_idx):
            seen.append(torch.get_rng_state())
            return super().training_step(batch, batch_idx)

    resumed = Spy(Backbone(path), **STEPS)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(resumed, loader(resumed), ckpt_path=file)
    assert len(seen) == 1
    assert torch.equal(seen[0], saved)


def test_loading_for_evaluation_leaves_the_random_state_alone(tmp_path):
    module = RobustClassifier(Backbone("demo"), **STEPS)
    fit(tmp_path, module)
    file = tmp_path / "epoch=0.ckpt"
    seed_everything(4)
    before = torch.get_rng_state()
    again = RobustClassifier.load_from_checkpoint(file)
    again.predict_proba(TEXTS)
    assert torch.equal(before, torch.get_rng_state())
    trainer(tmp_path).test(module, loader(module, shuffle=False), ckpt_path=file, verbose=False)
    assert module._random_states == []


def test_metrics_equal_their_definitions(tmp_path):
    module = RobustClassifier(Backbone("demo"), num_labels=3)
    run = trainer(tmp_path)
    batches = loader(module, shuffle=False, num_labels=3)
    validated = run.validate(module, batches, verbose=False)[0]
    tested = run.test(module, batches, verbose=False)[0]
    labels = torch.cat([batch["labels"] for batch in batches])
    probabilities = module.predict_proba(TEXTS * 3)
    predicted = probabilities.argmax(1)
    precision, recall, f1 = [], [], []
    for k in range(3):
        true = int(((predicted == k) & (labels == k)).sum())
        p = true / max(int((predicted == k).sum()), 1)
        r = true / int((labels == k).sum())
        precision, recall, f1 = [*precision, p], [*recall, r], [*f1, 2 * p * r / (p + r) if p + r else 0.0]
    expected = {
        "loss": float(torch.nn.functional.nll_loss(probabilities.log(), labels)),
        "accuracy": float((predicted == labels).float().mean()),
        "f1": sum(f1) / 3,
        "precision": sum(precision) / 3,
        "recall": sum(recall) / 3,
    }
    for stage, logged in (("val", validated), ("test", tested)):
        assert logged == pytest.approx({f"{stage}/{k}": v for k, v in expected.items()}, abs=1e-5)


def test_forward_ignores_what_is_not_for_the_model():
    module = RobustClassifier(Backbone("demo")).eval()
    batch = next(iter(loader(module, shuffle=False)))
    with torch.no_grad():
        logits = module(batch)
    assert logits.shape == (4, 2)
    torch.testing.assert_close(logits.softmax(-1), module.predict_proba(TEXTS), atol=1e-6, rtol=0)


def test_bfloat16_logits_are_float32():
    module = RobustClassifier(Backbone("demo", dtype="bfloat16")).eval()
    assert module(next(iter(loader(module)))).dtype == torch.float32
    assert next(module.parameters()).dtype == torch.bfloat16


def test_optimizer_groups_and_schedule(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = RobustClassifier(
        Backbone(path), learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.25
    )
    rates = []

    class Log(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer(tmp_path, Log(), max_epochs=4, accumulate_grad_batches=2)
    run.fit(module, loader(module))
    groups = run.optimizers[0].param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            plain = name.endswith("bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
            head = "classifier" in name or "pooler" in name
            assert group["initial_lr"] == (1e-2 if head else 1e-3), name
    # 3 batches, 2 steps an epoch, 8 steps in all; the rate changes after each step.
    assert run.global_step == 8
    warmup = [1e-3 * (step / 2 if step < 2 else (8 - step) / 6) for step in range(8)]
    batches = [warmup[2 * (i // 3) + (1 if i % 3 == 2 else 0)] for i in range(12)]
    assert rates == pytest.approx(batches)


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_optimizer_holds_what_trains(adaptation, tmp_path):
    path = save_model(tmp_path / "model", "bert")
    module = RobustClassifier(Backbone(path, adaptation), head_learning_rate=0.5, learning_rate=0.25)
    run = trainer(tmp_path)
    run.fit(module, loader(module))
    rates = {id(p): g["initial_lr"] for g in run.optimizers[0].param_groups for p in g["params"]}
    expected = {
        id(p): 0.25 if "lora_" in name else 0.5 for name, p in module.named_parameters() if p.requires_grad
    }
    assert rates == expected


def test_schedules_against_their_formulas():
    for schedule, formula in (
        ("linear", lambda s: (10 - s) / 8),
        ("cosine", lambda s: 0.5 * (1 + math.cos(math.pi * (s - 2) / 8))),
        ("constant", lambda s: 1.0),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = learning_rate_schedule(optimizer, schedule, 10, 0.2)
        seen = []
        for _ in range(10):
            seen.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert seen == pytest.approx([s / 2 if s < 2 else formula(s) for s in range(10)])


def test_endless_training_needs_a_constant_rate(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ConfigError, match="training of known length"):
        learning_rate_schedule(optimizer, "linear", math.inf, 0.1)
    assert learning_rate_schedule(optimizer, "constant", math.inf, 0.0).get_last_lr() == [1.0]


def test_max_length_never_exceeds_the_positions(tmp_path):
    assert RobustClassifier(Backbone(save_model(tmp_path, "bert"))).max_length == 64
    assert RobustClassifier(Backbone(str(tmp_path), max_length=16)).max_length == 16
    module = RobustClassifier(Backbone(str(tmp_path)))
    assert module.predict_proba(["good " * 500]).shape == (1, 2)


# ---- exports


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adaptation", ["full", "head", "lora"])
def test_export_loads_without_us_and_with_us(kind, adaptation, tmp_path):
    path = save_model(tmp_path / "model", kind)
    names = ["negative", "positive"]
    module = RobustClassifier(Backbone(path, adaptation), label_names=names, **STEPS)
    fit(tmp_path, module)
    folder = module.save_pretrained(tmp_path / "export")
    tok = AutoTokenizer.from_pretrained(folder)
    inputs = tok(TEXTS, padding=True, return_tensors="pt")
    if adaptation == "lora":
        plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        plain.config.pad_token_id = tok.pad_token_id  # not part of an adapter
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        assert plain.config.id2label == dict(enumerate(names))
    expected = module.predict_proba(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits.softmax(-1), expected, atol=1e-6, rtol=0)
    again = RobustClassifier(Backbone(str(folder)))
    torch.testing.assert_close(again.predict_proba(TEXTS), expected, atol=1e-6, rtol=0)
    assert json.loads((folder / "lightning_robust.json").read_text())["label_names"] == names


def test_demo_adapter_is_independent_of_the_seed_it_is_loaded_with(tmp_path):
    module = RobustClassifier(Backbone("demo", "lora", seed=7), **STEPS)
    fit(tmp_path, module)
    folder = module.save_pretrained(tmp_path / "export")
    assert torch.equal(
        RobustClassifier(Backbone(str(folder))).predict_proba(TEXTS), module.predict_proba(TEXTS)
    )


def test_adapter_folder_trains_on(tmp_path):
    path = save_model(tmp_path / "model", "bert")
    RobustClassifier(Backbone(path, "lora")).save_pretrained(tmp_path / "export")
    module = RobustClassifier(Backbone(str(tmp_path / "export")), **STEPS)
    before = trained_weights(module)
    fit(tmp_path / "on", module)
    assert any("lora_B" in name for name in before)
    assert all(
        not torch.equal(value, before[name])
        for name, value in trained_weights(module).items()
        if "lora_B" in name
    )
    again = RobustClassifier.load_from_checkpoint(tmp_path / "on" / "epoch=0.ckpt")
    assert torch.equal(again.predict_proba(TEXTS), module.predict_proba(TEXTS))


def test_export_replaces_only_exports(tmp_path, monkeypatch):
    module = RobustClassifier(Backbone("demo"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files, which are left alone"):
        module.save_pretrained(foreign)
    assert [f.name for f in foreign.iterdir()] == ["thesis.tex"]

    folder = module.save_pretrained(tmp_path / "export")
    module.save_pretrained(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(module.tokenizer), "save_pretrained", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        module.save_pretrained(folder)
    with pytest.raises(ConfigError, match="No space left"):
        module.save_pretrained(tmp_path / "new")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["export", "foreign"]


def test_export_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write to"):
        RobustClassifier(Backbone("demo")).save_pretrained(tmp_path / "file" / "export")


# ---- checkpoints that do not fit


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_checkpoint_of_another_label_count(adaptation, tmp_path):
    path = save_model(tmp_path / "model", "bert")
    fit(tmp_path, RobustClassifier(Backbone(path, adaptation)))
    message = re.escape(
        f"a checkpoint of {path} ({adaptation}, num_labels=3), but this one is of {path} ({adaptation}"
    )
    (tmp_path / "three").mkdir()
    other = save_model(tmp_path / "three", "bert", num_labels=3)
    module = RobustClassifier(Backbone(other, adaptation), num_labels=3)
    with pytest.raises(BackboneError, match=message.replace(re.escape(path), ".*", 1)):
        fit(tmp_path / "on", module, ckpt_path=tmp_path / "epoch=0.ckpt")
    with pytest.raises(BackboneError, match="num_labels"):
        RobustClassifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", num_labels=3)


@pytest.mark.parametrize(
    ("adaptation", "kind"), [("full", "roberta"), ("lora", "roberta"), ("lora", "bert"), ("head", "bert")]
)
def test_checkpoint_of_another_backbone(adaptation, kind, tmp_path):
    path = save_model(tmp_path / "one", "bert", seed=0)
    fit(tmp_path, RobustClassifier(Backbone(path, adaptation)))
    module = RobustClassifier(Backbone(save_model(tmp_path / "two", kind, seed=1), adaptation))
    before = trained_weights(module)
    with pytest.raises(BackboneError, match=r"a checkpoint of .*two .*, but this one is of .*one "):
        fit(tmp_path / "on", module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in trained_weights(module).items())


def test_checkpoint_of_another_adaptation(tmp_path):
    path = save_model(tmp_path / "one", "bert")
    fit(tmp_path, RobustClassifier(Backbone(path, "lora")))
    with pytest.raises(BackboneError, match=r"\(head, num_labels=2\), but this one is of .* \(lora"):
        fit(tmp_path / "on", RobustClassifier(Backbone(path, "head")), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_checkpoint_with_a_missing_trained_value(tmp_path):
    path = save_model(tmp_path / "one", "bert")
    fit(tmp_path, RobustClassifier(Backbone(path, "lora")))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    key = next(k for k in checkpoint["state_dict"] if "lora_B" in k)
    del checkpoint["state_dict"][key]
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(BackboneError, match=f"lacks {key}"):
        RobustClassifier.load_from_checkpoint(tmp_path / "broken.ckpt")
    with pytest.raises(BackboneError, match="are missing"):
        RobustClassifier(Backbone(path, "lora")).load_state_dict(checkpoint["state_dict"])


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "`learning_rate` to be > 0, but got 0."),
        ({"head_learning_rate": -1.0}, "`head_learning_rate` to be > 0"),
        ({"weight_decay": -0.1}, "`weight_decay` to be >= 0"),
        ({"warmup_ratio": 1.0}, "`warmup_ratio` to be in [0, 1)"),
        ({"schedule": "cosin"}, "one of linear, cosine, constant, but got 'cosin'. Did you mean «cosine»?"),
        ({"backbone": {"pth": "demo"}}, "got `pth`. Did you mean «path»?"),
        ({"backbone": {"adaptation": "full"}}, "to have a `path`"),
        ({"backbone": "demo"}, "a Backbone or its fields, but got 'demo'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RobustClassifier(**{"backbone": {"path": "demo"}, **settings})


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(self.trainer.lightning_module)


@pytest.mark.parametrize("override", [[], ["--model.init_args.backbone.dropout=0.25"]])
def test_command_line_nests_the_backbone(override, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model:\n  class_path: lightning_robust.RobustClassifier\n  init_args:\n"
        "    backbone: {path: demo, adaptation: lora, lora_targets: [query]}\n    learning_rate: 1e-3\n"
        "trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false,"
        " enable_model_summary: false}\n"
    )
    cli = LightningCLI(
        LightningModule, Data, subclass_mode_model=True, args=["fit", "-c", str(config), *override]
    )
    assert cli.model.hparams["backbone"]["lora_targets"] == ["query"]
    assert cli.model.hparams["backbone"]["dropout"] == (0.25 if override else None)
    again = RobustClassifier.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path)
    assert torch.equal(again.predict_proba(TEXTS), cli.model.predict_proba(TEXTS))


# ---- real models


@pytest.mark.parametrize(
    ("name", "adaptation", "quantization"),
    [
        ("all-MiniLM-L6-v2", "full", "none"),
        ("all-MiniLM-L6-v2", "lora", "8bit"),
        ("llama-mini-wiki", "lora", "4bit"),
    ],
)
def test_real_models_learn_resume_and_export(name, adaptation, quantization, shared, tmp_path):
    backbone = Backbone(str(shared / "models" / name), adaptation, quantization, max_length=32)
    module = RobustClassifier(backbone, learning_rate=5e-4)
    run = fit(tmp_path, module, epochs=3)
    assert run.callback_metrics["train/loss"] < 0.75
    again = RobustClassifier.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert torch.equal(again.predict_proba(TEXTS), module.predict_proba(TEXTS))
    exported = Backbone(
        str(module.save_pretrained(tmp_path / "export")), quantization=quantization, max_length=32
    )
    torch.testing.assert_close(
        RobustClassifier(exported).predict_proba(TEXTS), module.predict_proba(TEXTS), atol=1e-5, rtol=0
    )
