"""One pass of the user's step per batch is logged and counted, however often a defense calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor
from torchmetrics import Metric

MetricStates = list[dict[str, Any]]
_LOG_SIGNATURE = inspect.signature(LightningModule.log)
_KEPT = ("_update_count", "_computed", "_forward_cache")


@dataclass
class _Pass:
    """One sweep over the batch: a single call, or calls on disjoint rows of it."""

    plain: bool
    rows: set[int] | None
    outputs: list[tuple[list[int] | None, Any]] = field(default_factory=list)
    logs: list[tuple[tuple[Any, ...], dict[str, Any], int]] = field(default_factory=list)
    metrics: MetricStates = field(default_factory=list)


class StepTrace:
    """Watches the calls of the user's step during one training batch.

    Of all passes, the first plain one (the batch itself, nothing perturbed) keeps its logs, its
    torchmetrics updates and its output; where there is none, the last one does. Calls on disjoint
    rows of the batch form one pass: what they log is averaged, weighted by rows, or reduced as its ``reduce_fx``
    says, and what a step returns for each row beside its loss is put together in the order of rows.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._metrics = [m for m in module.modules() if isinstance(m, Metric)]
        self._before = _read_states(self._metrics)
        self._passes: list[_Pass] = []

    @contextmanager
    def call(self, *, plain: bool, rows: list[int] | None) -> Iterator[Callable[[Any], None]]:
        """Record one call of the user's step; the yielded function takes its output."""
        current = self._open_pass(plain, rows)
        num_rows = 1 if rows is None else len(rows)

        def log(*args: Any, **kwargs: Any) -> None:
            # Lightning detaches what it is given, too; here a graph would live as long as the batch.
            current.logs.append((recursive_detach(args), recursive_detach(kwargs), num_rows))

        def keep(output: Any) -> None:
            current.outputs.append((rows, recursive_detach(output)))

        replaced = self._module.__dict__.get("log")
        self._module.__dict__["log"] = log
        try:
            yield keep
        finally:
            _restore_attribute(self._module, "log", replaced)
        current.metrics = _read_states(self._metrics)

    def _open_pass(self, plain: bool, rows: list[int] | None) -> _Pass:
        for earlier in self._passes:
            # A defense inside a domain defense calls several times per domain: the k-th calls on
            # all domains are the k-th pass.
            if None not in (rows, earlier.rows) and earlier.plain == plain and earlier.rows.isdisjoint(rows):  # type: ignore[union-attr,arg-type]
                earlier.rows.update(rows)  # type: ignore[union-attr,arg-type]
                _write_states(self._metrics, earlier.metrics)
                return earlier
        if self._passes:
            _write_states(self._metrics, self._before)
        self._passes.append(_Pass(plain, None if rows is None else set(rows)))
        return self._passes[-1]

    def close(self) -> Any:
        """Let the chosen pass leave its trace and return its output."""
        if not self._passes:
            return None
        chosen = next((p for p in self._passes if p.plain), self._passes[-1])
        _write_states(self._metrics, chosen.metrics)
        for args, kwargs in _merged_logs(chosen):
            self._module.log(*args, **kwargs)
        return _merged_output(chosen.outputs)


def _merged_output(outputs: list[tuple[list[int] | None, Any]]) -> Any:
    """Put together what calls on parts of a batch returned; what is not one entry per row is the last call's."""
    last = outputs[-1][1] if outputs else None
    if len(outputs) < 2 or not isinstance(last, dict):
        return last
    rows = [row for part, _ in outputs for row in part or ()]
    order = torch.tensor(rows).argsort()
    merged = dict(last)
    for key in last:
        values = [output.get(key) for _, output in outputs]
        if all(_per_row(value, part) for (part, _), value in zip(outputs, values, strict=True)):
            merged[key] = torch.cat(values)[order.to(values[0].device)]
    return merged


def _per_row(value: Any, rows: list[int] | None) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and rows is not None and len(value) == len(rows)


def _merged_logs(chosen: _Pass) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if chosen.rows is None:
        for args, kwargs, _ in chosen.logs:
            yield args, kwargs
        return
    by_name: dict[str, list[tuple[Any, dict[str, Any], int]]] = {}
    for args, kwargs, num_rows in chosen.logs:
        options = _LOG_SIGNATURE.bind(None, *args, **kwargs).arguments
        del options["self"]
        name, value = options.pop("name"), options.pop("value")
        by_name.setdefault(name, []).append((value, options, num_rows))
    for name, calls in by_name.items():
        value, options, _ = calls[-1]
        weights = [options.get("batch_size") or num_rows for _, options, num_rows in calls]
        if not isinstance(value, Metric):
            value = _reduced([v for v, _, _ in calls], weights, options.get("reduce_fx", "mean"))
        if "batch_size" in options:
            options = {**options, "batch_size": sum(weights)}
        yield (name, value), options


def _reduced(values: list[Any], weights: list[int], reduce_fx: Any) -> Any:
    """What Lightning makes of the values that parts of a batch log; the mean is weighted."""
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    if name.lower() in ("sum", "min", "max"):
        return getattr(torch.stack([torch.as_tensor(v) for v in values]), name.lower())()
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _read_states(metrics: list[Metric]) -> MetricStates:
    return [
        {name: _copy(getattr(metric, name, None)) for name in (*metric._defaults, *_KEPT)}
        for metric in metrics
    ]


def _write_states(metrics: list[Metric], states: MetricStates) -> None:
    for metric, state in zip(metrics, states, strict=True):
        for name, value in state.items():
            setattr(metric, name, _copy(value))


def _copy(value: Any) -> Any:
    # Metrics update tensors in place and append to lists.
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def _restore_attribute(module: torch.nn.Module, name: str, previous: Any) -> None:
    if previous is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = previous
