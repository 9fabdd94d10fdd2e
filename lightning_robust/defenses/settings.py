"""What a defense was made with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


def settings_of(
    init: Callable[..., None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Return the arguments by name that ``init(self, *args, **kwargs)`` gets, defaults included.

    Where the call does not fit, the defaults alone: ``__init__`` says better what is wrong, and copies are made
    without arguments.

    >>> class Smoothing:
    ...     def __init__(self, victim, num_copies=8): ...
    >>> settings_of(Smoothing.__init__, (print,), {}, without=["victim"])
    {'num_copies': 8}

    Args:
        init: The ``__init__`` of what is being made.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        without: Names that are no settings.
    """
    signature = inspect.signature(init)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        bound = signature.bind_partial(None)
    bound.apply_defaults()
    return {name: value for name, value in list(bound.arguments.items())[1:] if name not in without}
