"""The head of scores that a reward model trains with its adapter, in the adapter's file (PEFT's ``modules_to_save``).

It trains in place, in fp32. PEFT's name for such adapters is the task SEQ_CLS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from oarsmith.adapters.part import AdapterPart
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError
from oarsmith.models.families import Family, scoring
from oarsmith.models.families.naming import SCORE
from oarsmith.models.init import fresh_scores
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

# PEFT's wrapper of projections is one level more than its prompts have.
_NAME, _BESIDE_PROMPTS = f"base_model.model.{SCORE}", f"base_model.{SCORE}"
_PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """The head of a scoring model.

    Args:
        new: the base has none; else training goes on from the base's.
        name: in an adapter's file.
    """

    new: bool
    name: str

    what: ClassVar[str] = "a trained head of scores"
    num_virtual: ClassVar[int] = 0
    prefixes: ClassVar[bool] = True

    def build(self, spec: DecoderSpec) -> Score:
        return Score(self)


class Score(AdapterPart):
    """Has no parameters of its own."""

    what = ScoreSpec.what

    def __init__(self, spec: ScoreSpec) -> None:
        super().__init__()
        self.spec = spec

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        assert model.head.weight is not None, "a head of scores is never tied"
        weight = model.head.weight.detach()
        values = fresh_scores(model.spec, weight.shape, generator) if self.spec.new else weight
        model.head.weight = nn.Parameter(values.to(weight.device, torch.float32, copy=True))

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        assert model.head.weight is not None, "a head of scores is never tied"
        return {self.spec.name: model.head.weight.data}

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        self.stored(model)[self.spec.name].copy_(found[self.spec.name])

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        return {"task_type": "SEQ_CLS", "modules_to_save": [SCORE.removesuffix(".weight")]}

    def merge(self, model: Decoder) -> None:
        """It is the model's already; a plain model has one number format."""
        assert model.head.weight is not None, "a head of scores is never tied"
        model.head.weight = nn.Parameter(model.head.weight.detach().to(model.embedding.weight.dtype))


def make_score(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> ScoreSpec:
    """The head of a model that training makes of a base."""
    name = _BESIDE_PROMPTS if keys.adapter_type in _PROMPTS else _NAME
    return ScoreSpec(new=scoring.num_scores(read_config(base)) is None, name=name)


def scores_in(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many scores the head in an adapter's file gives; None: there is none in it."""
    shape = next((shapes[name] for name in (_NAME, _BESIDE_PROMPTS) if name in shapes), None)
    return None if shape is None else shape[0] if len(shape) == 2 else 0


def read_score(
    config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec
) -> ScoreSpec:
    """The head from a file.

    Raises:
        CheckpointError: the model has none.
    """
    if spec.head.num_scores is None:
        what = "the adapter is a reward model's, with a head of scores"
        raise CheckpointError(what, where=config.where, fix="load it by a path of its own, as a reward model")
    return ScoreSpec(new=True, name=_NAME if _NAME in shapes else _BESIDE_PROMPTS)
