"""Victims: callables from texts to probabilities, and how to find one inside a foreign module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_robust.data.items import Text
from lightning_robust.errors import ConfigError, did_you_mean
from lightning_robust.modules.encoding import Encoded, collate, encode, pack
from lightning_robust.modules.gradients import EmbeddingAnswer, EmbeddingQuery, batch_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EmbeddingAnswer", "EmbeddingQuery", "ModuleVictim", "Victim", "evaluating", "find_victim"]

_REPACKS = "support_avx512bf16_for_cpu"


class Victim:
    """A Hugging Face classifier as a callable ``texts -> probabilities (n, classes)``.

    Texts are sorted by length and packed into batches of their own, padded to the longest on the right:
    a decoder's positions, and so its probabilities, then do not depend on the rest of the batch. The
    tokenizer's own padding and truncation settings are neither used nor changed. Eval mode holds during
    a call only, and every submodule gets its own mode back.

    Args:
        model: Any model whose output has ``logits``, PEFT-wrapped and quantized ones included.
        tokenizer: Its tokenizer.
        max_length: Tokens to keep of a text; by default what tokenizer and model allow.
        max_batch_tokens: Padded tokens in one forward pass.
        autocast_dtype: Runs the model under autocast, for instance ``torch.bfloat16``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        max_batch_tokens: int = 16384,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ConfigError(f"Expected `max_length` to be >= 1, but got {max_length}.")
        if max_batch_tokens < 1:
            raise ConfigError(f"Expected `max_batch_tokens` to be >= 1, but got {max_batch_tokens}.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or _length_limit(model, tokenizer)
        self.max_batch_tokens = max_batch_tokens
        self.autocast_dtype = autocast_dtype

    @classmethod
    def from_module(
        cls,
        pl_module: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        model: str | None = None,
        **settings: Any,
    ) -> Victim:
        """Make a victim of the Hugging Face model that a module holds.

        Args:
            pl_module: Any module, typically a LightningModule of another project.
            tokenizer: By default the one found on the module or on its trainer's datamodule.
            model: Dotted name of the Hugging Face model where the module holds several.
            **settings: As for `Victim`.

        Raises:
            ConfigError: If there is no model, more than one, or no tokenizer.
        """
        found = _find_model(pl_module, model)
        return cls(found, tokenizer or _find_tokenizer(pl_module), **settings)

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Return probabilities ``(len(texts), classes)``, float32 on the CPU, rows summing to 1."""
        encoded = encode(self.tokenizer, texts, self.max_length)
        rows: list[Tensor | None] = [None] * len(texts)
        # Leaving inference_mode keeps what a model caches (rotary tables) usable in training.
        with evaluating(self.model), torch.inference_mode(False), torch.no_grad():
            for batch in self._batches(encoded):
                inputs, _ = self._collate([encoded[i] for i in batch])
                probabilities = self._logits(inputs).float().cpu().softmax(dim=-1)
                for position, row in zip(batch, probabilities, strict=True):
                    rows[position] = row
        found = [row for row in rows if row is not None]
        return torch.stack(found) if found else torch.empty(0, _num_labels(self.model))

    predict_proba = __call__

    def embedding_gradients(self, queries: Sequence[EmbeddingQuery]) -> list[EmbeddingAnswer]:
        """Return probabilities, losses and gradients under perturbations of the input embeddings.

        Works wherever the caller stands (``no_grad``, ``inference_mode``) and leaves parameters, their
        ``grad`` and their ``requires_grad`` as they are.
        """
        encoded = encode(self.tokenizer, [query.text for query in queries], self.max_length)
        answers: dict[int, EmbeddingAnswer] = {}
        with evaluating(self.model), torch.inference_mode(False):
            for batch in self._batches(encoded):
                inputs, special = self._collate([encoded[i] for i in batch])
                asked = [queries[i] for i in batch]
                found = batch_gradients(self.model, inputs, special, asked, self._logits)
                answers.update(zip(batch, found, strict=True))
        return [answers[i] for i in range(len(queries))]

    def _batches(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        # Without a pad token a Hugging Face decoder pools the last position and refuses larger batches.
        limit = None if _pad_token_id(self.model, self.tokenizer) is not None else 1
        return pack([len(e.input_ids) for e in encoded], self.max_batch_tokens, limit)

    def _collate(self, encoded: Sequence[Encoded]) -> tuple[dict[str, Tensor], Tensor]:
        pad = _pad_token_id(self.model, self.tokenizer) or 0
        inputs, special = collate(encoded, pad)
        if not _takes_segments(self.model):
            inputs.pop("token_type_ids", None)
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}, special.to(device)

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        with self._autocast(inputs["input_ids"].device):
            output = self.model(**inputs)
        logits = getattr(output, "logits", None)
        rows = inputs["input_ids"].shape[0]
        if (
            isinstance(logits, Tensor)
            and logits.ndim == 2
            and logits.shape[0] == rows
            and logits.shape[1] > 1
        ):
            return logits
        got = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no `logits`"
        raise ConfigError(
            f"Expected logits of shape ({rows}, classes) from {type(self.model).__name__}, but got {got}. "
            "Use a model for sequence classification with two or more classes, or give the module a "
            "`predict_proba(texts)` method."
        )

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


class ModuleVictim:
    """A module's own ``predict_proba`` as a victim; its gradients come from the model it holds."""

    def __init__(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self._white_box: Victim | None = None

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        predict: Any = self.module.predict_proba
        with evaluating(self.module), torch.no_grad():
            answer: Tensor = predict(texts)
        return answer

    predict_proba = __call__

    def embedding_gradients(self, queries: Sequence[EmbeddingQuery]) -> list[EmbeddingAnswer]:
        if self._white_box is None:
            # RobustClassifier's own limit, so that both ways see the same tokens.
            limit = getattr(self.module, "max_length", None)
            limit = limit if isinstance(limit, int) else None
            self._white_box = Victim.from_module(self.module, self.tokenizer, max_length=limit)
        return self._white_box.embedding_gradients(queries)


def find_victim(module: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Victim | ModuleVictim:
    """Return the victim that a module is, or holds.

    A module with its own ``predict_proba(texts)`` is used directly; from any other the Hugging Face
    model is taken, see `Victim.from_module`.

    Raises:
        ConfigError: If the module is no victim and holds none.
    """
    if callable(getattr(module, "predict_proba", None)):
        return ModuleVictim(module, tokenizer)
    return Victim.from_module(module, tokenizer)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold every submodule in eval mode, and give each its own mode back."""
    submodules = list(module.modules())
    modes = [submodule.training for submodule in submodules]
    # On CPUs with AVX-512 bitsandbytes would repack 4-bit weights in eval mode, for good and not exactly.
    repacking = [submodule for submodule in submodules if getattr(submodule, _REPACKS, False)]
    # The flags are set directly: some adapters merge weights in `train(False)`.
    for submodule in submodules:
        submodule.training = False
    for submodule in repacking:
        setattr(submodule, _REPACKS, False)
    try:
        yield
    finally:
        for submodule, mode in zip(submodules, modes, strict=True):
            submodule.training = mode
        for submodule in repacking:
            setattr(submodule, _REPACKS, True)


def _find_model(pl_module: nn.Module, name: str | None) -> nn.Module:
    modules = dict(pl_module.named_modules())
    if name is not None:
        if name in modules:
            named: nn.Module = modules[name]
            return named
        raise ConfigError(
            f"Expected `model` to name a submodule of {type(pl_module).__name__}, but got {name!r}."
            f"{did_you_mean(name, modules)}"
        )
    found = _outermost_models(modules)
    classifiers = {n: m for n, m in found.items() if "SequenceClassification" in _class_name(m)}
    chosen = classifiers or found
    if len(chosen) == 1:
        only: nn.Module = next(iter(chosen.values()))
        return only
    names = ", ".join(f"{n or '(itself)'} ({type(m).__name__})" for n, m in chosen.items()) or "none"
    raise ConfigError(
        f"Expected one Hugging Face model in {type(pl_module).__name__}, but found {len(chosen)}: {names}. "
        'Name it: Victim.from_module(module, model="path.to.model"); or give the module a '
        "`predict_proba(texts)` method that returns probabilities (n, classes)."
    )


def _outermost_models(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    from peft import PeftModel
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in modules.items():
        if isinstance(module, (PreTrainedModel, PeftModel)) and id(module) not in inside:
            found[name] = module
            inside.update(id(submodule) for submodule in module.modules())
    return found


def _class_name(model: nn.Module) -> str:
    return type(_unwrapped(model)).__name__


def _unwrapped(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else model
    return inner


def _takes_segments(model: nn.Module) -> bool:
    """Whether the model has a use for ``token_type_ids``, which its tokenizer may make regardless."""
    taken = "token_type_ids" in inspect.signature(_unwrapped(model).forward).parameters
    return taken and getattr(_config(model), "type_vocab_size", 2) > 1


def _find_tokenizer(pl_module: nn.Module) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerBase

    trainer = getattr(pl_module, "_trainer", None)
    for holder in (pl_module, getattr(trainer, "datamodule", None)):
        for value in vars(holder).values() if holder is not None else ():
            if isinstance(value, PreTrainedTokenizerBase):
                return value
    raise ConfigError(
        f"Expected a tokenizer on {type(pl_module).__name__} or on its trainer's datamodule, but found none. "
        "Pass it: tokenizer=AutoTokenizer.from_pretrained(...)."
    )


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _num_labels(model: nn.Module) -> int:
    return int(getattr(_config(model), "num_labels", 2))


def _pad_token_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the model itself takes for padding, since decoders pool by it."""
    config = _config(model)
    if config is not None and hasattr(config, "pad_token_id"):
        pad = config.pad_token_id
    else:
        pad = tokenizer.pad_token_id
    return None if pad is None else int(pad)


def _length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that both allow; tokenizers without a limit say 1e30."""
    positions = getattr(_config(model), "max_position_embeddings", None) or 512
    return int(min(tokenizer.model_max_length, positions))
