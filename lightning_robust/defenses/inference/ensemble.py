"""Ensemble: the mean or the vote of several victims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_robust.attacks.oracle import VictimLike
from lightning_robust.data.items import Text
from lightning_robust.data.sampling import stable_hash
from lightning_robust.defenses.inference.base import (
    Combine,
    InferenceDefense,
    _state_key,
    ask,
    combined,
    expect_option,
    stand_in,
)
from lightning_robust.errors import ConfigError, did_you_mean
from lightning_robust.modules.loading import reading, seeded
from lightning_robust.modules.victim import Victim, evaluating

_LOADED = "_robust_adapters"
"""Attribute of a PEFT model: the names of the adapters that were loaded, by folder and its last change."""


class Ensemble(InferenceDefense):
    """Averages the probabilities of several victims, or counts their votes.

    Members are trained with other seeds, taken from other epochs, or of another kind altogether; they share
    nothing but their classes. For LoRA adapters on one backbone see `from_adapters`.

    Args:
        victim: One victim or several. A member that is a string is loaded: a Lightning checkpoint of
            `RobustClassifier`, an export folder, a local model or a hub id.
        members: Further ones, in the same way, for recipes whose first victim is the model in training.
        combine: ``mean`` of the probabilities, or ``vote``.

    Raises:
        ConfigError: If there are fewer than two members.
        BackboneError: If one cannot be loaded.
    """

    aim: ClassVar[Literal["adversarial", "ood", "both"]] = "both"
    needs: ClassVar[tuple[str, ...]] = ("victims or checkpoints",)

    def __init__(
        self,
        victim: VictimLike | str | Sequence[VictimLike | str],
        members: Sequence[VictimLike | str] = (),
        combine: Combine = "mean",
    ) -> None:
        combine = expect_option("combine", combine, Combine)
        first = list(victim) if isinstance(victim, list | tuple) else [victim]
        given = [*first, *_listed(members)]
        if len(given) < 2:
            raise ConfigError(
                f"Expected two or more victims in an ensemble, but got {len(given)}. Name others by `members`."
            )
        device = next((d for d in map(_device, given) if d is not None), None)
        loaded = [_loaded(one, device) for one in given]
        super().__init__(loaded[0])
        self._combine = combine
        self.others = loaded[1:]

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """See `InferenceDefense.check_settings`."""
        members = [stand_in if _is_path(one) else one for one in _listed(settings.get("members", ()))]
        super().check_settings(**settings | {"members": members})

    @classmethod
    def from_adapters(
        cls,
        model: nn.Module,
        tokenizer: Any,
        adapters: Sequence[str | Path],
        combine: Combine = "mean",
        **settings: Any,
    ) -> Ensemble:
        """Return an ensemble of PEFT adapters that share one backbone.

        Adapters are switched for each call; afterwards the one that was active is so again. Those that are
        loaded stay in the model, frozen, and are not loaded again until their folder changes; a model without PEFT
        gets its layers wrapped.

        Args:
            model: The backbone, or a PEFT model of it.
            tokenizer: Its tokenizer.
            adapters: Names of adapters that the model has, or folders of others.
            combine: ``mean`` of the probabilities, or ``vote``.
            **settings: As for `Victim`.

        Raises:
            ConfigError: If there are fewer than two adapters, or one is neither a name nor a folder.
            BackboneError: If one cannot be loaded.
        """
        if isinstance(adapters, str) or len(adapters) < 2:
            raise ConfigError(f"Expected two or more adapters in an ensemble, but got {adapters!r}.")
        peft_model, names = _with_adapters(model, [str(one) for one in adapters])
        victim = Victim(peft_model, tokenizer, **settings)
        return cls([_AdapterVictim(victim, name) for name in names], combine=combine)

    def copies(self, text: Text) -> list[Text]:
        return [text]

    def predict_packed(
        self, texts: Sequence[Text], max_batch_tokens: int | None = None, max_batch_size: int | None = None
    ) -> Tensor:
        """See `InferenceDefense.predict_packed`."""
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        limits = (max_batch_tokens, max_batch_size)
        answers = [ask(one, list(place), *limits) for one in self._victims()]
        if len({one.shape for one in answers}) > 1:
            shapes = ", ".join(str(one.shape[-1]) for one in answers)
            raise ConfigError(
                f"Expected an ensemble of victims with the same classes, but they have {shapes}."
            )
        rows = torch.stack(answers, dim=1)[[place[text] for text in texts]]
        return torch.stack([combined(row, self._combine) for row in rows]) if len(texts) else answers[0]

    def state_key(self) -> str | None:
        """See `InferenceDefense.state_key`; members that are no paths count by their own state."""
        keys = [_state_key(one) for one in self._victims()]
        return None if None in keys else stable_hash(type(self).__name__, self._combine, keys)

    def readable_characters(self, texts: Sequence[Text]) -> list[tuple[int, ...] | None]:
        """Return how many characters of each text any member reads; None means all."""
        says = [getattr(one, "readable_characters", None) for one in self._victims()]
        if not all(callable(one) for one in says):
            return [None] * len(texts)
        found = [one(texts) for one in says if one is not None]
        return [
            None if None in answers else tuple(map(max, *answers)) for answers in zip(*found, strict=True)
        ]

    def _victims(self) -> list[VictimLike]:
        return [self.victim, *self.others]


class _AdapterVictim:
    """A victim with one of its model's adapters active."""

    def __init__(self, victim: Victim, name: str) -> None:
        self.victim = victim
        self.name = name
        self.tokenizer = victim.tokenizer
        self.model = victim.model

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        return self.predict_packed(texts)

    def predict_packed(
        self, texts: Sequence[Text], max_batch_tokens: int | None = None, max_batch_size: int | None = None
    ) -> Tensor:
        """See `Victim.predict_packed`."""
        with _active(self.model, self.name):
            return self.victim.predict_packed(texts, max_batch_tokens, max_batch_size)

    def state_key(self) -> str | None:
        """See `Victim.state_key`."""
        with _active(self.model, self.name):
            return self.victim.state_key()

    def readable_characters(self, texts: Sequence[Text]) -> list[tuple[int, ...] | None]:
        """See `Victim.readable_characters`."""
        return self.victim.readable_characters(texts)


