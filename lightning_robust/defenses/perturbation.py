"""Perturbations of embeddings and other activations during a training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.errors import ConfigError
from lightning_robust.modules.encoding import special_ids
from lightning_robust.modules.finding import known_tokenizer

Rows = tuple[int, ...] | None
Key = tuple[Rows, int, int]
Start = Callable[[Tensor, Tensor], Tensor]
"""Maps an output and the mask of what may change to the first δ."""
Move = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps δ, its gradient and the output that it is added to to the next δ."""


class CallNumbers:
    """Tells which calls of layers are the same call, while a defense calls the step several times.

    Inner defenses may call the step again on the same batch: what it does there has the same numbers each time.
    On other batches, which they make, it has others.
    """

    def __init__(self, chain: DefenseChain) -> None:
        self._chain = chain
        self._depth = len(chain.row_stack)
        self.restart()

    def restart(self) -> None:
        """Count from the start: the step will be called on the same batches in the same order."""
        self._step = 0
        self._batches: list[Any] = []
        self._in_step: Counter[tuple[Rows, int]] = Counter()
        self._numbers: dict[tuple[Rows, int], list[tuple[int, int]]] = {}

    def next(self, index: int = 0) -> Key:
        """Return rows, number and layer of a call of layer ``index`` that is happening."""
        rows = self._chain.rows_since(self._depth)
        if self._chain.calls != self._step:
            self._step = self._chain.calls
            self._in_step.clear()
        place = (0 if rows is not None else self._batch_number(), self._in_step[rows, index])
        self._in_step[rows, index] += 1
        known = self._numbers.setdefault((rows, index), [])
        if place not in known:
            known.append(place)
        return rows, known.index(place), index

    def were_called(self, index: int = 0) -> bool:
        """Whether layer ``index`` was called since the start."""
        return any(called == index for _, called in self._numbers)

    def _batch_number(self) -> int:
        batch = self._chain.batch
        if not any(known is batch for known in self._batches):
            self._batches.append(batch)
        return next(number for number, known in enumerate(self._batches) if known is batch)


