from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn

from lightning_robust.defenses.freelb import FreeLB
from lightning_robust.defenses.jtt import JTT
from lightning_robust.defenses.lp_ft import LPFT
from lightning_robust.errors import ConfigError
from tests.attacks.tiny import tiny_model
from tests.callbacks.test_foreign_project import HuggingFaceProject, batches
from tests.defenses.training import assert_same_weights, fit
from tests.foreign import PlainEncoder, loader

HEAD = ("head.weight", "head.bias")


def lp_ft(**settings):
    return LPFT(**{"head": "head", **settings})


class Decayed(PlainEncoder):
    """AdamW moves weights by their decay alone, and by momentum."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.5)


class After(Callback):
    """Weights, and what the optimizer has a state for, after each epoch."""

    def __init__(self):
        self.weights, self.with_state = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        state = trainer.optimizers[0].state
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.with_state.append({n for n, p in pl_module.named_parameters() if p in state})


def by_hand(module, *, head_epochs, epochs, accumulate=1, clip=None):
    """First an optimizer step of the head alone, then of everything, each part with its own AdamW."""
    body = [p for n, p in module.named_parameters() if n not in HEAD]
    head = [p for n, p in module.named_parameters() if n in HEAD]
    settings = {"lr": 0.05, "weight_decay": 0.5}
    optimizers = torch.optim.AdamW(head, **settings), torch.optim.AdamW(body, **settings)
    for epoch in range(epochs):
        moved = head if epoch < head_epochs else [*body, *head]
        for index, batch in enumerate(loader()):
            logits = module(batch["input_ids"], batch["attention_mask"])
            (nn.functional.cross_entropy(logits, batch["labels"]) / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            if clip is not None:
                norm = torch.stack([p.grad.norm() for p in moved]).norm()
                for parameter in moved:
                    parameter.grad *= min(1.0, clip / float(norm + 1e-6))
            for optimizer in optimizers[: 1 if epoch < head_epochs else 2]:
                optimizer.step()
            module.zero_grad()


@pytest.mark.parametrize(
    ("head_epochs", "accumulate", "clip"), [(1, 1, None), (2, 1, None), (1, 2, None), (1, 1, 0.01)]
)
def test_equals_the_training_written_out(head_epochs, accumulate, clip):
    ours = Decayed().double()
    theirs = copy.deepcopy(ours)
    fit(
        ours,
        [lp_ft(head_epochs=head_epochs)],
        max_epochs=3,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    by_hand(theirs, head_epochs=head_epochs, epochs=3, accumulate=accumulate, clip=clip)
    assert_same_weights(ours, theirs)


def test_nothing_moves_the_body_in_the_first_stage():
    module, after = Decayed(), After()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, [lp_ft(), after])
    for name in before:
        assert torch.equal(after.weights[0][name], before[name]) == (name not in HEAD), name
        assert not torch.equal(after.weights[1][name], after.weights[0][name]), name
    assert after.with_state == [set(HEAD), set(before)]
    assert all(p.requires_grad for p in module.parameters())


def test_no_head_epochs_are_plain_training_exactly():
    plain, defended = Decayed(dropout=0.3), Decayed(dropout=0.3)
    for module, defenses in ((plain, []), (defended, [lp_ft(head_epochs=0)])):
        torch.manual_seed(2)
        fit(module, defenses)
    assert_same_weights(defended, plain, rtol=0, atol=0)


# Which parameters are the head ----------------------------------------------------------------------


class TransformerAndHead(LightningModule):
    """A transformer without a head of its own, and one behind it that has several layers."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny_model("bert").bert
        self.classifier = nn.Sequential(
            nn.Linear(self.encoder.config.hidden_size, 4), nn.Tanh(), nn.Linear(4, 2)
        )

    def training_step(self, batch, batch_idx):
        states = self.encoder(batch["input_ids"], batch["attention_mask"]).pooler_output
        return nn.functional.cross_entropy(self.classifier(states), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def moved_first(module, data):
    """Names of the parameters that the first stage moved; the second must move others."""
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    after = After()
    fit(module, [LPFT(), after], data)
    first = {n for n in before if not torch.equal(after.weights[0][n], before[n])}
    second = {n for n in before if not torch.equal(after.weights[1][n], after.weights[0][n])}
    assert first < second
    return first


def test_heads_of_hugging_face_classifiers_are_found():
    torch.manual_seed(0)
    module = HuggingFaceProject("bert")
    parts = {name.rpartition(".")[0] for name in moved_first(module, batches(module))}
    assert parts == {"model.bert.pooler.dense", "model.classifier"}
    module = HuggingFaceProject("llama")
    assert moved_first(module, batches(module)) == {"model.score.weight"}


def test_with_lora_the_trained_copy_of_the_head_comes_first():
    torch.manual_seed(0)
    module = HuggingFaceProject("bert", lora=True)
    moved = moved_first(module, batches(module))
    assert moved == {
        f"model.base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")
    }


