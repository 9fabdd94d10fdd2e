"""Whether classes take the settings that a recipe gives them, seen without building what is expensive."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_robust.attacks import Attack
from lightning_robust.attacks.base import attack_class
from lightning_robust.callbacks import RobustnessMonitor
from lightning_robust.callbacks.predictor import make_predictors
from lightning_robust.data.suites import SuiteSource
from lightning_robust.defenses import Defense
from lightning_robust.defenses.inference.base import stand_in
from lightning_robust.defenses.inference.choosing import as_wrapper, inference_defense_class
from lightning_robust.errors import ConfigError, RobustError, did_you_mean

_SHORT_NAMES = (
    "lightning_robust",
    "lightning_robust.defenses",
    "lightning_robust.callbacks",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)


def check_class(entry: Any, where: str) -> Iterator[str]:
    """Yield what is wrong with a class and its settings, as a recipe gives them.

    Args:
        entry: A mapping with ``class_path`` and ``init_args``, or the class's path alone.
        where: The place in the recipe, for messages.
    """
    if isinstance(entry, str):
        entry = {"class_path": entry}
    if not isinstance(entry, dict) or "class_path" not in entry:
        there = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
        yield f"{where}: expected `class_path` and `init_args`, but got {there}."
        return
    for key in entry:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            yield f"{where}: there is no key {key!r}.{did_you_mean(str(key), ('class_path', 'init_args'))}"
    try:
        cls = find_class(str(entry["class_path"]))
    except ConfigError as error:
        yield f"{where}: {error}"
        return
    settings = entry.get("init_args") or {}
    faults = list(check_keys(settings, cls, where, ignore=entry.get("dict_kwargs") or ()))
    yield from faults
    if not inspect.isclass(cls) or not isinstance(settings, Mapping):
        return
    if issubclass(cls, Defense) and not faults:
        yield from _check_defense(settings, cls, where)
    if issubclass(cls, RobustnessMonitor):
        yield from _check_inference_defenses(
            settings.get("inference_defenses"), f"{where}.inference_defenses"
        )


def _check_defense(settings: Mapping[str, Any], cls: type[Defense], where: str) -> Iterator[str]:
    attack = settings.get("attack")
    if attack is not None:
        yield from _check_attack({"name": attack} if isinstance(attack, str) else attack, f"{where}.attack")
    # An attack may read files when it is made.
    others = {key: value for key, value in settings.items() if key != "attack"}
    yield from _check_values(cls, others, where)


def _check_inference_defenses(given: Any, where: str) -> Iterator[str]:
    """Check defended predictors by name, as monitors take them."""
    if not isinstance(given, Mapping):
        yield from _check_values(partial(make_predictors, given), {}, where)
        return
    for name, spec in given.items():
        yield from _check_values(partial(make_predictors, {name: stand_in}), {}, where)
        yield from _check_inference_defense(spec, f"{where}.{name}")


def _check_inference_defense(spec: Any, where: str) -> Iterator[str]:
    settings = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(settings, Mapping) or "name" not in settings:
        yield from _check_values(partial(as_wrapper, spec), {}, where)
        return
    try:
        cls = inference_defense_class(settings["name"])
    except ConfigError as error:
        yield f"{where}: {error}"
        return
    others = {key: value for key, value in settings.items() if key != "name"}
    yield from check_keys(others, cls, where, without=("victim",))
    known = {key: value for key, value in others.items() if key in _parameters(cls) and key != "victim"}
    yield from _check_values(cls.check_settings, known, where)


def _check_values(make: Callable[..., Any], settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """Make something that reads no files, to hear which values are wrong.

    It tells of one at a time: those that it names are then left out, until it has no more to say.
    """
    try:
        make(**settings)
    except (RobustError, TypeError) as error:
        message = str(error)
        yield f"{where}: {message}"
        sound = {key: value for key, value in settings.items() if f"`{key}`" not in message}
        if len(sound) < len(settings) and sound.keys() >= set(_required(_parameters(make))):
            yield from _check_values(make, sound, where)


def find_class(class_path: str) -> Any:
    """Return the class behind a dotted path, or behind a short name of a common one.

    Raises:
        ConfigError: If there is none.
    """
    module_name, _, name = class_path.rpartition(".")
    for candidate in [module_name] if module_name else _SHORT_NAMES:
        try:
            module = importlib.import_module(candidate)
        except ImportError as error:
            if module_name:
                raise ConfigError(
                    f"the module of class {class_path!r} cannot be imported: {error}."
                ) from error
            continue
        found = getattr(module, name, None)
        if found is not None:
            return found
        if module_name:
            raise ConfigError(f"there is no class {class_path!r}.{did_you_mean(name, _classes(module))}")
    names = [n for module in _SHORT_NAMES for n in _classes(importlib.import_module(module))]
    raise ConfigError(f"there is no class {class_path!r}.{did_you_mean(class_path, names)}")


def _classes(module: types.ModuleType) -> list[str]:
    return [name for name in dir(module) if inspect.isclass(getattr(module, name, None))]


def check_keys(
    settings: Any, cls: Any, where: str, *, ignore: Collection[str] = (), without: Collection[str] = ()
) -> Iterator[str]:
    """Yield which settings a class does not have, also nested ones, and which it lacks.

    Args:
        settings: By name.
        cls: A class, or whatever is called with them.
        where: The place in the recipe, for messages.
        ignore: Settings that come from elsewhere and need not be given.
        without: Arguments that are no settings.
    """
    if not isinstance(settings, Mapping):
        yield f"{where}: expected settings by name, but got {settings!r}."
        return
    parameters = {name: p for name, p in _parameters(cls).items() if name not in without}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    hints = _hints(cls)
    for key, value in settings.items():
        if key not in parameters:
            there = ", ".join(parameters)
            yield f"{where}: {cls.__name__} has no setting {key!r}.{did_you_mean(str(key), parameters)} It has: {there}."
        else:
            yield from _check_nested(value, hints.get(key), f"{where}.{key}")
    missing = [name for name in _required(parameters) if name not in settings and name not in ignore]
    if missing:
        yield f"{where}: {cls.__name__} needs {', '.join(f'`{name}`' for name in missing)}."


def _check_nested(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Follow settings that are themselves made of settings: data classes, alone, in lists and in mappings."""
    nested = [option for option in _options(hint) if dataclasses.is_dataclass(option)]
    if Attack in nested and isinstance(value, Mapping):
        yield from _check_attack(value, where)
        return
    if nested and isinstance(value, Mapping):
        meant = max(nested, key=lambda option: len(_parameters(option).keys() & value.keys()))
        faults = list(check_keys(value, meant, where))
        yield from faults
        if meant is SuiteSource and not faults:
            try:
                SuiteSource(**value)
            except (ConfigError, TypeError) as error:
                yield f"{where}: {error}"
        return
    for option in _options(hint):
        arguments = typing.get_args(option)
        if isinstance(value, list) and typing.get_origin(option) in (list, Sequence) and arguments:
            for number, entry in enumerate(value):
                yield from _check_nested(entry, arguments[0], f"{where}[{number}]")
            return
        if (
            isinstance(value, Mapping)
            and typing.get_origin(option) in (dict, Mapping)
            and len(arguments) == 2
        ):
            for key, entry in value.items():
                yield from _check_nested(entry, arguments[1], f"{where}.{key}")
            return


def _check_attack(settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """Check an attack's settings with a ``name``, as monitors and defenses take them."""
    name = settings.get("name") if isinstance(settings, Mapping) else None
    if not isinstance(name, str):
        yield f"{where}: expected the settings of an attack with its `name`, but got {settings!r}."
        return
    try:
        cls = attack_class(name)
    except ConfigError as error:
        yield f"{where}: {error}"
        return
    others = {key: value for key, value in settings.items() if key != "name"}
    from_name = [field.name for field in dataclasses.fields(cls) if field.metadata.get("from_name")]
    yield from check_keys(others, cls, where, ignore=from_name)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(cls)
    return {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_POSITIONAL}


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        return {}
