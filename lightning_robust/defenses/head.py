"""The classifier inside a module: its logits and the pooled features that they come from."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_robust.defenses.chain import DefenseChain
from lightning_robust.defenses.perturbation import Rows
from lightning_robust.errors import ConfigError, did_you_mean
from lightning_robust.modules.finding import huggingface_models, unwrapped

Call = tuple[Rows, int]

_UNUSED_COPY = "original_module"  # PEFT keeps the untrained head beside the one that it trains


@dataclass
class Pass:
    """What the classifier put out while the step was called on the rows of a batch once.

    Args:
        rows: Positions in the batch ``(n,)``, ascending, on the CPU.
        logits: ``(n, classes)`` in float32 (float64 where the model computes in it).
        features: What the last linear layer was given ``(n, hidden)``.
    """

    rows: Tensor
    logits: Tensor
    features: Tensor


@dataclass
class Seen:
    """What the classifier put out inside one `ClassifierHead.watch`, call by call.

    A key is ``(rows, call)``: the rows of the batch that the step was called on (None: all of them), and how
    many times it was called on them before. Of what inner defenses do, the passes whose input and weights
    they leave alone count; where there is none, the last one does.
    """

    logits: dict[Call, Tensor] = field(default_factory=dict)
    features: dict[Call, Tensor] = field(default_factory=dict)

    def passes(self) -> list[Pass]:
        """Return whole passes: calls on disjoint rows, which a domain defense makes, are put together.

        Raises:
            ConfigError: If the features are no vectors, one for each row.
        """
        return [self._pass(calls) for calls in self._grouped()]

    def keep(self, plain: set[Call]) -> None:
        """Forget all but the ``plain`` calls, or, if there are none, all but those of the last pass."""
        kept = plain or set(self._grouped()[-1])
        self.logits = {call: logits for call, logits in self.logits.items() if call in kept}
        self.features = {call: features for call, features in self.features.items() if call in kept}

    def _grouped(self) -> list[list[Call]]:
        groups: list[tuple[set[int], list[Call]]] = []
        for call in self.logits:
            rows = set(self._rows(call).tolist())
            group = next((group for group in groups if group[0].isdisjoint(rows)), None)
            if group is None:
                group = (set(), [])
                groups.append(group)
            group[0].update(rows)
            group[1].append(call)
        return [calls for _, calls in groups]

    def _rows(self, call: Call) -> Tensor:
        rows = call[0]
        return torch.arange(len(self.logits[call])) if rows is None else torch.tensor(rows)

    def _pass(self, calls: list[Call]) -> Pass:
        for call in calls:
            if call not in self.features or self.features[call].ndim != 2:
                found = f"shape {tuple(self.features[call].shape)}" if call in self.features else "none"
                raise ConfigError(
                    f"Expected features (rows, hidden) in front of the logits, but got {found}. Name the layer that "
                    'is called on them and puts out the logits: head="path.to.submodule".'
                )
        rows = torch.cat([self._rows(call) for call in calls])
        logits, features = (
            torch.cat([values[call] for call in calls]) for values in (self.logits, self.features)
        )
        if len(calls) == 1:
            return Pass(rows, logits, features)
        order = rows.argsort()
        return Pass(rows[order], logits[order.to(logits.device)], features[order.to(features.device)])


class ClassifierHead:
    """Where a module turns pooled features ``(rows, hidden)`` into logits ``(rows, classes)``.

    Found by itself in Hugging Face sequence classifiers (PEFT-wrapped ones included), and in modules that put
    one linear layer behind a Hugging Face model; elsewhere it is named.

    Args:
        module: The module that is trained.
        name: Dotted name of the submodule that maps features to logits, where it cannot be found.

    Raises:
        ConfigError: If ``name`` does not exist, or no head is found.
    """

    def __init__(self, module: LightningModule, name: str | None = None) -> None:
        modules = {n: m for n, m in module.named_modules() if _UNUSED_COPY not in n}
        models = list(huggingface_models(modules).values())
        self._models: list[nn.Module] = []
        if name is not None and name not in modules:
            raise ConfigError(
                f"Expected `head` to name a submodule of {type(module).__name__}, but got {name!r}."
                f"{did_you_mean(name, modules)}"
            )
        named = None if name is None else modules[name]
        classifiers = [m for m in models if _has_logits(m) and named in (None, m, unwrapped(m))]
        if len(classifiers) == 1:
            self._models = list(dict.fromkeys([classifiers[0], unwrapped(classifiers[0])]))
            found = _last_linears(classifiers[0])
        elif named is not None:
            found = [named]
        else:
            inside = {id(m) for model in models for m in model.modules()}
            found = [m for m in modules.values() if isinstance(m, nn.Linear) and id(m) not in inside]
            found = found if models else []
        if len(found) != 1:
            linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)][-5:]
            raise ConfigError(
                f"Expected to find the layer of {type(module).__name__} whose output is the logits, but found "
                f'{len(found)}. Name it: head="path.to.submodule". Its last linear layers are: '
                f"{', '.join(linear) or 'none'}."
            )
        self.layer = found[0]

    @contextmanager
    def watch(self, chain: DefenseChain, *, least_classes: int = 2) -> Iterator[Seen]:
        """Keep what the classifier puts out inside this context, with its graph.

        Args:
            chain: That of the defense that watches.
            least_classes: 1 where the logits themselves do not matter.

        Raises:
            ConfigError: If the step did not call the classifier, or what it put out is no logits, or of fewer classes.
        """
        seen = Seen()
        watching = _Watching(chain, seen, of_layer=not self._models, least_classes=least_classes)
        with ExitStack() as hooks:
            hooks.callback(self.layer.register_forward_pre_hook(watching.given, with_kwargs=True).remove)
            if self._models:
                hooks.callback(self.layer.register_forward_hook(watching.output).remove)
            for module in self._models or [self.layer]:
                hooks.callback(module.register_forward_hook(watching.logits).remove)
            yield seen
        if seen.logits:
            seen.keep(watching.plain)
        else:
            layer = type((self._models or [self.layer])[0]).__name__
            raise ConfigError(
                f"Expected the training step to call {layer}, whose output is the logits, but it did not. "
                'Name the layer that it calls: head="path.to.submodule".'
            )


class _Watching:
    """The hooks of one `ClassifierHead.watch`."""

    def __init__(self, chain: DefenseChain, seen: Seen, *, of_layer: bool, least_classes: int) -> None:
        self.plain: set[Call] = set()
        """Calls that no inner defense perturbed."""
        self._chain = chain
        self._seen = seen
        self._of_layer = of_layer
        self._least_classes = least_classes
        self._depth = len(chain.row_stack)
        self._perturbations = chain.perturbations
        self._calls: Counter[Rows] = Counter()
        self._given: Tensor | None = None
        self._output: Tensor | None = None
        self._last: Tensor | None = None

    def given(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)

    def output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else None

    def logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = _logits_in(output)
        if found is not None and found is self._last:  # a wrapper hands on what its model put out
            return
        self._last = found
        logits = found if found is None or not self._of_layer else _pooled(found, self._chain.batch)
        if logits is None or logits.ndim != 2:
            there = f"shape {tuple(logits.shape)}" if logits is not None else type(output).__name__
            raise ConfigError(
                f"Expected logits (rows, classes) from {type(module).__name__}, but got {there}. "
                'Name the layer whose output they are: head="path.to.submodule".'
            )
        if logits.shape[1] < self._least_classes:
            raise ConfigError(
                f"Expected logits for {self._least_classes} or more classes from {type(module).__name__}, but got "
                f"{logits.shape[1]}. Give each class a logit of its own, with cross-entropy instead of a binary loss."
            )
        rows = self._chain.rows_since(self._depth)
        call = (rows, self._calls[rows])
        self._calls[rows] += 1
        self._seen.logits[call] = _precise(logits)
        if self._given is not None:
            self._seen.features[call] = _precise(self._features(self._given, found))
        if self._chain.perturbations == self._perturbations:
            self.plain.add(call)
        self._given = self._output = None

    def _features(self, given: Tensor, logits: Tensor | None) -> Tensor:
        if given.ndim != 3 or logits is None or logits.ndim != (3 if self._of_layer else 2):
            return given
        pooled = _pooled(given, self._chain.batch)
        if self._output is None or self._output.shape[:2] != given.shape[:2]:
            return pooled
        # Which token a model classifies by is its own matter; its logits tell.
        same = (self._output == logits.unsqueeze(1)).all(-1)
        chosen = given[torch.arange(len(given), device=given.device), same.int().argmax(1)]
        return torch.where(same.any(1, keepdim=True), chosen, pooled)


def _logits_in(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    if isinstance(output, list | tuple):
        # A model asked for a tuple puts the loss, a scalar, before the logits.
        output = next((part for part in output if isinstance(part, Tensor) and part.ndim), None)
    return output if isinstance(output, Tensor) else None


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _pooled(values: Tensor, batch: Any) -> Tensor:
    """Take, of a sequence, the last token that is no padding: what a decoder classifies by."""
    if values.ndim != 3:
        return values
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != values.shape[:2]:
        return values[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * (mask != 0)).argmax(dim=1).to(values.device)
    return values[torch.arange(len(values), device=values.device), last]


def _has_logits(model: nn.Module) -> bool:
    # Every Hugging Face model with a head computes its own loss on request, and no other does.
    return "labels" in inspect.signature(unwrapped(model).forward).parameters


def _last_linears(model: nn.Module) -> list[nn.Module]:
    inner: Any = unwrapped(model)
    transformer = f"{inner.base_model_prefix}."
    linear: dict[str, nn.Module] = {}
    for name, module in inner.named_modules():
        # By its size, not its class: an adapted layer is none of PyTorch's own. PEFT's wrapper of a trained copy
        # answers for what it holds, but has no size of its own.
        if vars(module).get("out_features") == inner.config.num_labels and not name.startswith(
            (transformer, *(f"{outer}." for outer in linear))
        ):
            linear[name] = module
    used = [module for name, module in linear.items() if _UNUSED_COPY not in name]
    # Of the copies for several adapters, the active one trains.
    return ([m for m in used if any(p.requires_grad for p in m.parameters())] or used)[-1:]
