"""Tiny models and data for the tests of this folder, built and saved on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from lightning_robust.modules.classifier import RobustClassifier

WORDS = [
    "a",
    "the",
    "good",
    "bad",
    "fine",
    "awful",
    "film",
    "book",
    "plot",
    "it",
    "is",
    "was",
    "very",
    "not",
    "never",
    "quite",
    "long",
    "short",
    "end",
    "story",
]
TEXTS = ["a good film", "the bad plot was very very long and awful it is not good", "fine", "not a bad book"]


def tokenizer(*, decoder: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names: dict[str, Any] = {"unk_token": "[UNK]", "eos_token": "[SEP]", "model_max_length": 64}
    if not decoder:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if pad:
        names["pad_token"] = "[PAD]"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


SIZE = len(WORDS) + 4
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS = {
    "bert": lambda **kw: BertConfig(vocab_size=SIZE, max_position_embeddings=64, **{**_BERT, **kw}),
    "roberta": lambda **kw: RobertaConfig(
        vocab_size=SIZE, max_position_embeddings=66, pad_token_id=0, **_BERT, **kw
    ),
    "distilbert": lambda **kw: DistilBertConfig(
        vocab_size=SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64, **kw
    ),
    "llama": lambda **kw: LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,  # no multiple of 32: see `finish_quantized`
        max_position_embeddings=64,
        **{"pad_token_id": None, "bos_token_id": 2, "eos_token_id": 3, **kw},
    ),
    "gpt2": lambda **kw: GPT2Config(
        vocab_size=SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3, **kw
    ),
}
DECODERS = ("llama", "gpt2")


def save_model(folder: Path, kind: str, *, seed: int = 0, pad: bool | None = None, **settings: Any) -> str:
    """Save a tiny classifier (encoders with a pad token, decoders without) and return its path."""
    config = CONFIGS[kind](**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():  # else norms and biases are alike in all models
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    decoder = kind in DECODERS
    tokenizer(decoder=decoder, pad=not decoder if pad is None else pad).save_pretrained(folder)
    return str(folder)


def loader(module: RobustClassifier, *, shuffle: bool = True, num_labels: int = 2) -> DataLoader[Any]:
    def collate(items: Sequence[tuple[int, str]]) -> dict[str, Any]:
        ids, texts = zip(*items, strict=True)
        batch = dict(module.tokenizer(list(texts), padding=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([i % num_labels for i in ids])
        return {**batch, "domain": torch.zeros(len(ids), dtype=torch.long), "ids": [str(i) for i in ids]}

    return DataLoader(list(enumerate(TEXTS * 3)), batch_size=4, shuffle=shuffle, collate_fn=collate)


def trainer(folder: Path, *callbacks: Callback, max_epochs: int = 1, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        enable_checkpointing=settings.pop(
            "enable_checkpointing", any("Checkpoint" in type(c).__name__ for c in callbacks)
        ),
        **quiet,
        **settings,
    )


def trained_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
