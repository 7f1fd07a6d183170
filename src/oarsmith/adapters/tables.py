"""Constants that methods make of numbers: made once, and remembered by device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 256


def table(make: Callable[P, R]) -> Callable[P, R]:
    """Remember what a function makes of hashable arguments given by place."""
    kept: dict[tuple[object, ...], R] = {}

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs, kwargs
        if args not in kept:
            # A tensor first made under inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                kept[args] = make(*args, **kwargs)
            if len(kept) > _MOST:
                del kept[next(iter(kept))]
        return kept[args]

    return made
