"""How what flows through a model is rounded while it runs: inputs of maps, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How a map's inputs are rounded while the model runs.

    Attributes:
        code: int8 or E4M3.
        static: one scale found in calibration, for the whole tensor; else a scale for each token as it comes.
        group: columns of a token that share a scale (FP8 blocks); None: all of them.
    """

    code: Literal["int", "e4m3"] = "int"
    static: bool = False
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """How keys and values are kept, with static scales: one for a tensor, or one for each head."""

    code: Literal["int", "e4m3"] = "int"
    per_head: bool = True
