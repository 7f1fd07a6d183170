"""LoRA: W + scale * B A on chosen projections (Hu et al. 2021); rsLoRA's scale (Kalajdzievski 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, LowRank, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError

LORA_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_A, _B = "lora_embedding_A", "lora_embedding_B"


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True, kw_only=True)
class Lora(LowRank):
    """A [r, I] and B [O, r], which is zero at first; alpha scales their product."""

    keys: ClassVar[Mapping[str, str]] = LORA_KEYS
    table_keys: ClassVar[Mapping[str, str]] = {_A: LORA_KEYS["lora_A"], _B: LORA_KEYS["lora_B"]}

    rank: int
    alpha: float
    rslora: bool = False
    gaussian: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora)

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (self.rank, size.in_features), "lora_B": (size.out_features, self.rank)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        """A from U(-1/sqrt(I), 1/sqrt(I)), as in the paper's code, or PEFT's N(0, 1/r^2)."""
        bound = 1 / math.sqrt(on.size.in_features)
        # Drawn on the CPU: the same seed gives the same adapter on any device.
        drawn = torch.empty(on["lora_A"].shape)
        if self.gaussian:
            drawn.normal_(std=1 / self.rank, generator=generator)
        else:
            drawn.uniform_(-bound, bound, generator=generator)
        on["lora_A"].copy_(drawn)
        on["lora_B"].zero_()

    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        return on["lora_A"], on["lora_B"] * self.scale

    def on_table(self) -> Change | None:
        # What LoRA's relatives do beside is made for projections.
        if type(self) is not Lora:
            return None
        return TableLora(rank=self.rank, alpha=self.alpha, rslora=self.rslora, dropout=self.dropout)

    def peft_config(self) -> dict[str, Any]:
        """Its part of ``adapter_config.json``."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": True,
        }


@dataclass(frozen=True, kw_only=True)
class TableLora(Lora):
    """The same on the embedding: A [r, V] is looked up, so it is A that is zero at first, and B [E, r] normal, as in
    PEFT and the paper's code. Nothing is dropped there."""

    keys: ClassVar[Mapping[str, str]] = {_A: _A, _B: _B}

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {_A: (self.rank, size.in_features), _B: (size.out_features, self.rank)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        # Drawn on the CPU: the same seed gives the same adapter on any device.
        on[_A].zero_()
        on[_B].copy_(torch.empty(on[_B].shape).normal_(generator=generator))

    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        return on[_A], on[_B] * self.scale


def make_lora(keys: AdapterKeys) -> Lora:
    """LoRA as a configuration asks for it."""
    return Lora(
        rank=keys.lora_rank,
        alpha=alpha_of(keys),
        rslora=keys.rslora,
        gaussian=keys.lora_start == "gaussian",
        dropout=keys.lora_dropout,
    )


def alpha_of(keys: AdapterKeys) -> float:
    """lora_alpha, or twice the rank."""
    return keys.lora_alpha or 2.0 * keys.lora_rank


# Options that change the arithmetic and are none of ours.
_NOT_COMPUTED = (
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# The other initialisations (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights too: such an adapter
# fits only that changed base, and PEFT writes True here once it has been converted to the original one.
_KEEP_BASE = (None, True, False, "gaussian", "orthogonal", "eva")


def check_options(config: PeftConfig) -> None:
    """Refuse options of the LoRA family's files that this version does not compute.

    Raises:
        CheckpointError: such an option is used.
    """
    config.refuse(*_NOT_COMPUTED)


def check_lora(config: PeftConfig) -> None:
    """The same, and adapters that fit a changed base only.

    Raises:
        CheckpointError: such an option is used.
    """
    check_options(config)
    start = config.values.get("init_lora_weights")
    if start not in _KEEP_BASE:
        raise CheckpointError(
            f"init_lora_weights {start!r} has changed the base model's weights too",
            where=config.where,
            fix="convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def read_rank(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The rank is what the file's A [r, I] has: patterns need not be followed."""
    shape = shapes.get(LORA_KEYS["lora_A"])
    if shape is None:
        raise CheckpointError(f"{module} has no {LORA_KEYS['lora_A']}", where=config.where)
    if len(shape) != 2 or shape[0] == 0:
        raise CheckpointError(f"{module} has a lora_A of shape {shape}, not [rank, in]", where=config.where)
    return shape[0]


def read_lora(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """LoRA on a projection, from PEFT's file."""
    check_lora(config)
    return Lora(
        rank=read_rank(config, module, shapes),
        alpha=config.for_module("lora_alpha", "alpha_pattern", module, 8.0),  # PEFT's default
        rslora=config.flag("use_rslora"),
        dropout=config.share("lora_dropout"),
    )
