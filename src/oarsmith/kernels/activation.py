"""Activations, plain and gated. Shapes: T tokens, I intermediate; gate and up lie side by side in [T, 2I]."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.remake import leave_recipe
from oarsmith.kernels.select import native_for

_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def activation(x: Tensor, kind: str) -> Tensor:
    """silu, gelu (erf), gelu_tanh (the tanh approximation) or relu."""
    match kind:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
    raise AssertionError(kind)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """act(gate) * up as [T, I]; the compiled path rounds once, where the twin rounds the activation too."""
    if native_for(gate_up) is not None:
        gate_up = gate_up.contiguous()
        return leave_recipe(_Gated.apply(gate_up, _CODES[kind]), partial(_forward, code=_CODES[kind]), gate_up)
    return gated_activation_reference(gate_up, kind)


def gated_activation_reference(gate_up: Tensor, kind: str) -> Tensor:
    """The plain twin."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate, kind) * up


def _forward(gate_up: Tensor, code: int) -> Tensor:
    inner = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype)
    library = native_for(gate_up)
    assert library is not None
    library.call("gated_forward", gate_up.dtype, gate_up, out, gate_up.numel() // (2 * inner), inner, code)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.code = code
        return _forward(gate_up, code)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        dout = dout.contiguous()
        inner = dout.shape[-1]
        grad = torch.empty(gate_up.shape, dtype=gate_up.dtype)
        library = native_for(gate_up)
        assert library is not None
        library.call("gated_backward", dout.dtype, dout, gate_up, grad, dout.numel() // inner, inner, ctx.code)
        return grad, None