@contextmanager
def _active(model: Any, name: str) -> Iterator[None]:
    """Switch to an adapter, and back with what was trainable."""
    before = model.active_adapter
    with _trainable_kept(model):
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(before)


@contextmanager
def _trainable_kept(model: nn.Module) -> Iterator[None]:
    """Give every parameter that is there its ``requires_grad`` back; PEFT sets it as it switches."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def _with_adapters(model: Any, adapters: list[str]) -> tuple[Any, list[str]]:
    """Load those adapters that are folders, each once; return the PEFT model and the name of each."""
    from peft import PeftModel

    names: list[str] = []
    for adapter in adapters:
        if isinstance(model, PeftModel) and adapter in model.peft_config:
            names.append(adapter)
            continue
        folder = Path(adapter).expanduser().resolve()
        if not (folder / "adapter_config.json").is_file():
            there = list(model.peft_config) if isinstance(model, PeftModel) else []
            raise ConfigError(
                f"Expected the folder of an adapter or one of the adapters {', '.join(there) or '(none)'}, but got "
                f"{adapter!r}.{did_you_mean(adapter, there)}"
            )
        version = f"{folder}:{max(file.stat().st_mtime_ns for file in folder.iterdir())}"
        known: dict[str, str] = vars(model).get(_LOADED, {})
        if known.get(version) in getattr(model, "peft_config", ()):
            names.append(known[version])
            continue
        taken = model.peft_config if isinstance(model, PeftModel) else ()
        # A name is part of the parameters' names, in which dots separate.
        names.append(next(n for i in range(len(taken) + 1) if (n := f"member{i}") not in taken))
        model = _load(model, str(folder), names[-1])
        vars(model).setdefault(_LOADED, {})[version] = names[-1]
    return model, names


def _load(model: Any, folder: str, name: str) -> Any:
    """Add a frozen adapter without a trace: what is active or trainable, modes and random numbers stay."""
    from peft import PeftModel

    with reading(folder), seeded(0), evaluating(model), _trainable_kept(model):
        if isinstance(model, PeftModel):
            before = model.active_adapter
            model.load_adapter(folder, adapter_name=name, is_trainable=False)
            model.set_adapter(before)
            return model
        return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=False)


def _listed(members: Any) -> list[Any]:
    return list(members) if isinstance(members, Iterable) and not isinstance(members, str) else [members]


def _is_path(member: Any) -> bool:
    return isinstance(member, str | Path)


def _loaded(member: Any, device: torch.device | None) -> VictimLike:
    if _is_path(member):
        from lightning_robust.modules.victim_loading import load_victim

        victim, _ = load_victim(str(member))
        if device is not None:
            victim.model.to(device)
        return victim
    if not callable(member):
        raise ConfigError(
            f"Expected members of an ensemble to be victims or paths, but got {type(member).__name__} {member!r:.80}."
        )
    found: VictimLike = member
    return found


def _device(victim: Any) -> torch.device | None:
    model = getattr(victim, "model", getattr(victim, "module", None))
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if parameter is None else parameter.device
