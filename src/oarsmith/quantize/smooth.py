"""Activations made easier to round: what is hard in them is moved into the weights.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4): channel i of the input is divided by
s_i = max|x_i|^alpha / max|w_i|^(1 - alpha) and column i multiplied with it. Outlier Suppression+ (Wei et al. 2023,
arXiv 2304.09145, equation 2) takes (max x_i + min x_i) / 2 off first. The piecewise search, over groups of channels of
like size, is PaddleSlim's.

Shapes: T tokens, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.errors import DataError
from oarsmith.quantize.checks import check_finite, check_weight
from oarsmith.quantize.products import products

_SMALLEST = 1e-5
_STEPS = 127
_ROWS = 384
_EMA = 0.98


def smooth_factors(most_I: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """Factors [I] for the columns of maps that read one input, by which the input is divided.

    Args:
        most_I: the largest |x| of each channel.
        weights: of the maps [O, I]; a column's size is the largest of all of them.
        alpha: how much of the difficulty moves: 0 none, 1 all.

    A channel whose inputs or weights are all zero keeps a factor of 1.

    Raises:
        ModelError: for numbers that are not finite.
    """
    check_finite(most_I, "the largest inputs")
    for weight_OI in weights:
        check_weight(weight_OI)
    most_I = most_I.float()
    column_I = torch.stack([weight_OI.abs().amax(0).float() for weight_OI in weights]).amax(0)
    factor_I = most_I.clamp_min(_SMALLEST).pow(alpha) / column_I.clamp_min(_SMALLEST).pow(1 - alpha)
    return torch.where((most_I == 0) | (column_I == 0), 1.0, factor_I.clamp_min(_SMALLEST))


class Extremes:
    """The largest and the smallest number of each channel [I], and how large it is, over batches.

    Args:
        ema: a running mean of batches' extremes (decay .98, corrected for its start) instead of the extremes of all:
            single tokens count less.
    """

    def __init__(self, *, ema: bool = False) -> None:
        self._ema, self._batches = ema, 0
        self._high_I, self._low_I, self._most_I = torch.empty(0), torch.empty(0), torch.empty(0)

    def add(self, x_TI: Tensor) -> None:
        """Add a batch of inputs; one without tokens changes nothing.

        Raises:
            ModelError: for numbers that are not finite.
        """
        if len(x_TI) == 0:
            return
        check_finite(x_TI, "a batch of inputs")
        high_I, low_I = x_TI.amax(0).float(), x_TI.amin(0).float()
        most_I = torch.maximum(high_I, -low_I)
        if self._batches == 0:
            zero_I = torch.zeros_like(high_I)
            self._high_I, self._low_I = (zero_I, zero_I) if self._ema else (high_I, low_I)
            self._most_I = most_I
        if self._ema:
            self._high_I = _EMA * self._high_I + (1 - _EMA) * high_I
            self._low_I = _EMA * self._low_I + (1 - _EMA) * low_I
        else:
            self._high_I = torch.maximum(self._high_I, high_I)
            self._low_I = torch.minimum(self._low_I, low_I)
        self._most_I = torch.maximum(self._most_I, most_I)
        self._batches += 1

    @property
    def most_I(self) -> Tensor:
        """The largest |x| of each channel, of all batches."""
        self._check()
        return self._most_I

    @property
    def shift_I(self) -> Tensor:
        """(max + min) / 2: with it off, a channel's extremes are alike."""
        self._check()
        middle_I = (self._high_I + self._low_I) / 2
        return middle_I / (1 - _EMA**self._batches) if self._ema else middle_I

    def _check(self) -> None:
        if self._batches == 0:
            raise DataError("no token has gone through these maps", fix="calibrate on more text")


@dataclass(frozen=True, kw_only=True)
class Piecewise:
    """How the piecewise search goes: PaddleNLP's keys and numbers.

    Attributes:
        pieces: groups of channels.
        per_token: inputs have a scale for each token; else one for all.
        search_pieces: try 1 to ``pieces`` groups, and keep the best.
        alpha: lowest and highest exponent, tried in steps of ``alpha_step``.
        scale: lowest and highest plain factor, tried in steps of ``scale_step``.
    """

    pieces: int = 3
    per_token: bool = False
    search_pieces: bool = False
    alpha: tuple[float, float] = (0.2, 0.8)
    alpha_step: float = 0.05
    scale: tuple[float, float] = (1.0, 5.0)
    scale_step: float = 0.5


