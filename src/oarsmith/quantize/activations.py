"""Activations in 8 bits: how they are rounded, and what calibration sees of them.

Numbers are int8 from -127 to 127, or E4M3; always x = number * scale.

Shapes: T tokens, I features, H heads, K columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from oarsmith.errors import ConfigError, DataError
from oarsmith.models.rounding import Activations
from oarsmith.quantize.checks import check_finite
from oarsmith.quantize.grid import E4M3_MAX

_LARGEST = {"int": 127.0, "e4m3": E4M3_MAX}
_TINY = 1e-12

Method = Literal["abs_max", "avg"]


def quantize_activations(x: Tensor, how: Activations, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numbers [.., I], int8 or float8_e4m3fn, and their scales: [.., 1] of tokens, [.., I / group] of groups, or the
    one that was given.

    Args:
        scale: the static one, of calibration; what lies beyond its range is cut.

    Raises:
        ConfigError: a static scheme without a scale, or a group that does not divide the features.
    """
    units, scale = _units(x.float(), how, scale)
    if how.code == "e4m3":
        return units.to(torch.float8_e4m3fn), scale
    return units.round_().to(torch.int8), scale


def round_activations(x: Tensor, how: Activations, scale: Tensor | None = None) -> Tensor:
    """What the numbers of `quantize_activations` stand for, in the dtype of ``x``."""
    numbers, scale = quantize_activations(x, how, scale)
    if how.group is None or how.static:
        return (numbers.float() * scale).to(x.dtype)
    return (numbers.float().unflatten(-1, (-1, how.group)) * scale[..., None]).flatten(-2).to(x.dtype)


def _units(x: Tensor, how: Activations, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = _LARGEST[how.code]
    if how.static:
        if scale is None:
            raise ConfigError(
                "static activations need the scale that calibration found", fix="calibrate, or use dynamic"
            )
        return (x / scale).clamp_(-largest, largest), scale
    if how.group is None:
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(_TINY)
        return (x / scale).clamp_(-largest, largest), scale
    if x.shape[-1] % how.group:
        raise ConfigError(
            f"groups of {how.group} do not divide {x.shape[-1]} features",
            where="activations",
            fix="choose a group that divides them, or one scale a token",
        )
    groups = x.unflatten(-1, (-1, how.group))
    scale = (groups.abs().amax(-1) / largest).clamp_min(_TINY)
    return (groups / scale[..., None]).clamp_(-largest, largest).flatten(-2), scale


class Observer:
    """The range of activations over calibration: PaddleNLP's ``abs_max`` and ``avg``.

    Args:
        method: ``abs_max``: the largest |x| of all; ``avg``: the mean over samples of each one's largest, so that
            single outliers are cut. A sample is what is added at a time; PaddleNLP's is a document.
        heads: x is [T, H, ..], and each head has a range of its own (keys and values).
    """

    def __init__(self, method: Method, *, heads: bool = False) -> None:
        self._heads, self._count = heads, 0
        self._join: Callable[[Tensor, Tensor], Tensor] = torch.maximum if method == "abs_max" else self._mean
        self._limit = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Look at a sample; one without tokens says nothing.

        Raises:
            ModelError: for numbers that are not finite.
        """
        if x.numel() == 0:
            return
        check_finite(x, "a sample of activations")
        size = x.abs().float()
        limit = size.transpose(0, 1).flatten(1).amax(1) if self._heads else size.amax()
        self._count += 1
        self._limit = limit if self._count == 1 else self._join(self._limit, limit)

    def _mean(self, before: Tensor, limit: Tensor) -> Tensor:
        return before + (limit - before) / self._count

    @property
    def limit(self) -> Tensor:
        """The range's end: a scalar, or [H].

        Raises:
            DataError: before anything was seen.
        """
        if self._count == 0:
            raise DataError("no activation has been seen", fix="calibrate on more text")
        return self._limit

    def scale(self, code: Literal["int", "e4m3"]) -> Tensor:
        """The scale that puts the range's end on the largest number."""
        return (self.limit / _LARGEST[code]).clamp_min(_TINY)
