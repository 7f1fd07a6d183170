"""BOFT: the input is turned by several sparse orthogonal matrices, and the output scaled (Liu et al. 2024).

s * (W (x R)) + b, where R is a product of butterfly factors: each is block-diagonal in an order of its own, in which
blocks of earlier factors meet (eq. 4 and 5). One factor is OFT with a scale. The blocks are exact Cayley transforms.
Everything is done by reordering the input, never with a matrix of I x I. As in PEFT, whose CPU version has one factor
only; ours has any number there too.

Shapes: T tokens, I in features, O out features, F factors, N blocks of side S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.oft import cayley, times_blocks
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.tables import table
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError


@table
def _order(width: int, side: int, factor: int, device: torch.device) -> Tensor:
    """The order in which the blocks of a factor lie side by side: half blocks, the even ones of each group first."""
    half, steps = side // 2, 2 << factor
    chosen = torch.cat([torch.arange(0, steps, 2), torch.arange(1, steps, 2)])
    return torch.arange(width).view(-1, steps, half)[:, chosen].flatten().to(device)


@dataclass(frozen=True, kw_only=True)
class Boft(Change):
    """The blocks before the transform [F, N, S, S], zero at first, and s [O, 1], one at first.

    Attributes:
        block_size: S. ``blocks``: N instead; one of the two is 0.
    """

    keys: ClassVar[Mapping[str, str]] = {"boft_R": "boft_R", "boft_s": "boft_s"}
    turns_input: ClassVar[bool] = True
    scales_output: ClassVar[bool] = True

    block_size: int = 4
    blocks: int = 0
    factors: int = 1

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        width, asked = size.in_features, self.blocks or self.block_size
        if width % asked:
            what = f"{self.blocks} blocks" if self.blocks else f"blocks of {self.block_size}"
            raise self._misfit(f"{what} do not divide {width} features")
        side = width // self.blocks if self.blocks else self.block_size
        if self.factors > 1 and (side % 2 or width % (side << (self.factors - 1))):
            raise self._misfit(
                f"{self.factors} butterfly factors need blocks of an even size, {1 << (self.factors - 1)} of which "
                f"side by side divide {width} features; {side} does not"
            )
        return {"boft_R": (self.factors, width // side, side, side), "boft_s": (size.out_features, 1)}

    def _misfit(self, what: str) -> ConfigError:
        where = "boft_blocks" if self.blocks else "boft_block_size"
        return ConfigError(what, where=where, fix="choose another size, or fewer projections (lora_target_modules)")

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["boft_R"].zero_()
        on["boft_s"].fill_(1.0)

    def _turned(self, on: Sitting, x_TI: Tensor, *, back: bool) -> Tensor:
        """x R, or x R^T."""
        raw_FNSS = on["boft_R"]
        factors, number, side, _ = raw_FNSS.shape
        skew_FNSS = (raw_FNSS - raw_FNSS.transpose(-1, -2)) / 2
        blocks_FNSS = cayley(skew_FNSS.flatten(0, 1)).unflatten(0, (factors, number)).to(x_TI.dtype)
        if back:
            blocks_FNSS = blocks_FNSS.transpose(-1, -2)
        for factor in range(factors) if back else reversed(range(factors)):
            # In the first factor's order everything stays where it is.
            order_I = _order(on.size.in_features, side, factor, x_TI.device) if factor else None
            if order_I is not None:
                x_TI = x_TI.index_select(-1, order_I.argsort())
            x_TI = times_blocks(x_TI.unflatten(-1, (number, side)), blocks_FNSS[factor]).flatten(-2)
            if order_I is not None:
                x_TI = x_TI.index_select(-1, order_I)
        return x_TI

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        return self._turned(on, x_TI, back=False)

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        scale_O = on["boft_s"].flatten()
        if bias_O is None:
            return (y_TO * scale_O).to(y_TO.dtype)
        return (y_TO * scale_O + bias_O * (1 - scale_O)).to(y_TO.dtype)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return self._turned(on, weight_OI, back=True) * on["boft_s"]

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "BOFT",
            "boft_block_size": 0 if self.blocks else self.block_size,
            "boft_block_num": self.blocks,
            "boft_n_butterfly_factor": self.factors,
            "bias": "none",
        }


def make_boft(keys: AdapterKeys) -> Boft:
    """BOFT as a configuration asks for it."""
    return Boft(
        block_size=0 if keys.boft_blocks else keys.boft_block_size,
        blocks=keys.boft_blocks or 0,
        factors=keys.boft_factors,
    )


def read_boft(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Boft:
    """BOFT on a projection, from PEFT's file, which tells the factors: without its CUDA kernel PEFT has one,
    whatever its config says."""
    config.refuse("modules_to_save")
    shape = shapes.get("boft_R", ())
    if len(shape) != 4 or 0 in shape:
        raise CheckpointError(f"{module} has a boft_R of shape {shape}, not 4 axes", where=config.where)
    blocks, side = config.whole("boft_block_num", 0, least=0), config.whole("boft_block_size", 0, least=0)
    if (blocks == 0) == (side == 0):
        raise CheckpointError(
            f"boft_block_num is {blocks} and boft_block_size {side}: one of them says the size", where=config.where
        )
    return Boft(block_size=side, blocks=blocks, factors=shape[0])
