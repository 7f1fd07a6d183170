"""Merges of what models add to a base: task arithmetic, with any sparsifier and with or without election of signs.

Task arithmetic (Ilharco et al. 2022), TIES (Yadav et al. 2023), DARE (Yu et al. 2023), DELLA (Deep et al. 2024) and
Model Breadcrumbs (Davari and Belilovsky 2023) are choices of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.merge.job import TensorJob, blocks, by_block
from oarsmith.merge.sparsify import (
    Breadcrumbs,
    Delta,
    Drop,
    Keep,
    Magnitude,
    MagnitudeDrop,
    Rescale,
    Sparsifier,
    above,
    cuts,
    keeper,
)

Elect = Literal["none", "sum", "count"]
Kind = Literal["none", "magnitude", "breadcrumbs", "drop", "magnitude_drop"]
_LEAST_DIVISOR = 1e-8


def make_sparsifier(kind: Kind, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Sparsifier | None:
    """The sparsifier of a model by its parameters."""
    density, rescale = float(own.get("density", 1.0)), _rescale(shared)
    match kind:
        case "none":
            return None
        case "magnitude":
            by: Literal["count", "quantile"] = "quantile" if shared["trim_by"] == "quantile" else "count"
            return Magnitude(density, "l1" if rescale == "density" else rescale, by)
        case "breadcrumbs":
            drop = bool(shared["drop_without_outliers"])
            return Breadcrumbs(density, float(own["gamma"]), drop, "l1" if rescale == "density" else rescale)
        case "drop":
            return Drop(density, rescale)
        case "magnitude_drop":
            # mergekit's epsilon is half the width of PaddleNLP's.
            by_tensor = shared["magnitude_ranks"] == "tensor"
            width = float(own["epsilon"]) * (1 if by_tensor else 2)
            return MagnitudeDrop(density, width, rescale, "tensor" if by_tensor else "row")


def _rescale(shared: Mapping[str, Any]) -> Rescale:
    if not shared.get("rescale", False):
        return "none"
    return "density" if shared.get("rescale_by") == "density" else "l1"


def delta_of(job: TensorJob, index: int) -> Delta:
    """What a model adds to the base."""
    wide = torch.float32 in (job.tensors[index].dtype, job.needed_base.dtype)
    return Delta(
        values=lambda part: job.delta(index, part),
        numel=job.numel,
        row=job.row,
        sixteen_bit=not wide,
        key=job.key("mask", index),
        name=job.name,
    )


def sparsified(job: TensorJob, kind: Kind) -> TensorJob:
    """The job with models that differ from the base only where their sparsifier keeps it: for methods of any kind."""
    if kind == "none":
        return job
    tensors = []
    for index, own in enumerate(job.own):
        sparsifier = make_sparsifier(kind, own, job.shared)
        row = job.row if sparsifier is not None and sparsifier.by_rows else 1
        keep = keeper(sparsifier, delta_of(job, index))()
        made = torch.empty(job.shape)
        flat = made.view(-1)
        for part in blocks(job.numel, row):
            flat[part] = keep(part, job.delta(index, part)).add_(job.base_values(part))
        tensors.append(made)
    # In place of what the method would do of itself.
    return replace(job, tensors=tuple(tensors), own=tuple({**own, "density": 1.0} for own in job.own))


def arithmetic(kind: Kind, elect: Elect) -> Callable[[TensorJob], Tensor]:
    """base + lambda * (sum w_i d_i) over the models, d_i sparsified.

    With ``elect`` a model counts at a number only where w_i d_i has the sign that was elected there, by the sum of all
    of them or by their count (0: +). ``normalize`` divides by the sum of the weights that count.
    """

    def merge(job: TensorJob) -> Tensor:
        row, keeps = 1, []
        for index, own in enumerate(job.own):
            sparsifier = make_sparsifier(kind, own, job.shared)
            row = job.row if sparsifier is not None and sparsifier.by_rows else row
            keeps.append(keeper(sparsifier, delta_of(job, index))())
        mix = _Mix(job, keeps, elect)
        return by_block(job, mix.block, row)

    return merge


class _Mix:
    """The sum, a block at a time."""

    def __init__(self, job: TensorJob, keeps: list[Keep], elect: Elect) -> None:
        self._job, self._keeps, self._elect = job, keeps, elect
        self._weights = job.weights
        self._scale, self._normalize = float(job.shared["lambda"]), bool(job.shared["normalize"])
        total = sum(self._weights)
        if elect == "none" and self._normalize:
            if abs(total) < _LEAST_DIVISOR:
                raise ModelError(
                    f"the weights {self._weights} sum to zero, so they cannot be normalized",
                    where=job.name,
                    fix="change the weights, or set normalize: false",
                )
            self._scale /= total

    def block(self, part: slice) -> Tensor:
        job = self._job
        deltas = [
            keep(part, job.delta(index, part)).mul_(weight)
            for index, (keep, weight) in enumerate(zip(self._keeps, self._weights, strict=True))
        ]
        mixed = self._plain(deltas) if self._elect == "none" else self._elected(deltas)
        return job.base_values(part).add_(mixed, alpha=self._scale)

    @staticmethod
    def _plain(deltas: list[Tensor]) -> Tensor:
        total = deltas[0]
        for delta in deltas[1:]:
            total.add_(delta)
        return total

    def _elected(self, deltas: list[Tensor]) -> Tensor:
        sign = _elected_sign(deltas if self._elect == "sum" else (delta.sign() for delta in deltas), deltas[0])
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, self._weights, strict=True):
            agreeing = delta.mul_(sign).clamp_min_(0)
            total.add_(agreeing)
            if self._normalize:
                divisor.add_(agreeing.sign_(), alpha=weight)
        total.mul_(sign)
        if self._normalize:
            if min(self._weights) > _LEAST_DIVISOR:  # where nobody agrees the total is 0
                divisor.clamp_min_(_LEAST_DIVISOR)
            else:
                divisor.masked_fill_(divisor.abs() < _LEAST_DIVISOR, 1.0)
            total.div_(divisor)
        return total


def _elected_sign(votes: Iterable[Tensor], like: Tensor) -> Tensor:
    """+1 or -1, the sign of the sum (0: +)."""
    total = torch.zeros_like(like)
    for vote in votes:
        total.add_(vote)
    return torch.ones_like(total).copysign_(total)


def sce(job: TensorJob) -> Tensor:
    """Select where models vary most, calculate weights from squares, erase minority signs (Wan et al. 2024)."""
    count = len(job.tensors)
    selected = _selected(job, float(job.shared["select_topk"]))

    def delta(index: int, part: slice) -> Tensor:
        found = job.delta(index, part)
        return found if selected is None else found.mul_(selected[part])

    squares = [0.0] * count
    for part in blocks(job.numel):
        for index in range(count):
            squares[index] += float(delta(index, part).square_().sum(dtype=torch.float64))
    total = sum(squares) / max(job.numel, 1)
    factors = [1 / count] * count if total < 1e-6 else [one / sum(squares) for one in squares]

    def block(part: slice) -> Tensor:
        deltas = [delta(index, part) for index in range(count)]
        sign = _elected_sign(deltas, deltas[0])
        mixed, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for one, factor in zip(deltas, factors, strict=True):
            agreeing = one.mul_(sign).clamp_min_(0)
            mixed.add_(agreeing, alpha=factor)
            divisor.add_(agreeing.sign_(), alpha=factor)
        return job.base_values(part).addcmul_(mixed.div_(divisor.clamp_(min=1e-6)), sign)

    return by_block(job, block)


def _selected(job: TensorJob, share: float) -> Tensor | None:
    """Which numbers are among the ``share`` that vary most, of those that vary at all; None: every one."""
    if share >= 1:
        return None
    count = len(job.tensors)
    spread = torch.empty(job.numel)
    for part in blocks(job.numel):
        deltas = [job.delta(index, part) for index in range(count)]
        mean = torch.stack(deltas).mean(0)
        spread[part] = sum((delta.sub_(mean).square_() for delta in deltas[1:]), deltas[0].sub_(mean).square_())
    chosen = int(int(spread.count_nonzero()) * share)
    if chosen == 0:
        return torch.zeros(job.numel, dtype=torch.bool)
    whole = Delta(lambda part: spread[part].clone(), job.numel, job.row, False, 0, job.name)
    keep = above(cuts(whole, [chosen])[0])
    selected = torch.empty(job.numel, dtype=torch.bool)
    for part in blocks(job.numel):
        selected[part] = keep(part, spread[part]) != 0
    return selected
