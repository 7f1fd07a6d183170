"""AutoRound: which way weights are rounded, and how far groups are clipped, learned for a whole block at a time.

Cheng et al. 2023 (arXiv 2309.05516), equations 3 to 5: w' = s clip(round(w / s + v + z), 0, n) with an offset v in
[-.5, .5] of each weight, and the range's ends times factors below 1; signed gradient descent (straight through the
rounding) on the squared error of the block's outputs, learning rate 1 / steps, falling linearly to 0; the best iterate
is kept.

Shapes: T tokens, D hidden, O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.errors import ConfigError, DataError
from oarsmith.quantize.checks import check_finite, check_weight
from oarsmith.quantize.grid import Grid, Quantized, Steps, as_stored, grouped

_TINY = 1e-12

BlockFunction = Callable[[Mapping[str, Tensor], int], Tensor]
"""What a block makes of a batch, by its number, with these weights: [T, D]. Gradients flow back to the weights."""


@dataclass(frozen=True, kw_only=True)
class AutoRound:
    """How long and how fast it learns.

    Attributes:
        rate: learning rate at first; None: 1 / steps, with which an offset can just come from one end to the other.
        batches: batches a step, drawn without regard to earlier steps; all of them where there are fewer.
        learn_range: learn factors of the range's ends too.
    """

    steps: int = 200
    rate: float | None = None
    batches: int = 8
    learn_range: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Weights on their grids, and the mean squared error of the block's outputs over all batches: with weights rounded
    to nearest, and with these."""

    quantized: dict[str, Quantized]
    before: float
    after: float


