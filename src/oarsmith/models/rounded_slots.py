"""Keys and values in 8 bits: in groups of 32 entries, each with an fp16 scale, as GGUF's Q8_0.

Shapes: S slots, T tokens, K entries, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32


def rounded_bytes(dim: int) -> int:
    """Memory of a vector of so many entries."""
    return dim + 2 * -(-dim // GROUP)


class RoundedSlots:
    """A vector [..., K] for each of ``size`` slots."""

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device) -> None:
        groups = -(-shape[-1] // GROUP)
        self._numbers_SK = torch.empty(size, *shape, dtype=torch.int8, device=device)
        self._scales_SG = torch.empty(size, *shape[:-1], groups, dtype=torch.float16, device=device)

    def write(self, slots_T: Tensor, x_TK: Tensor) -> None:
        """Round and keep. A group that is not finite becomes NaN."""
        missing = -x_TK.shape[-1] % GROUP
        groups_TGI = functional.pad(x_TK.float(), (0, missing)).unflatten(-1, (-1, GROUP))
        scale_TG1 = (groups_TGI.abs().amax(-1, keepdim=True) / 127).half()
        scale_TG1 = scale_TG1.where(scale_TG1.isfinite(), torch.nan)
        factor_TG1 = scale_TG1.float()
        numbers_TGI = (groups_TGI / factor_TG1.where(factor_TG1 > 0, 1)).nan_to_num().round().clamp(-127, 127)
        self._numbers_SK.index_copy_(0, slots_T, numbers_TGI.flatten(-2)[..., : x_TK.shape[-1]].to(torch.int8))
        self._scales_SG.index_copy_(0, slots_T, scale_TG1.squeeze(-1))

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What those slots stand for."""
        numbers, scales = self._numbers_SK[slots].float(), self._scales_SG[slots].float()
        return (numbers * scales.repeat_interleave(GROUP, -1)[..., : numbers.shape[-1]]).to(dtype)

    def copy(self, source: slice, target: slice) -> None:
        """Make slots hold what others hold."""
        for store in (self._numbers_SK, self._scales_SG):
            store[target] = store[source]
