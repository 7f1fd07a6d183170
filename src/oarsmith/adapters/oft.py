"""OFT: the input of a projection is turned by orthogonal blocks (Qiu et al. 2023, 2025: OFTv2's form).

W (x R) + b with R block-diagonal, each block the Cayley transform (I - Q)(I + Q)^-1 of a skew-symmetric Q, whose upper
triangle trains; as in PEFT it is a series of a few terms (Cayley-Neumann), or with ``exact`` the inverse. Constrained
OFT (``coft``) keeps Q within a ball: like PEFT, the stored triangle is moved there before it is used.

Shapes: T tokens, I in features, O out features, N blocks of side S, E entries of a triangle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.tables import table
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError


def nearest_divisor(number: int, wanted: int) -> int:
    """PEFT's: the divisor nearest to what is wanted, of two as near the lower one."""
    if wanted >= number:
        return number
    higher = next(each for each in range(wanted, number + 1) if number % each == 0)
    lower = next(each for each in range(wanted, 0, -1) if number % each == 0)
    return lower if wanted - lower <= higher - wanted else higher


@table
def _triangle(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows_E, columns_E = torch.triu_indices(side, side, 1).unbind()
    return rows_E.to(device), columns_E.to(device)


def cayley(skew_NSS: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 of each."""
    eye_SS = torch.eye(skew_NSS.shape[-1], device=skew_NSS.device, dtype=skew_NSS.dtype)
    turned: Tensor = torch.linalg.solve(eye_SS + skew_NSS, eye_SS - skew_NSS, left=False)
    return turned


def cayley_neumann(skew_NSS: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), where PEFT gives the last power its factor of 1 from Q^3 on."""
    eye_SS = torch.eye(skew_NSS.shape[-1], device=skew_NSS.device, dtype=skew_NSS.dtype)
    found_NSS = eye_SS + 2 * skew_NSS
    if terms == 2:
        return found_NSS
    power_NSS = skew_NSS @ skew_NSS
    found_NSS = found_NSS + 2 * power_NSS
    for _ in range(3, terms - 1):
        power_NSS = power_NSS @ skew_NSS
        found_NSS = found_NSS + 2 * power_NSS
    return found_NSS + power_NSS @ skew_NSS


@dataclass(frozen=True, kw_only=True)
class Oft(Change):
    """The triangles [N, E], zero at first.

    Attributes:
        block_size: side of the blocks; where it does not divide a projection's width, the nearest side that does.
        blocks: their number instead, in the same way. One of the two is 0.
        terms: of the series; None: the exact transform.
        within: the radius that constrains Q; None: nothing does.
        shared_block: one block turns all parts.
    """

    keys: ClassVar[Mapping[str, str]] = {"oft_R": "oft_R.weight"}
    turns_input: ClassVar[bool] = True

    block_size: int = 32
    blocks: int = 0
    terms: int | None = 5
    within: float | None = None
    shared_block: bool = False

    def side(self, size: Size) -> int:
        """S on a projection."""
        if self.blocks:
            return size.in_features // nearest_divisor(size.in_features, self.blocks)
        return nearest_divisor(size.in_features, self.block_size)

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        side = self.side(size)
        return {"oft_R": (1 if self.shared_block else size.in_features // side, side * (side - 1) // 2)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["oft_R"].zero_()

    def _allowed(self, vector_NE: Tensor) -> Tensor:
        """The triangles within the ball: each Q has the norm of its share."""
        if self.within is None:
            return vector_NE
        radius = self.within / math.sqrt(len(vector_NE))
        norm_N1 = vector_NE.norm(dim=1, keepdim=True) * math.sqrt(2)
        return torch.where(norm_N1 <= radius, vector_NE, vector_NE * (radius / norm_N1))

    def _blocks(self, vector_NE: Tensor, side: int) -> Tensor:
        rows_E, columns_E = _triangle(side, vector_NE.device)
        upper_NSS = vector_NE.new_zeros(len(vector_NE), side, side)
        upper_NSS[:, rows_E, columns_E] = vector_NE
        skew_NSS = upper_NSS - upper_NSS.transpose(-1, -2)
        return cayley(skew_NSS) if self.terms is None else cayley_neumann(skew_NSS, self.terms)

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        if self.within is not None:
            # Gradients are those at the point within, and the next update begins there.
            with torch.no_grad():
                on["oft_R"].copy_(self._allowed(on["oft_R"]))
        side = self.side(on.size)
        blocks_NSS = self._blocks(on["oft_R"], side).to(x_TI.dtype)
        return times_blocks(x_TI.unflatten(-1, (-1, side)), blocks_NSS).flatten(-2)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        side = self.side(on.size)
        blocks_NSS = self._blocks(self._allowed(on["oft_R"]), side)
        return times_blocks(weight_OI.unflatten(-1, (-1, side)), blocks_NSS.transpose(-1, -2)).flatten(-2)

    def stored(self, on: Sitting) -> dict[str, Tensor]:
        return {"oft_R.weight": on["oft_R"] if self.within is None else self._allowed(on["oft_R"])}

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "OFT",
            # PEFT refuses series that versions before this one have computed.
            "peft_version": "0.18.0",
            "r": self.blocks,
            "oft_block_size": 0 if self.blocks else self.block_size,
            "coft": self.within is not None,
            "eps": 6e-5 if self.within is None else self.within,
            "block_share": self.shared_block,
            "use_cayley_neumann": self.terms is not None,
            "num_cayley_neumann_terms": self.terms or 5,
            "bias": "none",
        }


def times_blocks(x_TNS: Tensor, blocks_NSS: Tensor) -> Tensor:
    """x R block by block, or with one block for all parts."""
    if len(blocks_NSS) == 1:
        return x_TNS @ blocks_NSS[0]
    return torch.einsum("...ns,nsc->...nc", x_TNS, blocks_NSS)


def make_oft(keys: AdapterKeys) -> Oft:
    """OFT as a configuration asks for it."""
    return Oft(
        block_size=0 if keys.oft_blocks else keys.oft_block_size,
        blocks=keys.oft_blocks or 0,
        terms=None if keys.oft_exact else keys.oft_neumann_terms,
        within=keys.oft_eps if keys.oft_constrained else None,
        shared_block=keys.oft_block_share,
    )


def read_oft(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Oft:
    """OFT on a projection, from PEFT's file (which has other versions' files that mean something else)."""
    config.refuse("modules_to_save")
    terms = None
    if config.flag("use_cayley_neumann", True):
        terms = config.whole("num_cayley_neumann_terms", 5, least=2)
        version = str(config.values.get("peft_version") or "0.0").split(".")
        if [int(part) if part.isdigit() else 0 for part in version[:2]] < [0, 18]:
            raise CheckpointError(
                "OFT with use_cayley_neumann of PEFT before 0.18 was another series", where=config.where
            )
    blocks, side = config.whole("r", 0, least=0), config.whole("oft_block_size", 0, least=0)
    if (blocks == 0) == (side == 0):
        raise CheckpointError(
            f"r is {blocks} and oft_block_size {side}: one of them says the size of the blocks (files of PEFT before "
            "0.14 have another form)",
            where=config.where,
        )
    within = config.number("eps", 6e-5) if config.flag("coft") else None
    return Oft(block_size=side, blocks=blocks, terms=terms, within=within, shared_block=config.flag("block_share"))
