"""Perturbations of the input embeddings during a training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_robust.defenses.base import DefenseChain
from lightning_robust.errors import ConfigError

Key = tuple[tuple[int, ...] | None, int]
Start = Callable[[Tensor, Tensor], Tensor]


class EmbeddingPerturbation:
    """δ, added to the input embeddings while the context is open.

    A δ ``(rows, seq, hidden)`` comes into being at the first call of the embedding layer, one for
    each set of rows that the step is called on and each time it embeds them. Positions of padding and
    special tokens stay zero.

    Args:
        chain: The running composition of defenses.
        layer: The module whose output ``(rows, seq, hidden)`` is perturbed.
        start: Maps an embedding output and the mask ``(rows, seq, 1)`` of positions that may change
            to the first δ.
        special_ids: Token ids that are never perturbed.
    """

    def __init__(
        self, chain: DefenseChain, layer: nn.Module, start: Start, special_ids: frozenset[int]
    ) -> None:
        self._chain = chain
        self._layer = layer
        self._start = start
        self._special = special_ids
        self._depth = len(chain.row_stack)
        self._calls: Counter[tuple[int, ...] | None] = Counter()
        self.deltas: dict[Key, Tensor] = {}
        self.masks: dict[Key, Tensor] = {}

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Perturb every call of the embedding layer inside this context.

        Raises:
            ConfigError: If the step never called the embedding layer.
        """
        self._calls.clear()
        handle = self._layer.register_forward_hook(self._add, with_kwargs=True)
        try:
            with self._chain.perturbing():
                yield
        finally:
            handle.remove()
        if not self._calls:
            raise ConfigError(
                f"Expected the training step to call the embedding layer {self._layer}, but it did not. "
                'Name the layer that embeds the input: embeddings="path.to.submodule".'
            )

    def move(self, step: Callable[[Tensor, Tensor], Tensor], gradients: Mapping[Key, Tensor]) -> None:
        """Replace each δ by ``step(δ, gradient)``, masked, as a new leaf."""
        for key, delta in self.deltas.items():
            moved = step(delta.detach(), gradients[key].detach()) * self.masks[key]
            self.deltas[key] = moved.detach().requires_grad_()

    def gradients(self, loss: Tensor | None = None) -> dict[Key, Tensor]:
        """Return each δ's gradient: of ``loss``, keeping its graph, or left by a backward pass.

        Raises:
            ConfigError: If the loss does not depend on the embeddings.
        """
        if loss is None:
            found: Any = [delta.grad for delta in self.deltas.values()]
        else:
            found = _gradients(loss, list(self.deltas.values()), retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in found):
            raise ConfigError(
                "Expected the training loss to depend on the input embeddings, but no gradient reaches them. "
                "Is the embedding layer called under torch.no_grad, or is its output detached?"
            )
        return dict(zip(self.deltas, found, strict=True))

    def _add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        rows = self._chain.rows_since(self._depth)
        key = (rows, self._calls[rows])
        self._calls[rows] += 1
        if key not in self.deltas:
            mask = self._mask(args, kwargs, output)
            self.masks[key] = mask
            self.deltas[key] = (self._start(output.detach(), mask) * mask).detach().requires_grad_()
        perturbed: Tensor = output + self.deltas[key].to(output.dtype)
        return perturbed

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids = next(
            (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point()),
            None,
        )
        keep = torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
        if ids is not None and ids.shape == keep.shape:
            for special in self._special:
                keep &= ids != special
        batch = self._chain.batch
        if isinstance(batch, Mapping):
            for name, kept in (("attention_mask", 1), ("special_tokens_mask", 0)):
                given = batch.get(name)
                if isinstance(given, Tensor) and given.shape == keep.shape:
                    keep &= given == kept
        mask: Tensor = keep.unsqueeze(-1).to(torch.promote_types(output.dtype, torch.float32))
        return mask


def _gradients(loss: Tensor, inputs: list[Tensor], **options: Any) -> Any:
    try:
        return torch.autograd.grad(loss, inputs, **options)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ConfigError(
            "A defense on embeddings inside another one needs gradient checkpointing that is not reentrant: "
            'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
        ) from error


def norm_per_example(values: Tensor) -> Tensor:
    """L2 norm over all but the first dimension, ``(rows, 1, 1)``, never 0 so that it can divide."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)
    positive: Tensor = norm.clamp_min(torch.finfo(values.dtype).tiny)
    return positive


def project_l2(delta: Tensor, radius: float) -> Tensor:
    """Project each example's δ ``(rows, seq, hidden)`` onto the L2 ball of ``radius``."""
    return delta * (radius / norm_per_example(delta)).clamp(max=1.0)


def special_token_ids(trainer: Trainer, module: LightningModule, layer: nn.Module) -> frozenset[int]:
    """Return the ids that no perturbation may touch, as far as the module or its data module tells.

    From the tokenizer where there is one (the unknown token stands for a word and is left out),
    otherwise from the model's configuration and the layer's ``padding_idx``.
    """
    padding = getattr(layer, "padding_idx", None)
    ids = set() if padding is None else {int(padding)}
    for owner in (module, getattr(trainer, "datamodule", None)):
        tokenizer: Any = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "all_special_ids"):
            return frozenset(ids | (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}))
    configs = [c for m in module.modules() if hasattr(c := getattr(m, "config", None), "model_type")]
    for config in configs:
        for name in ("pad", "bos", "eos", "cls", "sep"):
            value = getattr(config, f"{name}_token_id", None)
            ids |= set(value) if isinstance(value, list) else set() if value is None else {value}
    if configs:
        rank_zero_warn(
            f"No tokenizer found on {type(module).__name__}: special tokens are known from the model's configuration "
            "only. Set `self.tokenizer`, or put `special_tokens_mask` into the batches."
        )
    return frozenset(ids)
