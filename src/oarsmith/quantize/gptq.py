"""GPTQ: columns are rounded one after another, and what each loses is made good in those that are left.

Frantar et al. 2022 (arXiv 2210.17323): with H = X^T X, H^-1 = U^T U and U upper triangular, a column's error divided by
U_jj goes into the later columns i times U_ji. GPTAQ (Li et al. 2025, arXiv 2504.02692) takes the target from the stream
of the model in floats, whose inputs are X + dX: beside its error, a column j hands w_j P_ji to the later ones, with
P = alpha striu(dX^T X U^T) U.

A column whose input is never other than zero is rounded to nearest by itself: text that reaches it later still meets
its weights.

Shapes: T tokens, O out features, I in features (in the order of work), G groups of a row, B columns of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.kernels.integer_steps import ColumnSteps, round_columns
from oarsmith.quantize.checks import check_finite, check_weight
from oarsmith.quantize.grid import E4M3_MAX, Grid, Quantized, Steps, range_steps
from oarsmith.quantize.search import Search, search_steps

_log = logging.getLogger(__name__)
_TINY = 1e-12
_BATCH = 32
"""Columns after which the rest is updated in one product. The result does not depend on it; the paper's 128 is for
GPUs: on a CPU the updates within a batch cost more than the products after it."""
_SYMMETRIC_BLOCK = 512
_MOST_DAMPING = 1.0


class Hessian:
    """What GPTQ must know of a map's inputs: the mean of x x^T over tokens [I, I], in fp32.

    Args:
        cross: keep the mean of (x of the model in floats - x) x^T too, for GPTAQ.
    """

    def __init__(self, in_features: int, *, cross: bool = False) -> None:
        self.num_tokens = 0
        self._lower_II = torch.zeros(in_features, in_features)
        self._cross_II = torch.zeros(in_features, in_features) if cross else None

    @torch.no_grad()
    def add(self, x_TI: Tensor, full_TI: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            full_TI: the inputs of the same tokens in the model in floats; needed with ``cross``.

        Raises:
            ModelError: where inputs are not finite.
        """
        assert (full_TI is None) == (self._cross_II is None), (
            "the model's own inputs are needed with cross, and only then"
        )
        if len(x_TI) == 0:
            return
        check_finite(x_TI, "a batch of inputs")
        x_TI = x_TI.float()
        total = self.num_tokens + len(x_TI)
        # A running mean, so that no sum grows until small batches no longer count in it.
        keep, share = self.num_tokens / total, 1 / total
        size = len(self._lower_II)
        for start in range(0, size, _SYMMETRIC_BLOCK):
            stop = min(start + _SYMMETRIC_BLOCK, size)
            self._lower_II[start:stop, :stop].addmm_(x_TI[:, start:stop].T, x_TI[:, :stop], beta=keep, alpha=share)
        if self._cross_II is not None and full_TI is not None:
            check_finite(full_TI, "a batch of inputs of the model in floats")
            self._cross_II.addmm_((full_TI.float() - x_TI).T, x_TI, beta=keep, alpha=share)
        self.num_tokens = total

    def beside(self, others: Sequence[Hessian], num_tokens: int) -> Hessian:
        """As if ``num_tokens`` more had been seen, like those of all the others together. Without cross terms."""
        pool = sum(other.num_tokens for other in others)
        mixed = Hessian(len(self._lower_II))
        mixed.num_tokens = self.num_tokens + num_tokens
        mixed._lower_II += self._lower_II * (self.num_tokens / mixed.num_tokens)
        for other in others:
            mixed._lower_II += other._lower_II * (other.num_tokens / pool * num_tokens / mixed.num_tokens)
        return mixed

    @property
    def matrix_II(self) -> Tensor:
        """The mean of x x^T.

        Raises:
            DataError: before any token has been seen.
        """
        if self.num_tokens == 0:
            raise DataError("no token has gone through this map", fix="calibrate on more text, or round it to nearest")
        lower_II = self._lower_II.tril()
        return lower_II + lower_II.tril(-1).T

    @property
    def cross_II(self) -> Tensor | None:
        """The mean of (x of the model in floats - x) x^T; None without it."""
        return self._cross_II


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """How GPTQ works.

    Attributes:
        damping: what is added to the diagonal, as a share of its mean.
        order: which columns go first. ``columns``: those of the largest inputs (act-order), with steps found
            beforehand; ``groups``: groups by their largest input, and columns by theirs within a group; ``none``: as
            they lie. In the file columns lie as they did.
        static: steps are found beforehand, on the weights as they were; else at a group's turn, on what it is then.
        search: how steps are searched, by the diagonal of H; None: the range's.
        alpha: GPTAQ's, where the Hessian has the cross term; its authors' .25 keeps from fitting the calibration text.
    """

    damping: float = 0.01
    order: Literal["columns", "groups", "none"] = "columns"
    static: bool = True
    search: Search | None = field(default_factory=Search)
    alpha: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What an algorithm made of a weight.

    Attributes:
        error: tr((W - Q) H (W - Q)^T) / tr(W H W^T): the squared error of the outputs on the calibration text.
        damping: with which the Hessian could be inverted.
    """

    quantized: Quantized
    error: float
    damping: float


@torch.no_grad()
def gptq(
    weight_OI: Tensor, hessian: Hessian, grid: Grid, settings: GPTQ | None = None, where: str | None = None
) -> Rounded:
    """Round a weight, one column after another.

    Raises:
        ModelError: weight not finite, or a Hessian that no damping makes positive.
        DataError: no calibration token reached the map.
        ConfigError: an order that would need a group of its own for each column.
    """
    settings = GPTQ() if settings is None else settings
    check_weight(weight_OI, where)
    weight_OI, hessian_II = weight_OI.float(), hessian.matrix_II
    diagonal_I = hessian_II.diagonal()
    _check_order(settings, grid, weight_OI.shape[1])
    order_I = _order(diagonal_I, grid, settings.order)
    steps = _steps(weight_OI, diagonal_I, grid, settings)
    root_II, damping = _inverse_root(hessian_II[order_I][:, order_I], settings.damping, where)
    handed_II = None
    if hessian.cross_II is not None:
        cross_II = hessian.cross_II[order_I][:, order_I]
        handed_II = (cross_II @ root_II.T).triu_(1) @ root_II * settings.alpha
    work = _Work(weight_OI.T[order_I].contiguous(), order_I, grid, steps)
    whole = replace(grid, group=None)
    ordered_I = diagonal_I[order_I]
    work.run(
        root_II,
        handed_II,
        None
        if settings.static
        else lambda part_OK, start, stop: _steps(part_OK, ordered_I[start:stop], whole, settings),
    )
    back_I = order_I.argsort()
    numbers_OI = work.numbers_IO[back_I].T.contiguous()
    code = torch.uint8 if grid.code == "int" else torch.float8_e4m3fn
    quantized = Quantized(grid=grid, numbers_OI=numbers_OI.to(code), steps=work.steps)
    error = relative_error(weight_OI, quantized.dense(), hessian_II)
    return Rounded(quantized=quantized, error=error, damping=damping)


def relative_error(weight_OI: Tensor, rounded_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T); 0 where the outputs are zero."""
    lost_OI = weight_OI - rounded_OI
    lost, whole = ((lost_OI @ hessian_II) * lost_OI).sum(), ((weight_OI @ hessian_II) * weight_OI).sum()
    return float(lost / whole) if whole > 0 else 0.0


