from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_robust import Backbone, RobustClassifier
from lightning_robust.attacks import AttackEngine
from lightning_robust.defenses.inference import Ensemble
from lightning_robust.errors import BackboneError, ConfigError
from lightning_robust.modules.victim import Victim
from tests.attacks.tiny import NgramVictim, items_for, sentences, tiny_model, tiny_tokenizer, tiny_victim

TEXTS = [*sentences(6, seed=5), ("a charming film", "the story")]


def lora(model: nn.Module, seed: int) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.5)
    return peft_model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of three adapters of `tiny_model`, their heads included."""
    folders = [tmp_path_factory.mktemp("adapters") / f"seed.{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        lora(tiny_model(), seed).save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def separate(adapters: list[str]) -> list[torch.Tensor]:
    """What each adapter answers on a backbone of its own."""
    models = [PeftModel.from_pretrained(tiny_model(), folder) for folder in adapters]
    return [Victim(model, tiny_tokenizer())(TEXTS) for model in models]


def snapshot(model: Any) -> Any:
    return (
        model.active_adapter,
        [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
    )


def test_mean_and_vote_of_victims() -> None:
    victims = [NgramVictim(0.3), NgramVictim(-0.2), tiny_victim()]
    answers = torch.stack([victim(TEXTS).float() for victim in victims])
    torch.testing.assert_close(Ensemble(victims)(TEXTS), answers.mean(dim=0))
    torch.testing.assert_close(Ensemble(victims[0], victims[1:])(TEXTS), answers.mean(dim=0))
    votes = torch.eye(2)[answers.argmax(dim=2)].mean(dim=0)
    torch.testing.assert_close(Ensemble(victims, combine="vote")(TEXTS), votes)
    torch.testing.assert_close(Ensemble(victims)([TEXTS[0]] * 3), answers.mean(dim=0)[:1].repeat(3, 1))


def test_members_with_other_classes() -> None:
    three = Victim(tiny_model(num_labels=3), tiny_tokenizer())
    with pytest.raises(ConfigError, match="same classes, but they have 2, 3"):
        Ensemble([tiny_victim(), three])(TEXTS)


def test_state_key_and_what_is_read() -> None:
    first, second = tiny_victim(), tiny_victim(max_length=6)
    ensemble = Ensemble([first, second])
    key = ensemble.state_key()
    assert key is not None
    assert (
        key == Ensemble([first, second]).state_key() != Ensemble([first, second], combine="vote").state_key()
    )
    with torch.no_grad():
        second.model.classifier.bias += 1
    assert ensemble.state_key() != key
    assert Ensemble([first, NgramVictim()]).state_key() is None
    assert Ensemble([first, NgramVictim()]).readable_characters(TEXTS) == [None] * len(TEXTS)
    third = tiny_victim(max_length=9)
    reads = zip(second.readable_characters(TEXTS), third.readable_characters(TEXTS), strict=True)
    both = Ensemble([second, third]).readable_characters(TEXTS)
    assert both == [None if None in (a, b) else tuple(map(max, a, b)) for a, b in reads]
    assert any(one is not None for one in both)


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_answer_as_models_of_their_own(
    adapters: list[str], separate: list[torch.Tensor], wrapped: bool
) -> None:
    model: Any = lora(tiny_model(), 7).train() if wrapped else tiny_model()
    before = snapshot(model) if wrapped else None
    own = Victim(model, tiny_tokenizer())(TEXTS) if wrapped else None
    state = torch.get_rng_state()
    names = ["default", *adapters[:2]] if wrapped else adapters
    ensemble = Ensemble.from_adapters(model, tiny_tokenizer(), names)
    expected = [own, *separate[:2]] if wrapped else separate
    torch.testing.assert_close(ensemble(TEXTS), torch.stack(expected).mean(dim=0), rtol=0, atol=1e-6)  # type: ignore[arg-type]
    vote = Ensemble.from_adapters(ensemble.victim.model, tiny_tokenizer(), ["member0", "member1"], "vote")  # type: ignore[attr-defined]
    chosen = torch.stack(expected[-2:] if wrapped else expected[:2]).argmax(dim=2)  # type: ignore[arg-type]
    torch.testing.assert_close(vote(TEXTS), torch.eye(2)[chosen].mean(dim=0))
    assert torch.equal(torch.get_rng_state(), state)
    if before is not None:
        after = snapshot(model)
        assert after[0] == before[0] == "default"
        assert [one for one in after[1] if "member" not in one[0]] == before[1]
        assert not any(trainable for name, trainable, _ in after[1] if "member" in name)
        assert torch.equal(Victim(model, tiny_tokenizer())(TEXTS), own)


def test_memory_holds_one_backbone(adapters: list[str]) -> None:
    model = tiny_model()
    backbone = sum(p.numel() for p in model.parameters())
    ensemble = Ensemble.from_adapters(model, tiny_tokenizer(), adapters)
    held = {id(p): p.numel() for victim in ensemble._victims() for p in victim.model.parameters()}  # type: ignore[attr-defined]
    one = PeftModel.from_pretrained(tiny_model(), adapters[0])
    adapter = sum(p.numel() for n, p in one.named_parameters() if "lora_" in n or "modules_to_save" in n)
    assert sum(held.values()) == backbone + 3 * adapter
    assert adapter < backbone / 4


def test_a_folder_is_loaded_again_only_after_a_change(adapters: list[str], tmp_path: Path) -> None:
    model: Any = lora(tiny_model(), 7)
    changing = tmp_path / "adapter"
    lora(tiny_model(), 4).save_pretrained(changing)
    folders = [adapters[0], str(changing)]
    first = Ensemble.from_adapters(model, tiny_tokenizer(), folders)(TEXTS)
    assert torch.equal(Ensemble.from_adapters(model, tiny_tokenizer(), folders)(TEXTS), first)
    assert list(model.peft_config) == ["default", "member0", "member1"]
    lora(tiny_model(), 5).save_pretrained(changing)
    assert not torch.equal(Ensemble.from_adapters(model, tiny_tokenizer(), folders)(TEXTS), first)
    model.delete_adapter("member0")
    Ensemble.from_adapters(model, tiny_tokenizer(), folders)
    assert sorted(model.peft_config) == ["default", "member0", "member1", "member2"]


def test_what_is_active_is_so_again_after_an_error(
    adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = lora(tiny_model(), 7)
    ensemble = Ensemble.from_adapters(model, tiny_tokenizer(), ["default", *adapters[:1]])
    before = snapshot(model)

    def broken(*_: Any) -> Any:
        if model.active_adapter == "default":
            return torch.eye(2)[[0] * len(TEXTS)]
        raise ZeroDivisionError(model.active_adapter)

    monkeypatch.setattr(ensemble.others[0].victim, "predict_packed", broken)  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError, match="member0"):
        ensemble(TEXTS)
    assert snapshot(model) == before


def test_adapters_can_be_attacked_and_have_a_state_key(adapters: list[str]) -> None:
    ensemble = Ensemble.from_adapters(tiny_model(), tiny_tokenizer(), adapters)
    key = ensemble.state_key()
    assert key is not None
    assert ensemble.state_key() == key
    items = items_for(ensemble, sentences(3, seed=5))
    runs = [
        AttackEngine(ensemble, progress=False, max_batch_tokens=size).run("deepwordbug", items)
        for size in (16384, 60)
    ]
    assert [r.perturbed_text for r in runs[0]] == [r.perturbed_text for r in runs[1]]
    with torch.no_grad():
        next(p for n, p in ensemble.victim.model.named_parameters() if "member1" in n).add_(0.1)  # type: ignore[attr-defined]
    assert ensemble.state_key() != key


def test_adapters_that_are_not_there(adapters: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"default.*but got 'defualt'. Did you mean «default»"):
        Ensemble.from_adapters(lora(tiny_model(), 0), tiny_tokenizer(), ["defualt", *adapters])
    with pytest.raises(ConfigError, match="two or more adapters"):
        Ensemble.from_adapters(tiny_model(), tiny_tokenizer(), adapters[:1])


def test_checkpoints_and_exports_by_path(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    modules = [RobustClassifier(Backbone("demo", seed=seed)) for seed in range(2)]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(modules[0])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    modules[1].save_pretrained(tmp_path / "two")
    texts = ["a splendid film", "what a dull, lifeless book"]
    expected = torch.stack([module.predict_proba(texts) for module in modules])
    paths = [str(tmp_path / "one.ckpt"), str(tmp_path / "two")]
    torch.testing.assert_close(Ensemble(paths)(texts), expected.mean(dim=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        Ensemble(modules[0].victim(), paths[1:])(texts), expected.mean(dim=0), rtol=0, atol=1e-6
    )
    with pytest.raises(BackboneError, match=r"There is no checkpoint nowhere\.ckpt"):
        Ensemble(modules[0].victim(), ["nowhere.ckpt"])
