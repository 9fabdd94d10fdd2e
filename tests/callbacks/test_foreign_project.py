"""A Hugging Face project that knows nothing of this package, with everything plugged in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.defenses import FreeLB, VREx
from lightning_robust.errors import ConfigError
from lightning_robust.results import read_records
from tests.attacks.tiny import sentences, tiny_model, tiny_tokenizer


class HuggingFaceProject(LightningModule):
    """As such modules are written everywhere: a model, a tokenizer, a step."""

    def __init__(self, kind: str = "bert", lora: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = tiny_tokenizer(kind)
        self.model = tiny_model(kind)
        if lora:
            targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
            self.model = get_peft_model(
                self.model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
            )

    def training_step(self, batch, batch_idx):
        domain = batch.pop("domain", None)
        output = self.model(**batch)
        if domain is not None:
            batch["domain"] = domain
        self.log("loss", output.loss)
        return output.loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.model(**{k: v for k, v in batch.items() if k != "domain"}).loss)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def batches(module: HuggingFaceProject) -> DataLoader:
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = "[PAD]"
        module.model.config.pad_token_id = module.tokenizer.pad_token_id
    rows = [(text, i % 2, i % 3) for i, text in enumerate(sentences(18, seed=4))]

    def collate(part):
        batch = dict(module.tokenizer([text for text, _, _ in part], padding=True, return_tensors="pt"))
        batch.pop("token_type_ids", None)
        return batch | {
            "labels": torch.tensor([label for _, label, _ in part]),
            "domain": torch.tensor([domain for _, _, domain in part]),
        }

    return DataLoader(rows, batch_size=6, collate_fn=collate)


def labelled(number: int, seed: int) -> list[tuple[str, int]]:
    return [(text, i % 2) for i, text in enumerate(sentences(number, seed=seed))]


def monitor(folder: Path, **settings) -> RobustnessMonitor:
    attacks = ["deepwordbug", {"name": "embedding_pgd", "epsilon": 5.0, "num_steps": 3}]
    return RobustnessMonitor(
        attacks=attacks,
        num_examples=6,
        clean=labelled(8, 1),
        ood={"shifted": labelled(6, 2)},
        records_dir=folder,
        progress=False,
        **settings,
    )


def trainer(folder: Path, *callbacks: Callback, **settings) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, **settings},
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_everything_plugs_in(kind, lora, tmp_path):
    module = HuggingFaceProject(kind, lora)
    data = batches(module)
    keep = ModelCheckpoint(tmp_path, monitor="joint/harmonic", mode="max", save_last=True)
    run = trainer(tmp_path, FreeLB(), VREx(), monitor(tmp_path), keep)
    run.fit(module, data, data)
    attacked = {row["attack"] for row in read_records(tmp_path).to_pylist() if row["kind"] == "attack"}
    assert attacked == {"deepwordbug", "embedding_pgd"}
    plain = HuggingFaceProject(kind, lora)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)


def test_checkpoint_loads_where_this_package_is_not_installed(tmp_path):
    module = HuggingFaceProject()
    data = batches(module)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, FreeLB(), VREx(), monitor(tmp_path), keep).fit(module, data, data)
    code = (
        "import sys; sys.modules['lightning_robust'] = None\n"
        "import torch\n"
        f"c = torch.load({str(tmp_path / 'last.ckpt')!r}, weights_only=True)\n"
        "print(len(c['state_dict']), [m for m in sys.modules if m.startswith('lightning_robust.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{len(module.state_dict())} []"


@pytest.mark.parametrize("inference_mode", [True, False])
def test_gradient_attacks_in_fit_validate_and_test(inference_mode, tmp_path):
    module = HuggingFaceProject()
    data = batches(module)
    run = trainer(tmp_path, monitor(tmp_path), inference_mode=inference_mode)
    run.fit(module, data, data)
    during = float(run.callback_metrics["adv/embedding_pgd/accuracy"])
    clean = float(run.callback_metrics["clean/accuracy"])
    assert during < clean
    for stage in (run.validate, run.test):
        stage(module, data, verbose=False)
        assert float(run.callback_metrics["adv/embedding_pgd/accuracy"]) == during


@pytest.mark.parametrize("defenses", [[], [FreeLB(), VREx()]])
def test_weights_do_not_depend_on_the_monitor(defenses, tmp_path):
    def train(*more):
        module = HuggingFaceProject()
        torch.manual_seed(0)
        data = batches(module)
        trainer(tmp_path, *defenses, *more, max_epochs=2).fit(module, data, data)
        return module.state_dict()

    without, watched = train(), train(monitor(tmp_path))
    assert all(torch.equal(without[name], watched[name]) for name in without)


def test_records_do_not_depend_on_the_batch_size(tmp_path):
    module = HuggingFaceProject()
    data = batches(module)
    tables = []
    for size in (16, 100_000):
        folder = tmp_path / str(size)
        run = trainer(folder, monitor(folder, max_batch_tokens=size), limit_train_batches=0)
        run.validate(module, data, verbose=False)
        tables.append(read_records(folder / "validate").filter(pc.field("attack") != "embedding_pgd"))
    unequal = ["run_id", "seconds", "probability"]
    assert tables[0].drop_columns(unequal).equals(tables[1].drop_columns(unequal))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_under_two_defenses(reentrant, tmp_path):
    module = HuggingFaceProject()
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    data = batches(module)
    run = trainer(tmp_path, VREx(), FreeLB())
    if reentrant:
        with pytest.raises(ConfigError, match="not reentrant"):
            run.fit(module, data)
    else:
        run.fit(module, data)