def weight_error(weight_OI: Tensor, rounded_OI: Tensor) -> float:
    """||W - Q||^2 / ||W||^2, where nothing is known of inputs; 0 where the weights are zero."""
    lost, whole = (weight_OI - rounded_OI).square().sum(), weight_OI.square().sum()
    return float(lost / whole) if whole > 0 else 0.0


def _check_order(settings: GPTQ, grid: Grid, in_features: int) -> None:
    if settings.order == "columns" and not settings.static and grid.num_groups(in_features) > 1:
        raise ConfigError(
            "columns in the order of their inputs need steps found beforehand: else groups are scattered over a row",
            where="gptq",
            fix="set static groups, or order groups instead of columns",
        )


def _order(diagonal_I: Tensor, grid: Grid, order: str) -> Tensor:
    if order == "none":
        return torch.arange(len(diagonal_I))
    columns_I = diagonal_I.argsort(descending=True, stable=True)
    if order == "columns":
        return columns_I
    group_I = torch.arange(len(diagonal_I)) // grid.group_of(len(diagonal_I))
    largest_G = torch.zeros(int(group_I[-1]) + 1).scatter_reduce(0, group_I, diagonal_I, "amax")
    rank_G = largest_G.argsort(descending=True, stable=True).argsort()
    return columns_I[rank_G[group_I[columns_I]].argsort(stable=True)]


def _steps(weight_OI: Tensor, diagonal_I: Tensor, grid: Grid, settings: GPTQ) -> Steps:
    if settings.search is None:
        return range_steps(weight_OI, grid)
    return search_steps(weight_OI, grid, diagonal_I, settings.search)


