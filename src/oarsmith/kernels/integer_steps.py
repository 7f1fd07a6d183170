"""Weights on integer grids: what shrunken ranges lose, and columns rounded one after another.

Shapes: O out features, I in features, G groups of a row, K columns of a group, P factors, B columns of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.select import native_for

_CHUNK = 1 << 17
"""Weights that the twin works on at a time: with their temporaries they stay in a core's cache."""


def shrink_losses(
    weight_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    importance_I: Tensor,
    factors_P: Tensor,
    *,
    group: int,
    middle: float,
    largest: float,
) -> Tensor:
    """What each group loses on its scale times each factor: sum of importance * (weight - rounded)^2, [P, O, G].

    A weight is rounded to (n - zero) * scale * factor with n whole in [0, largest]; the last group may be short.

    Args:
        scale_OG: nowhere zero.
        zero_OG: None: ``middle`` for all.
    """
    operands = [weight_OI, scale_OG, importance_I, factors_P] + ([] if zero_OG is None else [zero_OG])
    native = native_for(*operands)
    if native is None or weight_OI.dtype is not torch.float32:
        return shrink_losses_reference(
            weight_OI, scale_OG, zero_OG, importance_I, factors_P, group=group, middle=middle, largest=largest
        )
    # Held by names until the kernel is done: a copy that only its address is taken of would be freed.
    weight_OI, scale_OG, importance_I = weight_OI.contiguous(), scale_OG.contiguous(), importance_I.contiguous()
    zero_OG = None if zero_OG is None else zero_OG.contiguous()
    losses_POG = scale_OG.new_empty(len(factors_P), *scale_OG.shape)
    sizes = (*weight_OI.shape, group, len(factors_P))
    operands_of = (weight_OI, scale_OG, zero_OG, importance_I, factors_P, losses_POG)
    native.call("shrink_losses", torch.float32, *operands_of, *sizes, middle, largest)
    return losses_POG