class Perturbation:
    """δ, added to the output of one or more layers while the context is open.

    A δ ``(rows, seq, hidden)`` comes into being at the first call of a layer, one for each layer, each set of
    rows that the step is called on and each time that it calls the layer: a key is ``(rows, call, layer)``.
    Positions of padding and special tokens stay zero.

    Args:
        chain: The running composition of defenses.
        layers: The modules whose output ``(rows, seq, hidden)``, or the first part of it, is perturbed.
        start: Maps an output and the mask ``(rows, seq, 1)`` of positions that may change to the first δ.
        special_ids: Token ids that are never perturbed.
        embedding: What is called on the token ids, where ``layers`` are hidden ones; without it, the batch's
            ``input_ids`` tell which positions are special.
        argument: The defense's argument that names ``layers``, for error messages.
    """

    def __init__(
        self,
        chain: DefenseChain,
        layers: nn.Module | Sequence[nn.Module],
        start: Start,
        special_ids: frozenset[int],
        *,
        embedding: nn.Module | None = None,
        argument: str = "embeddings",
    ) -> None:
        self._chain = chain
        self._layers = [layers] if isinstance(layers, nn.Module) else list(layers)
        self._start = start
        self._special = special_ids
        self._embedding = embedding
        self._argument = argument
        self._ids: Tensor | None = None
        self._numbers = CallNumbers(chain)
        self._frozen = False
        self.deltas: dict[Key, Tensor] = {}
        self.masks: dict[Key, Tensor] = {}
        self.outputs: dict[Key, Tensor] = {}
        """What the layers put out before δ was added, detached: from the call in which δ came into being."""

    @contextmanager
    def apply(self, *, plain: bool = False) -> Iterator[None]:
        """Perturb every call of the layers inside this context.

        Args:
            plain: δ is still zero, so this is a pass over the batch as it is.

        Raises:
            ConfigError: If the step never called one of them.
        """
        self._numbers.restart()
        with ExitStack() as hooks:
            if self._embedding is not None:
                hook = self._embedding.register_forward_pre_hook(self._keep_ids, with_kwargs=True)
                hooks.callback(hook.remove)
            for index, layer in enumerate(self._layers):
                add = partial(self._add, index)
                hooks.callback(layer.register_forward_hook(add, with_kwargs=True).remove)
            if not plain:
                hooks.enter_context(self._chain.perturbing())
            yield
        for index, layer in enumerate(self._layers):
            if not self._numbers.were_called(index):
                raise ConfigError(
                    f"Expected the training step to call the layer {layer}, but it did not. "
                    f"Name what it calls with `{self._argument}`."
                )

    def move(self, step: Move, gradients: Mapping[Key, Tensor]) -> None:
        """Replace each δ by ``step(δ, gradient, output)``, masked, as a new leaf."""
        for key, delta in self.deltas.items():
            moved = step(delta.detach(), gradients[key], self.outputs[key]) * self.masks[key]
            self.deltas[key] = moved.detach().requires_grad_()

    def freeze(self) -> None:
        """Compute no gradient of δ any more: where embeddings are frozen, no backward pass has to reach them."""
        self._frozen = True
        self.deltas = {key: delta.detach() for key, delta in self.deltas.items()}

    def gradients(self, loss: Tensor | None = None, *, retain_graph: bool = True) -> dict[Key, Tensor]:
        """Return each δ's gradient: of ``loss``, or left by a backward pass; 0 where δ must not change.

        In float16 it is that of the scaled loss. Weights get no gradient of ``loss``.

        Raises:
            ConfigError: If the loss does not depend on what the layers put out.
        """
        if loss is None:
            found: Any = [delta.grad for delta in self.deltas.values()]
        else:
            scaled = loss * self._chain.loss_scale  # only directions are used
            found = _gradients(
                scaled, list(self.deltas.values()), retain_graph=retain_graph, allow_unused=True
            )
        if any(gradient is None for gradient in found):
            raise ConfigError(
                f"Expected the training loss to depend on the layers that `{self._argument}` names, but no gradient "
                "reaches them. Are they called under torch.no_grad, or is their output detached?"
            )
        return {
            key: gradient.detach() * self.masks[key] for key, gradient in zip(self.deltas, found, strict=True)
        }

    def _keep_ids(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = _token_ids(args, kwargs, None)

    def _add(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._chain.batch is None:
            # No step is running: gradient checkpointing calls the layer again in an inner defense's backward pass.
            return output
        hidden = _hidden(layer, output)
        key = self._numbers.next(index)
        if key not in self.deltas:
            mask = self._mask(args, kwargs, hidden)
            self.masks[key] = mask
            self.outputs[key] = hidden.detach()
            start = (self._start(hidden.detach(), mask) * mask).detach()
            self.deltas[key] = start.requires_grad_(not self._frozen)
        return _with_hidden(output, hidden + self.deltas[key].to(hidden.dtype))

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        batch = self._chain.batch
        ids = self._ids if self._ids is not None else _token_ids(args, kwargs, batch)
        keep = torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
        if ids is not None and ids.shape == keep.shape:
            for special in self._special:
                keep &= ids != special
        if isinstance(batch, Mapping):
            for name, kept in (("attention_mask", 1), ("special_tokens_mask", 0)):
                given = batch.get(name)
                if isinstance(given, Tensor) and given.shape == keep.shape:
                    keep &= given == kept
        mask: Tensor = keep.unsqueeze(-1).to(torch.promote_types(output.dtype, torch.float32))
        return mask


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> Tensor | None:
    """The ids that a layer was called on, or, where it is a hidden layer, those of the batch."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if tensors and not any(v.is_floating_point() for v in tensors):
        return tensors[0]
    found = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) else None


def _hidden(layer: nn.Module, output: Any) -> Tensor:
    hidden = output if isinstance(output, Tensor) else next(iter(_parts(output)), None)
    if isinstance(hidden, Tensor) and hidden.is_floating_point():
        return hidden
    raise ConfigError(
        f"Expected {type(layer).__name__} to put out a tensor (rows, seq, hidden), or a tuple that starts with it, "
        f"but got {type(output).__name__}. Name another layer."
    )


def _parts(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, list | tuple) else ()


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, Mapping):
        changed: Any = copy(output)
        changed[next(iter(output))] = hidden
        return changed
    if hasattr(output, "_fields"):
        return type(output)(hidden, *output[1:])
    return type(output)((hidden, *output[1:]))


def _gradients(loss: Tensor, inputs: list[Tensor], **options: Any) -> Any:
    try:
        with torch.autocast(loss.device.type, enabled=False):
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
    return _norm(values, tuple(range(1, values.ndim)))


def norm_per_token(values: Tensor) -> Tensor:
    """L2 norm over the last dimension, ``(rows, seq, 1)``, never 0 so that it can divide."""
    return _norm(values, (-1,))


def _norm(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    # Squares of a confident example's gradient, 1e-24 and less, underflow in float32.
    tiny = torch.finfo(values.dtype).tiny
    largest = values.abs().amax(dim, keepdim=True).clamp_min(tiny)
    norm: Tensor = torch.linalg.vector_norm(values / largest, dim=dim, keepdim=True) * largest
    return norm.clamp_min(tiny)


def project_l2(
    delta: Tensor, radius: float | Tensor, norm: Callable[[Tensor], Tensor] = norm_per_example
) -> Tensor:
    """Project each example's δ ``(rows, seq, hidden)`` onto the L2 ball of ``radius``.

    >>> delta = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    >>> project_l2(delta, 1.0)
    tensor([[[0.6000, 0.8000]],
    <BLANKLINE>
            [[0.3000, 0.4000]]])

    Args:
        delta: The perturbation.
        radius: Of the ball; one number, or one for each norm.
        norm: `norm_per_example`, or `norm_per_token` for one ball a token.
    """
    return delta * (radius / norm(delta)).clamp(max=1.0)


def uniform_start(output: Tensor, mask: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Draw δ uniform in ``±magnitude / sqrt(length · hidden)``: its L2 norm is ``magnitude`` at most."""
    drawn = torch.rand(output.shape, generator=generator, device=output.device, dtype=mask.dtype)
    size = mask.sum(dim=1, keepdim=True).clamp_min(1) * output.shape[-1]
    return (drawn * 2 - 1) * magnitude / size.sqrt()


def special_token_ids(module: LightningModule, layer: nn.Module | None) -> frozenset[int]:
    """Return the ids that no perturbation may touch, as far as the module or its data module tells.

    From the tokenizer where there is one, otherwise from the model's configuration, and from the layer's
    ``padding_idx``.
    """
    padding = getattr(layer, "padding_idx", None)
    ids = set() if padding is None else {int(padding)}
    tokenizer = known_tokenizer(module)
    if tokenizer is not None:
        return special_ids(tokenizer) | ids
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