def _inverse_root(hessian_II: Tensor, damping: float, where: str | None) -> tuple[Tensor, float]:
    """U, upper triangular with U^T U = H^-1 of the damped H, and the damping."""
    size = len(hessian_II)
    mean = float(hessian_II.diagonal().mean())
    while damping <= _MOST_DAMPING:
        damped_II = hessian_II.clone()
        # Columns without input have a diagonal of zero, and any number above it leaves them to themselves.
        damped_II.diagonal().add_(damping * mean if mean > 0 else 1.0)
        # H = R R^T with R upper: Cholesky of H back to front. Then U = R^-1, without inverting H first.
        root_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if not failed:
            upper_II = root_II.flip(0, 1)
            return torch.linalg.solve_triangular(upper_II, torch.eye(size), upper=True), damping
        raised = max(10 * damping, 1e-4)
        _log.warning("%s: its Hessian is not positive with damping %g; trying %g", where or "a map", damping, raised)
        damping = raised
    raise ModelError("the Hessian of its inputs cannot be inverted", where=where, fix="calibrate on more text")


class _Work:
    """Columns on their way, transposed so that one is contiguous: weights, numbers [I, O], scales, zeros [G, O]."""

    def __init__(self, weight_IO: Tensor, order_I: Tensor, grid: Grid, steps: Steps) -> None:
        self.grid, self.weight_IO, self.numbers_IO = grid, weight_IO, torch.empty_like(weight_IO)
        self.groups = (order_I // grid.group_of(len(order_I))).tolist()
        self.scale_GO = steps.scale_OG.T.contiguous()
        self.zero_GO = None if steps.zero_OG is None else steps.zero_OG.T.contiguous()
        self.inverse_GO = 1 / torch.where(self.scale_GO.abs() < _TINY, 1.0, self.scale_GO)

    @property
    def steps(self) -> Steps:
        zero_OG = None if self.zero_GO is None else self.zero_GO.T.contiguous()
        return Steps(scale_OG=self.scale_GO.T.contiguous(), zero_OG=zero_OG)

    def run(self, root_II: Tensor, handed_II: Tensor | None, find: Callable[[Tensor, int, int], Steps] | None) -> None:
        """Round all columns. ``find``: steps of columns [O, K] from one to another at their group's turn."""
        size, groups = len(self.weight_IO), self.groups
        starts = [0, *(column for column in range(1, size) if groups[column] != groups[column - 1])] if find else [0]
        for start, stop in pairwise([*starts, size]):
            if find is not None:
                self._take(groups[start], find(self.weight_IO[start:stop].T, start, stop))
            for first in range(start, stop, _BATCH):
                self._batch(first, min(first + _BATCH, stop), root_II, handed_II)

    def _take(self, group: int, steps: Steps) -> None:
        self.scale_GO[group] = steps.scale_OG[:, 0]
        self.inverse_GO[group] = 1 / torch.where(steps.scale_OG[:, 0].abs() < _TINY, 1.0, steps.scale_OG[:, 0])
        if self.zero_GO is not None and steps.zero_OG is not None:
            self.zero_GO[group] = steps.zero_OG[:, 0]

    def _batch(self, start: int, stop: int, root_II: Tensor, handed_II: Tensor | None) -> None:
        """Round columns from ``start`` to ``stop``, and update those after them."""
        own, rest = slice(start, stop), slice(stop, None)
        weight_BO, numbers_BO, groups = self.weight_IO[own], self.numbers_IO[own], self.groups[own]
        handed_BB = None if handed_II is None else handed_II[own, own]
        if self.grid.code == "int":
            steps = ColumnSteps(
                scale_GO=self.scale_GO,
                inverse_GO=self.inverse_GO,
                zero_GO=self.zero_GO,
                middle=self.grid.middle,
                largest=self.grid.largest,
            )
            lost_BO = round_columns(weight_BO, numbers_BO, steps, groups, root_II[own, own], handed_BB)
        else:
            lost_BO = self._round_floats(weight_BO, numbers_BO, groups, root_II[own, own], handed_BB)
        if stop < len(self.weight_IO):
            self.weight_IO[rest].addmm_(root_II[own, rest].T, lost_BO, alpha=-1)
            if handed_II is not None:
                self.weight_IO[rest].addmm_(handed_II[own, rest].T, weight_BO)

    def _round_floats(
        self, weight_BO: Tensor, numbers_BO: Tensor, groups: list[int], root_BB: Tensor, handed_BB: Tensor | None
    ) -> Tensor:
        """`round_columns` onto E4M3."""
        lost_BO = torch.empty_like(weight_BO)
        for column, weight_O in enumerate(weight_BO):
            weight_O.addmv_(lost_BO[:column].T, root_BB[:column, column], alpha=-1)
            if handed_BB is not None:
                weight_O.addmv_(weight_BO[:column].T, handed_BB[:column, column])
            units_O = (weight_O * self.inverse_GO[groups[column]]).clamp_(-E4M3_MAX, E4M3_MAX)
            numbers_BO[column] = units_O.to(torch.float8_e4m3fn)
            near_O = numbers_BO[column] * self.scale_GO[groups[column]]
            torch.sub(weight_O, near_O, out=lost_BO[column]).div_(root_BB[column, column])
        return lost_BO
