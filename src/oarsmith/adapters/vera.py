"""VeRA: two frozen random matrices for all projections, and two vectors of each one's own (Kopiczko et al. 2024).

W + diag(b) B diag(d) A, eq. 2, with A and B as wide as the widest projection; the others use their first columns and
rows. As in PEFT they are made from a key (``projection_prng_key``) or read from the file that holds them, and exist
once in a model, whatever it has of layers.

PaddleNLP's VeRA is another thing: A and B of each layer's own, from the singular vectors of its weight, which is
replaced by the rest; alpha / r; d and b from 1; and its script trains B too. Its files become LoRA of the same rank
(``paddle_vera.py``).

Shapes: T tokens, I in features, O out features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys

Pair = tuple[Tensor, Tensor]


class Projection:
    """A [r, I] and B [O, r] of a model, fp32, and their copies where and as they are used.

    Args:
        widest: the largest I and O.
        key: seeds the generator that they are drawn with, unless they are given.
    """

    def __init__(self, rank: int, widest: Size, key: int) -> None:
        self._rank, self._widest, self._key = rank, widest, key
        self._copies: dict[tuple[torch.device, torch.dtype], Pair] = {}

    def pair(self, device: torch.device, dtype: torch.dtype) -> Pair:
        """A and B."""
        cpu = (torch.device("cpu"), torch.float32)
        if (device, dtype) not in self._copies:
            # Copies first made under inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                if not self._copies:
                    self._copies[cpu] = self._drawn()
                a_rI, b_Or = self._copies[cpu]
                self._copies[device, dtype] = a_rI.to(device, dtype), b_Or.to(device, dtype)
        return self._copies[device, dtype]

    def set(self, pair: Pair) -> None:
        """Let these be A and B."""
        self._copies = {(torch.device("cpu"), torch.float32): (pair[0].float(), pair[1].float())}

    def _drawn(self) -> Pair:
        """As PEFT draws them, whatever device is the default: uniform, with the variance of Kaiming."""
        generator = torch.Generator().manual_seed(self._key)
        shapes = ((self._rank, self._widest.in_features), (self._widest.out_features, self._rank))
        made = [torch.empty(shape, device="cpu") for shape in shapes]
        for tensor in made:
            bound = math.sqrt(6 / tensor.shape[1])
            tensor.uniform_(-bound, bound, generator=generator)
        return made[0], made[1]


@dataclass(frozen=True, kw_only=True)
class Vera(Change):
    """d [r], the same number at first, and b [O], which is zero at first.

    Attributes:
        projection: A and B, once it is known where the method sits.
    """

    keys: ClassVar[Mapping[str, str]] = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
    adds: ClassVar[bool] = True

    rank: int
    key: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0
    save_projection: bool = True
    projection: Projection | None = None

    def among(self, sizes: Sequence[Size]) -> Vera:
        widest = Size(max(size.out_features for size in sizes), max(size.in_features for size in sizes))
        return replace(self, projection=Projection(self.rank, widest, self.key))

    def _pair(self, size: Size, like: Tensor) -> Pair:
        assert self.projection is not None, "it has not been put on a model"
        a_rI, b_Or = self.projection.pair(like.device, like.dtype)
        return a_rI[:, : size.in_features], b_Or[: size.out_features]

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {"lambda_b": (size.out_features,), "lambda_d": (self.rank,)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["lambda_b"].zero_()
        on["lambda_d"].fill_(self.d_initial)

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        a_rI, b_Or = self._pair(on.size, x_TI)
        d_r, b_O = on["lambda_d"].to(x_TI.dtype), on["lambda_b"].to(x_TI.dtype)
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        return functional.linear(functional.linear(dropped_TI, a_rI) * d_r, b_Or) * b_O

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        a_rI, b_Or = self._pair(on.size, weight_OI)
        return weight_OI + (on["lambda_b"][:, None] * b_Or) @ (on["lambda_d"][:, None] * a_rI)

    def shared(self) -> dict[str, Tensor]:
        if not self.save_projection:
            return {}
        assert self.projection is not None, "it has not been put on a model"
        a_rI, b_Or = self.projection.pair(torch.device("cpu"), torch.float32)
        return {"vera_A": a_rI, "vera_B": b_Or}

    def restore_shared(self, found: Mapping[str, Tensor]) -> None:
        if found and self.projection is not None:
            self.projection.set((found["vera_A"], found["vera_B"]))

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": self.rank,
            "projection_prng_key": self.key,
            "save_projection": self.save_projection,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "bias": "none",
        }


def make_vera(keys: AdapterKeys) -> Vera:
    """VeRA as a configuration asks for it."""
    return Vera(
        rank=keys.lora_rank,
        key=keys.vera_prng_key,
        d_initial=keys.vera_d_initial,
        dropout=keys.lora_dropout,
        save_projection=keys.vera_save_projection,
    )


def read_vera(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Vera:
    """VeRA on a projection, from PEFT's file."""
    config.refuse("modules_to_save")
    return Vera(
        rank=config.whole("r", 256),
        key=config.whole("projection_prng_key", 0, least=0),
        d_initial=config.number("d_initial", 0.1),
        dropout=config.share("vera_dropout"),
        save_projection=config.flag("save_projection", True),
    )