def test_layers_behind_a_bare_transformer_are_its_head():
    torch.manual_seed(0)
    module = TransformerAndHead()
    parts = {name.rpartition(".")[0] for name in moved_first(module, batches(HuggingFaceProject()))}
    assert parts == {"classifier.0", "classifier.2", "encoder.pooler.dense"}


# Together, resumed, refused -------------------------------------------------------------------------


def test_composes():
    both, alone, after = PlainEncoder(), PlainEncoder(), After()
    embedded = both.embed.weight.detach().clone()
    fit(both, [lp_ft(), FreeLB(), after])
    fit(alone, [FreeLB()])
    assert torch.equal(after.weights[0]["embed.weight"], embedded)
    assert not torch.equal(both.embed.weight, embedded)
    assert not torch.allclose(both.head.weight, alone.head.weight, atol=1e-4)


def test_with_jtt_the_head_comes_first_again_after_the_restart():
    module, after = Decayed(), After()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, [lp_ft(), JTT(2, head="head"), after], max_epochs=4)
    moved = [{n for n in start if not torch.equal(weights[n], start[n])} for weights in after.weights]
    assert moved == [set(HEAD), set(start), set(HEAD), set(start)]
    with pytest.raises(
        ConfigError, match=r"head_epochs=1 \+ identification_epochs=2 of JTT, after.* but got 3"
    ):
        fit(Decayed(), [lp_ft(), JTT(2, head="head")], max_epochs=3)


class UnfreezesLate(BaseFinetuning):
    """Unfreezes the embeddings in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.embed)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.embed, optimizer)


class OnlyTrainable(PlainEncoder):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_what_is_unfrozen_within_the_first_stage_waits_for_its_end():
    module, after = OnlyTrainable(), After()
    embedded = module.embed.weight.detach().clone()
    fit(module, [lp_ft(head_epochs=2), UnfreezesLate(), after], max_epochs=3)
    assert [torch.equal(weights["embed.weight"], embedded) for weights in after.weights] == [
        True,
        True,
        False,
    ]


def test_resumes_exactly_in_either_stage(tmp_path):
    def train(*callbacks, ckpt_path=None):
        module = Decayed().double()
        if ckpt_path is not None:
            nn.init.zeros_(module.head.weight)
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[lp_ft(head_epochs=2), *callbacks],
            default_root_dir=tmp_path,
            precision="64-true",
            max_epochs=4,
            logger=False,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    whole = train(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    for epoch in (0, 1, 2):
        assert_same_weights(train(ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)


@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), True])
def test_bad_settings(value):
    with pytest.raises(ConfigError, match="Expected `head_epochs` to be a whole number >= 0"):
        LPFT(head_epochs=value)


def test_without_a_head_it_fails_when_fit_starts():
    with pytest.raises(ConfigError, match=r"Expected to find the layer of PlainEncoder .* head="):
        fit(PlainEncoder(), [LPFT()])
    with pytest.raises(ConfigError, match="Did you mean «head»"):
        fit(PlainEncoder(), [LPFT(head="haed")])


def test_a_frozen_head_is_refused():
    module = PlainEncoder()
    module.head.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"head of PlainEncoder to train, but only others do: embed.weight"):
        fit(module, [lp_ft()])


def test_a_head_that_trains_alone_is_refused():
    module = PlainEncoder()
    module.requires_grad_(False)
    module.head.requires_grad_(True)
    with pytest.raises(ConfigError, match="to train more than its classification head"):
        fit(module, [lp_ft()])


def test_training_that_ends_with_the_first_stage_is_refused():
    with pytest.raises(ConfigError, match=r"max_epochs. to be more than head_epochs=2.*but got 2"):
        fit(PlainEncoder(), [lp_ft(head_epochs=2)])
    fit(PlainEncoder(), [lp_ft()], fast_dev_run=True)
