"""Fake quantization for training: numbers are rounded on the way forward, and gradients pass as if they were not.

Straight through (Bengio et al. 2013, arXiv 1308.3432): the gradient of rounding is 1, and 0 of what a fixed range cuts.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.models.rounding import Activations
from oarsmith.quantize.activations import round_activations
from oarsmith.quantize.grid import Grid, Steps, quantize
from oarsmith.quantize.scheme import MapScheme

_LARGEST = 127


def fake_weight(weight_OI: Tensor, grid: Grid, steps: Steps | None = None) -> Tensor:
    """The weight on its grid, on steps of its range as it is now unless others are given; gradients pass unchanged.

    Weights that given steps cut keep their gradient, so that they can come back.
    """
    with torch.no_grad():
        rounded_OI = quantize(weight_OI, grid, steps).dense().to(weight_OI.dtype)
    return weight_OI + (rounded_OI - weight_OI).detach()


def fake_activations(x: Tensor, how: Activations, scale: Tensor | None = None) -> Tensor:
    """Activations as the scheme rounds them. A static scale's range cuts, and what it cuts has no gradient."""
    with torch.no_grad():
        rounded = round_activations(x, how, scale)
    if scale is not None and how.static:
        largest = scale * (_LARGEST if how.code == "int" else torch.finfo(torch.float8_e4m3fn).max)
        x = torch.minimum(torch.maximum(x, -largest.to(x.dtype)), largest.to(x.dtype))
    return x + (rounded - x).detach()


@dataclass(frozen=True, kw_only=True)
class FakeMap:
    """What a linear map will be under a scheme; see ``adapters.linear.Fake``."""

    scheme: MapScheme

    def weight(self, weight_OI: Tensor) -> Tensor:
        """The weight as it will be."""
        grid = self.scheme.weights
        return weight_OI if grid is None else fake_weight(weight_OI, grid)

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs as they will be."""
        how = self.scheme.activations
        return x if how is None else fake_activations(x, how)
