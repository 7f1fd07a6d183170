"""One AdamW step on one tensor (Loshchilov and Hutter 2019, with PyTorch's order of operations)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.kernels.masters import join_master, split_master
from oarsmith.kernels.select import library


@dataclass(frozen=True, kw_only=True)
class AdamWRule:
    """The numbers of one step; ``grad_scale`` multiplies the gradient (clipping) as it is read."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float

    @property
    def corrections(self) -> tuple[float, float]:
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


def adamw_step(
    parameter: Tensor, low: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rule: AdamWRule
) -> None:
    """Update ``parameter`` in place.

    A bf16 parameter comes with ``low`` (int16): its fp32 master is (bits of parameter << 16) + low, so masters cost 2
    bytes more, not 4, and lose nothing. Moments are fp32. The compiled kernel makes one pass over memory.
    """
    assert parameter.dtype == (torch.float32 if low is None else torch.bfloat16), (parameter.dtype, low is None)
    kernels = library() if parameter.device.type == "cpu" and parameter.is_contiguous() else None
    if kernels is None or grad.dtype not in (torch.float32, torch.bfloat16):
        adamw_reference(parameter, low, grad, exp_avg, exp_avg_sq, rule)
        return
    grad = grad.contiguous()
    numbers = (rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, *rule.corrections, rule.grad_scale)
    if low is None:
        kernels.call("adamw", torch.float32, parameter, grad.float(), exp_avg, exp_avg_sq, parameter.numel(), *numbers)
    else:
        kernels.call("adamw_split", grad.dtype, parameter, low, grad, exp_avg, exp_avg_sq, parameter.numel(), *numbers)


def adamw_reference(
    parameter: Tensor, low: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rule: AdamWRule
) -> None:
    """The plain twin."""
    master = parameter if low is None else join_master(parameter, low)
    grad = grad.float() * rule.grad_scale
    exp_avg.lerp_(grad, 1 - rule.beta1)
    exp_avg_sq.mul_(rule.beta2).addcmul_(grad, grad, value=1 - rule.beta2)
    correction1, correction2 = rule.corrections
    master.mul_(1 - rule.lr * rule.weight_decay)
    master.sub_(rule.lr * (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + rule.eps))
    if low is not None:
        split_master(master, parameter, low)