@torch.no_grad()
def piecewise_factors(
    x_TI: Tensor,
    most_I: Tensor,
    weights: Sequence[Tensor],
    settings: Piecewise | None = None,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Factors [I] that lose least where inputs and weights (per row) are rounded to int8.

    Channels are cut into pieces by size. SmoothQuant's factors with the best exponent, or one plain factor, are chosen
    for all of them, then piece by piece, from the largest channels down, with what others have in place. (PaddleSlim
    goes from the smallest up and starts with no factors: its outliers then hide what the first pieces are worth.) Never
    worse than one exponent, or than no factors.

    Args:
        x_TI: a sample of inputs; some hundred tokens do.
        most_I: the largest |x| of each channel, of all inputs.
        tie: what makes channels agree that can only have one factor.

    Raises:
        ModelError: for numbers that are not finite.
    """
    settings = Piecewise() if settings is None else settings
    check_finite(x_TI, "a sample of inputs")
    most_I = most_I.float()
    candidates = [smooth_factors(most_I, weights, alpha) for alpha in _range(settings.alpha, settings.alpha_step)]
    candidates += [torch.full_like(most_I, scale) for scale in _range(settings.scale, settings.scale_step)]
    # Outputs are a sum over rows, of which some hundred say the same as all.
    weight_OI = torch.cat([weight[:: max(1, len(weight) // _ROWS)].float() for weight in weights])
    x_TI = x_TI.float()
    target_TO = x_TI @ weight_OI.T

    def loss(factor_I: Tensor) -> float:
        tied_I = factor_I if tie is None else tie(factor_I)
        own_TI = x_TI / tied_I
        # Of a static scheme the scale that calibration would find, which a sample without its largest tokens would not.
        largest = own_TI.abs().amax(1, keepdim=True) if settings.per_token else (most_I / tied_I).amax()
        x_steps, weight_steps = _steps_of(largest), _steps_of((weight_OI * tied_I).abs().amax(1))
        numbers_TI = (own_TI / x_steps).round_().clamp_(-_STEPS, _STEPS)
        numbers_OI = (weight_OI * tied_I).div_(weight_steps[:, None]).round_()
        with products(exact=False):
            rounded_TO = (numbers_TI @ numbers_OI.T).mul_(x_steps).mul_(weight_steps)
        return float((rounded_TO - target_TO).square().mean())

    best_I = torch.ones_like(most_I)
    least = loss(best_I)
    for pieces in range(1, settings.pieces + 1) if settings.search_pieces else [settings.pieces]:
        factor_I, found = _search(pieces_of(most_I, pieces), candidates, loss)
        if found < least:
            best_I, least = factor_I, found
    return best_I if tie is None else tie(best_I)


def _search(piece_I: Tensor, candidates: Sequence[Tensor], loss: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """The best candidate for all channels, and then for each piece on top of it."""
    factor_I, least = torch.ones_like(candidates[0]), loss(torch.ones_like(candidates[0]))
    for piece in (None, *reversed(range(int(piece_I.max()) + 1))):
        found = [one_I if piece is None else torch.where(piece_I == piece, one_I, factor_I) for one_I in candidates]
        losses = [loss(one_I) for one_I in found]
        number = min(range(len(losses)), key=losses.__getitem__)
        if losses[number] < least:
            factor_I, least = found[number], losses[number]
    return factor_I, least


def pieces_of(size_I: Tensor, pieces: int) -> Tensor:
    """The piece [I] of each channel, 0 for the smallest: k-means in one dimension (Lloyd's steps from quantiles)."""
    size_I = size_I.float()
    centre_P = torch.quantile(size_I, (torch.arange(pieces) + 0.5) / pieces).unique()
    for _ in range(100):
        piece_I = torch.bucketize(size_I, (centre_P[1:] + centre_P[:-1]) / 2)
        count_P = torch.bincount(piece_I, minlength=len(centre_P))
        moved_P = torch.bincount(piece_I, size_I.double(), len(centre_P)).float() / count_P.clamp_min(1)
        moved_P = torch.where(count_P == 0, centre_P, moved_P)
        if torch.equal(moved_P, centre_P):
            break
        centre_P = moved_P
    return piece_I


def _range(bounds: tuple[float, float], step: float) -> list[float]:
    return [bounds[0] + step * number for number in range(int((bounds[1] - bounds[0]) / step + 1e-6) + 1)]


def _steps_of(largest: Tensor) -> Tensor:
    """Scales that put these on the largest number."""
    return largest.clamp_min(1e-12) / _STEPS
