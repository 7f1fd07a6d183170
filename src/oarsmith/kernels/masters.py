"""bf16 weights with exact fp32 masters: a weight is the upper half of its master, an int16 remainder the lower."""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for


def join_master(parameter: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 parameter and its int16 remainder."""
    return ((parameter.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def split_master(master: Tensor, parameter: Tensor, low: Tensor) -> None:
    """Write fp32 values as bf16 (round half up in the bits) and the signed remainder, in place."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    parameter.copy_(high.to(torch.int16).view(torch.bfloat16))
    low.copy_((bits - (high << 16)).to(torch.int16))


def subtract(parameter: Tensor, low: Tensor | None, delta: Tensor, keep: float) -> None:
    """master = keep * master - delta (fp32), in place, for an fp32 parameter or a bf16 one with its remainder."""
    assert parameter.dtype == (torch.float32 if low is None else torch.bfloat16), (parameter.dtype, low is None)
    kernels = native_for(parameter) if parameter.is_contiguous() else None
    if kernels is None:
        subtract_reference(parameter, low, delta, keep)
    else:
        kernels.call("subtract", parameter.dtype, parameter, low, delta.contiguous(), parameter.numel(), keep)


def subtract_reference(parameter: Tensor, low: Tensor | None, delta: Tensor, keep: float) -> None:
    """The plain twin."""
    master = parameter if low is None else join_master(parameter, low)
    master.mul_(keep).sub_(delta)
    if low is not None:
        split_master(master, parameter, low)
