"""Tiny victims and items for the tests of attacks and victims."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.data import Item, Text

_WORDS = (
    "film plot actor scene story music camera ending humor drama charming bleak brilliant tedious moving "
    "clumsy tender hollow vivid shallow the a of and is was with very"
)
WORDS = _WORDS.split()


def sentences(count: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(shortest, longest))) for _ in range(count)]


def items_for(victim: Any, texts: Sequence[Text], wrong_every: int = 7) -> list[Item]:
    """Items labelled as the victim predicts, except every n-th."""
    predicted = victim(list(texts)).argmax(dim=1).tolist()
    return [
        Item(f"item-{i}", text, 1 - label if wrong_every and i % wrong_every == wrong_every - 1 else label)
        for i, (text, label) in enumerate(zip(texts, predicted, strict=True))
    ]


class NgramVictim:
    """A linear model over character n-grams whose weights come from a hash, so that no two are alike.

    A slight dependence on position keeps equal words from tying.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.batches: list[int] = []

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        self.batches.append(len(texts))
        logits = torch.tensor([self.logit(text) for text in texts], dtype=torch.float64)
        positive = torch.sigmoid(logits)
        return torch.stack([1 - positive, positive], dim=1)

    def logit(self, text: Text) -> float:
        joined = text if isinstance(text, str) else " [SEP] ".join(text)
        grams = [joined[i : i + 3] for i in range(max(0, len(joined) - 2))]
        weights = [(zlib.crc32(g.encode()) / 2**32 - 0.5) * (1 + 0.003 * i) for i, g in enumerate(grams)]
        return self.scale * sum(weights)


def tiny_tokenizer(kind: str = "bert") -> Any:
    """A WordPiece tokenizer of single characters; ``llama`` starts with ``<s>`` and has no pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pieces += [word for word in WORDS if len(word) > 1]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A [SEP] $B", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[CLS]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_model(kind: str = "bert", num_labels: int = 2, seed: int = 0) -> Any:
    """A classifier of two small layers, its weights large enough for inputs to matter."""
    import transformers

    size = len(tiny_tokenizer())
    common = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            config = transformers.LlamaConfig(
                **common,
                intermediate_size=32,
                num_key_value_heads=2,
                max_position_embeddings=64,
                num_labels=num_labels,
                pad_token_id=0,
                initializer_range=0.3,
            )
            return transformers.LlamaForSequenceClassification(config).train()
        config = transformers.BertConfig(
            **common,
            intermediate_size=32,
            max_position_embeddings=64,
            num_labels=num_labels,
            initializer_range=0.3,
        )
        return transformers.BertForSequenceClassification(config).train()


def tiny_victim(kind: str = "bert", scale: float = 5.0, **settings: Any) -> Any:
    """A victim whose random classifier is turned so that both classes occur and small edits tell."""
    from lightning_robust.modules.victim import Victim

    victim = Victim(tiny_model(kind), tiny_tokenizer(kind), **settings)
    head = victim.model.score if kind == "llama" else victim.model.classifier
    features: list[Tensor] = []
    handle = head.register_forward_hook(lambda _module, args, _output: features.append(_last(args[0])))
    for text in sentences(24):
        victim([text])
    handle.remove()
    mean = torch.stack(features).mean(dim=0)
    with torch.no_grad():
        head.weight -= torch.outer(head.weight @ mean, mean) / (mean @ mean)
        head.weight *= scale
        if getattr(head, "bias", None) is not None:
            head.bias.zero_()
    return victim


def _last(features: Tensor) -> Tensor:
    return features.reshape(-1, features.shape[-1])[-1]
