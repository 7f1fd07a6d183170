"""How the rows of one weight are rounded: the algorithms behind one function.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from oarsmith.quantize.autoround import AutoRound
from oarsmith.quantize.awq import AWQ, clip_steps
from oarsmith.quantize.gptq import GPTQ, Hessian, Rounded, gptq, relative_error, weight_error
from oarsmith.quantize.grid import Grid, Steps, quantize
from oarsmith.quantize.hqq import hqq_steps, with_whole_zeros
from oarsmith.quantize.search import Search, search_steps

Method = Literal["rtn", "gptq", "gptaq", "hqq", "autoround"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        search: how steps are searched; None: those of the range.
        weighted: by the inputs; else every column counts alike.
        clip: search how far groups are clipped as AWQ does, in place of ``search``.
    """

    method: Method = "gptaq"
    search: Search | None = field(default_factory=Search)
    weighted: bool = True
    clip: AWQ | None = None
    gptq: GPTQ = field(default_factory=GPTQ)
    autoround: AutoRound = field(default_factory=AutoRound)

    @property
    def needs_inputs(self) -> bool:
        """Whether a map's inputs must be seen."""
        if self.method in ("hqq", "autoround"):
            return False
        searched = self.search is not None and self.weighted
        return self.method in ("gptq", "gptaq") or self.clip is not None or searched

    @property
    def needs_original(self) -> bool:
        """Whether the model in floats must be walked beside it."""
        return self.method in ("gptaq", "autoround")


@torch.no_grad()
def round_weight(weight_OI: Tensor, grid: Grid, hessian: Hessian | None, rounding: Rounding, where: str) -> Rounded:
    """A weight on a grid.

    Args:
        hessian: of its inputs; None where they are not needed, or nothing ever goes through this map.

    Raises:
        OarsmithError: weights or inputs that are not finite.
    """
    if rounding.method in ("gptq", "gptaq") and hessian is not None:
        return gptq(weight_OI, hessian, grid, rounding.gptq, where)
    if rounding.method == "hqq":
        steps: Steps | None = with_whole_zeros(weight_OI, hqq_steps(weight_OI, grid), grid)
    else:
        steps = _searched(weight_OI, grid, hessian, rounding)
    quantized = quantize(weight_OI, grid, steps)
    own_OI, rounded_OI = weight_OI.float(), quantized.dense()
    if hessian is None:
        error = weight_error(own_OI, rounded_OI)
    else:
        error = relative_error(own_OI, rounded_OI, hessian.matrix_II)
    return Rounded(quantized=quantized, error=error, damping=0.0)


def _searched(weight_OI: Tensor, grid: Grid, hessian: Hessian | None, rounding: Rounding) -> Steps | None:
    if rounding.clip is not None and hessian is not None:
        return clip_steps(weight_OI, hessian.matrix_II, grid, rounding.clip)
    if rounding.search is None:
        return None
    importance_I = hessian.matrix_II.diagonal() if hessian is not None and rounding.weighted else None
    return search_steps(weight_OI, grid, importance_I, rounding.search)