def shrink_losses_reference(
    weight_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    importance_I: Tensor,
    factors_P: Tensor,
    *,
    group: int,
    middle: float,
    largest: float,
) -> Tensor:
    """`shrink_losses` in plain PyTorch."""
    rows, missing = max(1, _CHUNK // weight_OI.shape[1]), -weight_OI.shape[1] % group
    root_GK = functional.pad(importance_I.sqrt(), (0, missing)).unflatten(0, (-1, group))
    losses_POG = scale_OG.new_empty(len(factors_P), *scale_OG.shape)
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        # In units of a step, so that a factor is one multiplication.
        units_OGK = functional.pad(weight_OI[part], (0, missing)).unflatten(1, (-1, group)) / scale_OG[part][..., None]
        zero = torch.full_like(units_OGK[..., :1], middle) if zero_OG is None else zero_OG[part][..., None]
        for number, factor in enumerate(factors_P.tolist()):
            exact_OGK = torch.add(zero, units_OGK, alpha=1 / factor)
            lost_OGK = exact_OGK.sub_(exact_OGK.round().clamp_(0, largest)).mul_(root_GK)
            unit_OG = factor * scale_OG[part]
            losses_POG[number, part] = (torch.linalg.vector_norm(lost_OGK, dim=-1) * unit_OG).square_()
    return losses_POG


def fit_sums(
    weight_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    importance_I: Tensor,
    *,
    group: int,
    middle: float,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """What a group's scale of least loss is the ratio of, for the numbers that its weights have on its scale now.

    Returns:
        Sums of importance * weight * (number - zero), and of importance * (number - zero)^2, [O, G].
    """
    operands = [weight_OI, scale_OG, importance_I] + ([] if zero_OG is None else [zero_OG])
    native = native_for(*operands)
    if native is None or weight_OI.dtype is not torch.float32:
        return fit_sums_reference(
            weight_OI, scale_OG, zero_OG, importance_I, group=group, middle=middle, largest=largest
        )
    weight_OI, scale_OG, importance_I = weight_OI.contiguous(), scale_OG.contiguous(), importance_I.contiguous()
    zero_OG = None if zero_OG is None else zero_OG.contiguous()
    sums = torch.empty_like(scale_OG), torch.empty_like(scale_OG)
    operands_of = (weight_OI, scale_OG, zero_OG, importance_I, *sums)
    native.call("fit_sums", torch.float32, *operands_of, *weight_OI.shape, group, middle, largest)
    return sums


def fit_sums_reference(
    weight_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    importance_I: Tensor,
    *,
    group: int,
    middle: float,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """`fit_sums` in plain PyTorch."""
    missing = -weight_OI.shape[1] % group
    importance_GK = functional.pad(importance_I, (0, missing)).unflatten(0, (-1, group))
    weight_OGK = functional.pad(weight_OI, (0, missing)).unflatten(1, (-1, group))
    zero = middle if zero_OG is None else zero_OG[..., None]
    numbers_OGK = (weight_OGK / scale_OG[..., None]).add_(zero).round_().clamp_(0, largest).sub_(zero)
    counted_OGK = numbers_OGK * importance_GK
    return torch.linalg.vecdot(weight_OGK, counted_OGK), torch.linalg.vecdot(numbers_OGK, counted_OGK)


@dataclass(frozen=True, kw_only=True)
class ColumnSteps:
    """Scales, one over them and zeros [G, O] of groups of columns; no zeros: ``middle``. Numbers end at ``largest``."""

    scale_GO: Tensor
    inverse_GO: Tensor
    zero_GO: Tensor | None
    middle: float
    largest: float


def round_columns(
    weight_BO: Tensor,
    numbers_BO: Tensor,
    steps: ColumnSteps,
    group_of: list[int],
    root_BB: Tensor,
    handed_BB: Tensor | None = None,
) -> Tensor:
    """Round columns, each after what those before it have lost is taken from it. In place.

    w_j -= sum_k<j root_kj lost_k - handed_kj w_k; numbers_j its nearest; lost_j = (w_j - rounded) / root_jj.

    Args:
        weight_BO: a column is a row here; becomes what each was when its turn came.
        numbers_BO: takes the numbers.
        group_of: the group of each column.
        root_BB: upper triangular.

    Returns:
        lost [B, O].
    """
    native = native_for(weight_BO, numbers_BO, root_BB)
    if native is None or weight_BO.dtype is not torch.float32:
        return round_columns_reference(weight_BO, numbers_BO, steps, group_of, root_BB, handed_BB)
    assert weight_BO.is_contiguous() and numbers_BO.is_contiguous(), "batches of whole columns"
    lost_BO, group_B = torch.empty_like(weight_BO), torch.tensor(group_of)
    root_BB = root_BB.contiguous()
    handed_BB = None if handed_BB is None else handed_BB.contiguous()
    scales = (steps.scale_GO, steps.inverse_GO, steps.zero_GO)
    operands = (weight_BO, numbers_BO, lost_BO, *scales, group_B, root_BB, handed_BB)
    native.call("round_columns", torch.float32, *operands, *weight_BO.shape, steps.middle, steps.largest)
    return lost_BO


def round_columns_reference(
    weight_BO: Tensor,
    numbers_BO: Tensor,
    steps: ColumnSteps,
    group_of: list[int],
    root_BB: Tensor,
    handed_BB: Tensor | None = None,
) -> Tensor:
    """`round_columns` in plain PyTorch."""
    lost_BO, near_O = torch.empty_like(weight_BO), torch.empty_like(weight_BO[0])
    divisors = root_BB.diagonal().tolist()
    for column, (weight_O, numbers_O) in enumerate(zip(weight_BO, numbers_BO, strict=True)):
        if column:
            # A column takes all that earlier ones left it at once: less goes through memory than when each writes to
            # all after it.
            weight_O.addmv_(lost_BO[:column].T, root_BB[:column, column], alpha=-1)
            if handed_BB is not None:
                weight_O.addmv_(weight_BO[:column].T, handed_BB[:column, column])
        group = group_of[column]
        zero = steps.middle if steps.zero_GO is None else steps.zero_GO[group]
        torch.mul(weight_O, steps.inverse_GO[group], out=numbers_O).add_(zero).round_().clamp_(0, steps.largest)
        torch.sub(numbers_O, zero, out=near_O).mul_(steps.scale_GO[group])
        torch.sub(weight_O, near_O, out=lost_BO[column]).div_(divisors[column])
    return lost_BO
