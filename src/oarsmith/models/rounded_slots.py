"""Keys and values in 8 bits, as a cache form says (cache_form.py). The compiled step has the same numbers.

Shapes: S slots, T tokens, K entries, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.cache_form import GROUP, CacheForm, HeadScales

_E4M3_MAX = 448.0
_NOT_A_NUMBER = -128
"""What stands for it among whole numbers, which end at -127."""


class RoundedSlots(ABC):
    """A vector [..., K] for each of some slots."""

    def __init__(self, *stores: Tensor) -> None:
        self._stores = stores

    @abstractmethod
    def write(self, slots_T: Tensor, x_TK: Tensor) -> None:
        """Round and keep. What is not finite becomes NaN."""

    @abstractmethod
    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What those slots stand for."""

    def copy(self, source: slice, target: slice) -> None:
        """Make slots hold what others hold."""
        for store in self._stores:
            store[target] = store[source]


class GroupedSlots(RoundedSlots):
    """Whole numbers in groups of 32 entries, each with an fp16 scale, as GGUF's Q8_0; NaN takes its whole group."""

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device) -> None:
        groups = -(-shape[-1] // GROUP)
        self._numbers_SK = torch.empty(size, *shape, dtype=torch.int8, device=device)
        self._scales_SG = torch.empty(size, *shape[:-1], groups, dtype=torch.float16, device=device)
        super().__init__(self._numbers_SK, self._scales_SG)

    def write(self, slots_T: Tensor, x_TK: Tensor) -> None:
        missing = -x_TK.shape[-1] % GROUP
        groups_TGI = functional.pad(x_TK.float(), (0, missing)).unflatten(-1, (-1, GROUP))
        scale_TG1 = (groups_TGI.abs().amax(-1, keepdim=True) / 127).half()
        scale_TG1 = scale_TG1.where(scale_TG1.isfinite(), torch.nan)
        factor_TG1 = scale_TG1.float()
        numbers_TGI = (groups_TGI / factor_TG1.where(factor_TG1 > 0, 1)).nan_to_num().round().clamp(-127, 127)
        self._numbers_SK.index_copy_(0, slots_T, numbers_TGI.flatten(-2)[..., : x_TK.shape[-1]].to(torch.int8))
        self._scales_SG.index_copy_(0, slots_T, scale_TG1.squeeze(-1))

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        numbers, scales = self._numbers_SK[slots].float(), self._scales_SG[slots].float()
        return (numbers * scales.repeat_interleave(GROUP, -1)[..., : numbers.shape[-1]]).to(dtype)


class IntegerSlots(RoundedSlots):
    """Whole numbers from -127 to 127 times the scale of their head."""

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device, scales: HeadScales) -> None:
        self._numbers_SK = torch.empty(size, *shape, dtype=torch.int8, device=device)
        self._scale = _beside(scales, shape, device)
        super().__init__(self._numbers_SK)

    def write(self, slots_T: Tensor, x_TK: Tensor) -> None:
        steps_TK = x_TK.float() / self._scale
        numbers_TK = steps_TK.clamp(-127, 127).round().where(steps_TK.isfinite(), _NOT_A_NUMBER)
        self._numbers_SK.index_copy_(0, slots_T, numbers_TK.to(torch.int8))

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = self._numbers_SK[slots].float()
        return (numbers.where(numbers != _NOT_A_NUMBER, torch.nan) * self._scale).to(dtype)


class FloatSlots(RoundedSlots):
    """E4M3 times the scale of their head."""

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device, scales: HeadScales) -> None:
        self._codes_SK = torch.empty(size, *shape, dtype=torch.uint8, device=device)
        self._scale = _beside(scales, shape, device)
        super().__init__(self._codes_SK)

    def write(self, slots_T: Tensor, x_TK: Tensor) -> None:
        scaled_TK = x_TK.float() / self._scale
        kept_TK = scaled_TK.clamp(-_E4M3_MAX, _E4M3_MAX).where(scaled_TK.isfinite(), torch.nan)
        self._codes_SK.index_copy_(0, slots_T, kept_TK.to(torch.float8_e4m3fn).view(torch.uint8))

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        return (self._codes_SK[slots].view(torch.float8_e4m3fn).float() * self._scale).to(dtype)


def rounded_slots(
    form: CacheForm, layer: int, place: int, size: int, shape: tuple[int, ...], device: torch.device
) -> RoundedSlots:
    """``size`` slots of a vector of this shape.

    Args:
        layer: whose it is; ``place``: 0 for keys (and for latents, which are both), 1 for values.
    """
    if form.in_groups:
        return GroupedSlots(size, shape, device)
    scales = (1.0,) if form.scales is None else form.scales[layer][place]
    if form.code == "int":
        return IntegerSlots(size, shape, device, scales)
    return FloatSlots(size, shape, device, scales)


def _beside(scales: HeadScales, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Scales that go with [heads, K], or with [K] of a single one."""
    heads = shape[0] if len(shape) > 1 else 1
    assert len(scales) in (1, heads), (scales, shape)
    found = torch.tensor(scales, dtype=torch.float32, device=device)
    return found[:, None] if len(shape) > 1 else found
