"""Outputs that are made again in backward instead of being kept.

Norms and gated activations cost little beside the product that follows, which would keep their output for its weight's
gradient. They leave a recipe here; the product keeps the recipe's inputs, which backward needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Recipe(NamedTuple):
    """``make(*inputs)`` is the tensor, bit for bit."""

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


# By the tensor object itself, for as long as it lives; with the version it had.
_recipes = WeakIdKeyDictionary()


def leave_recipe(output: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``output``, known from now on as ``make(*inputs)``. Inputs must be kept for backward by somebody else as well."""
    if torch.is_grad_enabled():
        _recipes[output] = Recipe(make, tuple(x.detach() for x in inputs)), output._version
    return output


def recipe_of(x: Tensor) -> Recipe:
    """What to keep of ``x``: its recipe if it has one and is unchanged, else itself."""
    recipe, version = _recipes.get(x, (None, 0))
    return Recipe(_itself, (x,)) if recipe is None or version != x._version else recipe


def _itself(x: Tensor) -> Tensor:
    return x
