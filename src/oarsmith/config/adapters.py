"""Keys of adapters: which method, where it sits, and what the methods share. Those of single methods lie beside it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .adapter_factors import FactorKeys
from .adapter_lora import LoraFamilyKeys
from .adapter_lowbit import LowBitKeys, QatKeys
from .adapter_virtual import VirtualKeys
from .base import Bool, Float, Int, JobConfig, NamesOrPattern

AdapterType = Literal[
    "none",
    "lora",
    "dora",
    "pissa",
    "olora",
    "loraga",
    "lorapro",
    "moslora",
    "adalora",
    "mora",
    "vera",
    "lokr",
    "loha",
    "ia3",
    "fourierft",
    "oft",
    "boft",
    "bottleneck",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "reft",
    "bitfit",
    "trainable_tokens",
]


class SharedAdapterKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    lora: Bool = Field(
        False, description="Train small matrices beside the frozen weights instead of the weights: far less memory."
    )
    adapter_type: AdapterType | None = Field(
        None, description="The method of the adapter; see docs/adapters.md. Not given: lora with lora true, else none."
    )
    lora_rank: Int = Field(8, ge=1, description="Rank r of the matrices: more can be learned, more memory.")
    lora_alpha: Float | None = Field(
        None,
        gt=0,
        description="Scale: the update is multiplied by alpha/r. Not given: 2 r, 4 with rslora, r for pissa, "
        "olora, lokr and loha, 16 for loraga.",
    )
    lora_dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the adapter's matrices.")
    lora_target_modules: NamesOrPattern | None = Field(
        None,
        description="Which linear layers: all-linear (all but the head), names separated by commas, or a regular "
        "expression that matches a whole module name; embed_tokens and lm_head are embedding and head in every "
        "family. Not given: all-linear; ia3 and bottleneck have their own.",
    )
    rslora: Bool = Field(False, description="Scale by alpha/sqrt(r) instead (rank-stabilised LoRA), for high ranks.")


class AdapterKeys(SharedAdapterKeys, LowBitKeys, QatKeys, LoraFamilyKeys, FactorKeys, VirtualKeys):
    """All of them, for commands that train."""

    title: ClassVar[str] = "Adapters"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter trains, and not the model."""
        return self.adapter_type not in (None, "none")