class _Weight:
    """A weight and what is learned of it."""

    def __init__(self, weight_OI: Tensor, grid: Grid, where: str) -> None:
        check_weight(weight_OI, where)
        if grid.code != "int" or grid.rows != 1:
            raise ConfigError(
                "AutoRound learns which whole number a weight becomes, with scales of single rows",
                where=where,
                fix="use an integer grid, or round to nearest",
            )
        self.grid, self.weight_OI = grid, weight_OI.float()
        groups_OGK = grouped(self.weight_OI, grid)
        self.low_OG, self.high_OG = groups_OGK.amin(-1), groups_OGK.amax(-1)
        self.group_I = torch.arange(weight_OI.shape[1]) // grid.group_of(weight_OI.shape[1])
        self.offset_OI = torch.zeros_like(self.weight_OI, requires_grad=True)
        self.high_factor_OG = torch.ones_like(self.low_OG, requires_grad=True)
        self.low_factor_OG = torch.ones_like(self.low_OG, requires_grad=True)

    @property
    def learned(self) -> list[Tensor]:
        return [self.offset_OI, self.high_factor_OG, self.low_factor_OG]

    def steps(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros [O, G], as `range_steps` finds them where the factors are 1; on a symmetric grid one factor
        counts."""
        grid = self.grid
        if grid.symmetric:
            extreme_OG = torch.where(-self.low_OG >= self.high_OG, self.low_OG, self.high_OG) * self.high_factor_OG
            scale_OG = extreme_OG.abs() / (grid.middle - 1) if grid.bits == 8 else extreme_OG / -grid.middle
            return self._stored(scale_OG), torch.full_like(scale_OG, float(grid.middle))
        low_OG = self.low_OG.clamp_max(0) * self.low_factor_OG
        high_OG = self.high_OG.clamp_min(0) * self.high_factor_OG
        scale_OG = self._stored((high_OG - low_OG) / grid.largest)
        return scale_OG, _round(-low_OG / scale_OG).clamp(0, grid.largest)

    def _stored(self, scale_OG: Tensor) -> Tensor:
        """Scales as the files hold them, none of them zero."""
        scale_OG = scale_OG + (as_stored(scale_OG, self.grid) - scale_OG).detach()
        return torch.where(scale_OG.abs() < _TINY, 1.0, scale_OG)

    def numbers(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        units_OI = self.weight_OI / scale_OG[:, self.group_I] + self.offset_OI + zero_OG[:, self.group_I]
        return _round(units_OI).clamp(0, self.grid.largest)

    def dense(self) -> Tensor:
        """The weight on its grid, with gradients."""
        scale_OG, zero_OG = self.steps()
        return (self.numbers(scale_OG, zero_OG) - zero_OG[:, self.group_I]) * scale_OG[:, self.group_I]

    @torch.no_grad()
    def descend(self, rate: float, *, learn_range: bool) -> None:
        """A step against the signs of the gradients."""
        for tensor, (low, high) in zip(self.learned, ((-0.5, 0.5), (0.5, 1.0), (0.5, 1.0)), strict=True):
            # Maps that no token of the batch reached have no gradient, nor has the factor that a grid has no use for.
            if tensor.grad is not None and (learn_range or tensor is self.offset_OI):
                tensor.sub_(tensor.grad.sign() * rate).clamp_(low, high)
            tensor.grad = None

    @torch.no_grad()
    def quantized(self) -> Quantized:
        scale_OG, zero_OG = self.steps()
        steps = Steps(scale_OG=scale_OG, zero_OG=None if self.grid.symmetric else zero_OG)
        return Quantized(grid=self.grid, numbers_OI=self.numbers(scale_OG, zero_OG).to(torch.uint8), steps=steps)


def _round(x: Tensor) -> Tensor:
    """Rounded, with the gradient of what was rounded (straight through)."""
    return x + (x.round() - x).detach()


def autoround(
    block: BlockFunction,
    weights: Mapping[str, Tensor],
    targets: Sequence[Tensor],
    grids: Mapping[str, Grid],
    settings: AutoRound | None = None,
) -> Learned:
    """Learn how to round a block's weights.

    Args:
        weights: [O, I] by name: those that are rounded.
        targets: what the block makes of each batch with its weights in floats, [T, D] of any T.
        grids: one for each weight.

    Raises:
        ConfigError: for grids of floats.
        DataError: without batches.
        ModelError: for weights or targets that are not finite.
    """
    settings = AutoRound() if settings is None else settings
    if not targets:
        raise DataError("AutoRound has no batch to learn from", fix="calibrate on more text")
    for target_TD in targets:
        check_finite(target_TD, "a target")
    states = {name: _Weight(weight_OI.detach(), grids[name], name) for name, weight_OI in weights.items()}
    before = _loss_of_all(block, states, targets)
    _learn(block, states, targets, settings)
    after = _loss_of_all(block, states, targets)
    if not after < before:
        # The best step was so on its batches only.
        states, after = {name: _Weight(one.weight_OI, one.grid, name) for name, one in states.items()}, before
    return Learned(quantized={name: one.quantized() for name, one in states.items()}, before=before, after=after)


def _learn(block: BlockFunction, states: Mapping[str, _Weight], targets: Sequence[Tensor], settings: AutoRound) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    rate = 1 / settings.steps if settings.rate is None else settings.rate
    least, best = (
        float("inf"),
        {name: [tensor.detach().clone() for tensor in one.learned] for name, one in states.items()},
    )
    for step in range(settings.steps):
        batches = torch.randperm(len(targets), generator=generator)[: settings.batches].tolist()
        count = sum(targets[number].numel() for number in batches)
        loss = 0.0
        for number in batches:
            output_TD = block({name: one.dense() for name, one in states.items()}, number)
            part = (output_TD.float() - targets[number].float()).square().sum() / count
            part.backward()
            loss += float(part.detach())
        if loss < least:
            least = loss
            best = _copies(states)
        for one in states.values():
            one.descend(rate * (1 - step / settings.steps), learn_range=settings.learn_range)
    with torch.no_grad():
        for name, one in states.items():
            for tensor, kept in zip(one.learned, best[name], strict=True):
                tensor.copy_(kept)


def _copies(states: Mapping[str, _Weight]) -> dict[str, list[Tensor]]:
    return {name: [tensor.detach().clone() for tensor in one.learned] for name, one in states.items()}


@torch.no_grad()
def _loss_of_all(block: BlockFunction, states: Mapping[str, _Weight], targets: Sequence[Tensor]) -> float:
    dense = {name: one.dense() for name, one in states.items()}
    lost = sum(
        float((block(dense, number).float() - target.float()).square().sum()) for number, target in enumerate(targets)
    )
    return lost / sum(target.numel() for target in targets)
