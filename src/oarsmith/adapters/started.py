"""Low-rank updates that start from parts of W: PiSSA (Meng et al. 2024) and OLoRA (Bueyuekakyuez 2024).

Both papers take scale * B0 A0 out of W, so that the model begins as it was. Here W never changes: the adapted
projection is W + scale (B A - B0 A0), with A0 and B0 kept. On disk that is LoRA of twice the rank on the untouched
base, as PEFT converts such adapters (A over A0, B beside -B0).

Shapes: I in features, O out features, r rank.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import LowRank, Sitting, Size, Weight
from oarsmith.adapters.lora import LORA_KEYS, check_options, lora_scale, read_rank
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError

_A, _B = LORA_KEYS["lora_A"], LORA_KEYS["lora_B"]


@dataclass(frozen=True, kw_only=True)
class Started(LowRank):
    """W + scale (B A - B0 A0).

    Attributes:
        raw: files hold A and B alone, and A0 and B0 are made of W anew, as PEFT does with adapters that have not been
            converted.
    """

    keys: ClassVar[Mapping[str, str]] = LORA_KEYS
    frozen: ClassVar[frozenset[str]] = frozenset({"start_A", "start_B"})
    name: ClassVar[str]

    rank: int
    alpha: float
    rslora: bool = False
    raw: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora)

    @property
    def made_of_weight(self) -> bool:
        return self.raw

    @abstractmethod
    def start(self, weight_OI: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A0 [r, I] and B0 [O, r]."""

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        if self.rank > min(size.out_features, size.in_features):
            raise ConfigError(
                f"{self.name} with rank {self.rank} on a projection of {size.in_features} to {size.out_features} "
                "features, which has no more singular vectors than the smaller of them",
                where="lora_rank",
                fix="lower it, or leave such projections out of lora_target_modules",
            )
        a, b = (self.rank, size.in_features), (size.out_features, self.rank)
        return {"lora_A": a, "lora_B": b, "start_A": a, "start_B": b}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        self.begin(on, *self.start(weight(), generator))

    def begin(self, on: Sitting, a_rI: Tensor, b_Or: Tensor) -> None:
        """Take these for A0 and B0, and go out from them."""
        for name in ("lora_A", "start_A"):
            on[name].copy_(a_rI)
        for name in ("lora_B", "start_B"):
            on[name].copy_(b_Or)

    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        """Of B A - B0 A0 = (B - B0) A + B0 (A - A0): nothing at first, whatever the rounding, and small differences are
        not lost where A and B are rounded to 16 bits."""
        a, b, a0, b0 = (on[name] for name in ("lora_A", "lora_B", "start_A", "start_B"))
        return torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1) * self.scale

    def stored(self, on: Sitting) -> dict[str, Tensor]:
        if self.raw:
            return {_A: on["lora_A"], _B: on["lora_B"]}
        return {_A: torch.cat([on["lora_A"], on["start_A"]]), _B: torch.cat([on["lora_B"], -on["start_B"]], 1)}

    def restore(self, on: Sitting, found: Mapping[str, Tensor]) -> None:
        a, b = found[_A], found[_B]
        on["lora_A"].copy_(a[: self.rank])
        on["lora_B"].copy_(b[:, : self.rank])
        if not self.raw:
            on["start_A"].copy_(a[self.rank :])
            on["start_B"].copy_(-b[:, self.rank :])

    def peft_config(self) -> dict[str, Any]:
        """That of LoRA with twice the rank and the same scale; raw: the method's own."""
        twice = 1 if self.raw else 2
        return {
            "peft_type": "LORA",
            "r": twice * self.rank,
            "lora_alpha": (math.sqrt(twice) if self.rslora else twice) * self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": self._initialisation() if self.raw else True,
        }

    def _initialisation(self) -> str:
        """PEFT's word for it."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class Pissa(Started):
    """The r largest singular values of W = U S V^T: A0 = sqrt(S_r / scale) V_r^T and B0 = U_r sqrt(S_r / scale).

    ``niter``: by subspace iteration with so many rounds (Halko et al. 2011), which is much faster than all of the
    singular values; None: exactly.
    """

    name: ClassVar[str] = "pissa"

    niter: int | None = None

    def start(self, weight_OI: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.niter is None:
            u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
        else:
            u, s, vh = leading(weight_OI, self.rank, self.niter, generator)
        root_r = (s[: self.rank] / self.scale).sqrt()
        return root_r[:, None] * vh[: self.rank], u[:, : self.rank] * root_r

    def _initialisation(self) -> str:
        return self.name if self.niter is None else f"{self.name}_niter_{self.niter}"


@dataclass(frozen=True, kw_only=True)
class Olora(Started):
    """The first r columns and rows of W = Q R: B0 = Q_r, A0 = R_r."""

    name: ClassVar[str] = "olora"

    def start(self, weight_OI: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight_OI)
        return r[: self.rank], q[:, : self.rank]


def leading(matrix_OI: Tensor, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of about the ``rank`` largest singular values: algorithm 5.1 over 4.4 of Halko et al."""
    # Drawn on the CPU: the same seed gives the same numbers on any device.
    drawn = torch.randn(matrix_OI.shape[1], rank, generator=generator).to(matrix_OI.device)
    q_Or = torch.linalg.qr(matrix_OI @ drawn).Q
    for _ in range(niter):
        q_Ir = torch.linalg.qr(matrix_OI.t() @ q_Or).Q
        q_Or = torch.linalg.qr(matrix_OI @ q_Ir).Q
    u, s, vh = torch.linalg.svd(q_Or.t() @ matrix_OI, full_matrices=False)
    return q_Or @ u, s, vh


def make_pissa(keys: AdapterKeys) -> Pissa:
    """PiSSA as a configuration asks for it. The paper has scale 1, which is the default."""
    return Pissa(
        rank=keys.lora_rank,
        alpha=keys.lora_alpha or keys.lora_rank,
        rslora=keys.rslora,
        dropout=keys.lora_dropout,
        niter=keys.pissa_niter,
    )


def make_olora(keys: AdapterKeys) -> Olora:
    """OLoRA as a configuration asks for it, by default with scale 1: what is taken out of W is a part of W."""
    return Olora(
        rank=keys.lora_rank, alpha=keys.lora_alpha or keys.lora_rank, rslora=keys.rslora, dropout=keys.lora_dropout
    )


def starts_with(word: str, config: PeftConfig) -> bool:
    """Whether a file's adapter was started this way, and not converted to LoRA."""
    return str(config.values.get("init_lora_weights")).startswith(word)


def read_pissa(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Pissa:
    """PiSSA on a projection, from a file of PEFT's that has not been converted.

    With ``pissa_niter`` A0 and B0 are as near to those of the training as the iteration comes, as in PEFT, which draws
    anew too.
    """
    word = str(config.values["init_lora_weights"])
    found = re.fullmatch(r"pissa(?:_niter_(\d{1,4}))?", word)
    if found is None:
        raise CheckpointError(f"init_lora_weights {word!r} is not pissa or pissa_niter_N", where=config.where)
    return Pissa(niter=int(found[1]) if found[1] else None, **_read_raw(config, module, shapes))


def read_olora(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Olora:
    """OLoRA on a projection, from a file of PEFT's that has not been converted."""
    return Olora(**_read_raw(config, module, shapes))


def _read_raw(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    check_options(config)
    return {
        "rank": read_rank(config, module, shapes),
        "alpha": config.for_module("lora_alpha", "alpha_pattern", module, 8.0),  # PEFT's default
        "rslora": config.flag("use_rslora"),
        "dropout": config.share("lora_dropout"),
        "raw": True,
    }
