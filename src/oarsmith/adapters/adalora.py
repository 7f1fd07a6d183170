"""AdaLoRA (Zhang et al. 2023): an update P diag(e) Q whose singular values compete for a budget of ranks.

Shapes: I in features, O out features, r rank of this projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.change import Change, LowRank, Sitting, Size, Weight
from oarsmith.adapters.lora import alpha_of, check_lora
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.decoder import Decoder

# As in the authors' code and PEFT.
_EPS, _STD = 1e-5, 0.02


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """How many ranks there are at a step (section 3.3 of the paper): all of them up to step ``tinit``, the target's
    from step ``total - tfinal`` on, between them a cubic fall, with an allocation every ``delta_t`` steps.

    ``beta1`` and ``beta2``: decay of the averages of sensitivity and of its uncertainty.
    """

    total: int
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def budget(self, step: int, first: int, target: int) -> tuple[int, bool]:
        """Ranks of all projections together at a step before the last allocation, and whether to allocate there."""
        if step <= self.tinit:
            return first, False
        left = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int((first - target) * left**3 + target), step % self.delta_t == 0


@dataclass(frozen=True, kw_only=True)
class AdaLora(LowRank):
    """W + alpha / (r0 + 1e-5) * B diag(E) A, r0 the rank that all projections begin with (PEFT's ``init_r``).

    A [r, I] and B [O, r] are kept nearly orthonormal by a term of the loss, E [r, 1] is zero at first. Singular values
    that are given up stay in place as zeros, so experts of a layer keep one shape, and a run goes on exactly; PEFT's
    files may lack their rows.

    Attributes:
        rank: of the projection. ``first``: r0. ``target``: the mean that is left at the end.
        orth_weight: of the orthogonality term.
        with_ranknum: the file has r0 as a tensor too, as older versions of PEFT wrote it.
    """

    keys: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_E": "lora_E",
        "ranknum": "ranknum",
    }
    frozen: ClassVar[frozenset[str]] = frozenset({"ranknum"})

    rank: int
    alpha: float
    first: int
    target: int
    orth_weight: float = 0.5
    with_ranknum: bool = False
    schedule: RankSchedule = field(default_factory=lambda: RankSchedule(total=1))

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        shapes = {"lora_A": (self.rank, size.in_features), "lora_B": (size.out_features, self.rank)}
        return {**shapes, "lora_E": (self.rank, 1), "ranknum": (1,)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        for name in ("lora_A", "lora_B"):
            on[name].copy_(torch.empty(on[name].shape).normal_(std=_STD, generator=generator))
        on["lora_E"].zero_()
        on["ranknum"].fill_(self.first)

    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        return on["lora_A"] * on["lora_E"], on["lora_B"] * (self.alpha / (on["ranknum"] + _EPS))

    def stored(self, on: Sitting) -> dict[str, Tensor]:
        return {ending: on[name] for name, ending in self.keys.items() if self.with_ranknum or name != "ranknum"}

    def restore(self, on: Sitting, found: Mapping[str, Tensor]) -> None:
        for name in ("lora_A", "lora_B", "lora_E"):
            on[name].copy_(found[self.keys[name]])
        on["ranknum"].copy_(found.get("ranknum", torch.full((1,), float(self.first))))

    def peft_config(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "peft_type": "ADALORA",
            "init_r": self.first,
            "target_r": self.target,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "init_lora_weights": True,
            "orth_reg_weight": self.orth_weight,
            "total_step": schedule.total,
            "tinit": schedule.tinit,
            "tfinal": schedule.tfinal,
            "deltaT": schedule.delta_t,
            "beta1": schedule.beta1,
            "beta2": schedule.beta2,
        }

    @classmethod
    def peft_configs(cls, changes: Mapping[str, Change]) -> dict[str, Any]:
        """Where a file lacked rows, PEFT's pattern of those that are left."""
        first = next(iter(changes.values()))
        patterns = {}
        for name, change in changes.items():
            assert isinstance(change, AdaLora), change
            patterns[f"{name}.lora_E"] = [index < change.rank for index in range(change.first)]
        whole = all(all(pattern) for pattern in patterns.values())
        return {**first.peft_config(), "rank_pattern": None if whole else patterns}


def make_adalora(keys: AdapterKeys) -> AdaLora:
    """AdaLoRA as a configuration asks for it; the schedule waits for the run's length (:func:`set_schedule`).

    Raises:
        ConfigError: it would end with more ranks than it begins with.
    """
    first = first_rank(keys)
    if first < keys.lora_rank:
        raise ConfigError(
            f"adalora begins with rank {first} and would end with {keys.lora_rank}",
            where="adalora_init_rank",
            fix="raise it above lora_rank",
        )
    return AdaLora(
        rank=first,
        alpha=alpha_of(keys),
        first=first,
        target=keys.lora_rank,
        dropout=keys.lora_dropout,
        orth_weight=keys.adalora_orth_weight,
    )


def first_rank(keys: AdapterKeys) -> int:
    """adalora_init_rank, or half as much again as the target."""
    return keys.adalora_init_rank or (3 * keys.lora_rank + 1) // 2


def set_schedule(model: Decoder, keys: AdapterKeys, total: int) -> RankSchedule:
    """Tell a model's adapters how long the run is, for their files; the schedule of their ranks.

    Raises:
        ConfigError: no step is left to give ranks up.
    """
    schedule = RankSchedule(
        total=total,
        tinit=total // 10 if keys.adalora_tinit is None else keys.adalora_tinit,
        tfinal=total // 3 if keys.adalora_tfinal is None else keys.adalora_tfinal,
        delta_t=keys.adalora_delta_t,
        beta1=keys.adalora_beta1,
        beta2=keys.adalora_beta2,
    )
    if schedule.tinit >= total - schedule.tfinal:
        raise ConfigError(
            f"adalora gives ranks up between step {schedule.tinit} (adalora_tinit) and the last {schedule.tfinal} "
            f"(adalora_tfinal) of {total}: no step is between them",
            where="adalora_tfinal",
            fix="lower them, or train longer",
        )
    for _, module in adapted_maps(model):
        for segment, change in module.changes.items():
            if isinstance(change, AdaLora):
                module.changes[segment] = replace(change, schedule=schedule)
    return schedule


def read_adalora(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> AdaLora:
    """AdaLoRA on a projection, from PEFT's file; ranks that were given up may be missing there, or all of them."""
    check_lora(config)
    config.refuse("use_dora")
    shape = shapes.get("lora_E")
    if shape is None or len(shape) != 2 or shape[1] != 1:
        raise CheckpointError(f"{module} has no lora_E [rank, 1]", where=config.where)
    first = config.whole("init_r", 12)  # PEFT's defaults
    alpha = config.for_module("lora_alpha", "alpha_pattern", module, 8.0)
    schedule = RankSchedule(
        total=config.whole("total_step", 1),
        tinit=config.whole("tinit", 0, least=0),
        tfinal=config.whole("tfinal", 0, least=0),
        delta_t=config.whole("deltaT", 1),
        beta1=config.number("beta1", 0.85),
        beta2=config.number("beta2", 0.85),
    )
    return AdaLora(
        rank=shape[0],
        alpha=alpha if alpha > 0 else float(first),
        first=first,
        target=config.whole("target_r", 8),
        dropout=config.share("lora_dropout"),
        orth_weight=config.number("orth_reg_weight", 0.5),
        with_ranknum="ranknum" in shapes,
        schedule=schedule,
    )
