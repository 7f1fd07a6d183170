"""Keys of methods with other factors of the update than LoRA."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, JobConfig, NamesOrPattern

# Methods whose update is not multiplied by alpha/r, those whose default makes it 1, and those with layers of their own.
WITHOUT_ALPHA = frozenset({"mora", "vera", "ia3", "fourierft", "oft", "boft", "bottleneck"})
ALPHA_IS_RANK = frozenset({"lokr", "loha"})
OWN_PLACES = frozenset({"ia3", "bottleneck"})


class FactorKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    vera_d_initial: Float = Field(0.1, gt=0, description="VeRA: what the vector between the two matrices begins with.")
    vera_prng_key: Int = Field(0, ge=0, lt=1 << 63, description="VeRA: the seed of the two frozen random matrices.")
    vera_save_projection: Bool = Field(
        True, description="VeRA: keep the two random matrices in the file. Off: they are made anew from the seed."
    )
    lokr_decompose_both: Bool = Field(
        False, description="LoKr: the small factor of the Kronecker product is of low rank too."
    )
    lokr_factor: Int | None = Field(
        None, ge=1, description="LoKr: side of the small factor. Not given: as near to a square root as divides."
    )
    ia3_feedforward_modules: NamesOrPattern | None = Field(
        None,
        description="IA3: which of the adapted layers scale what they are given; the others scale what they give. Not "
        "given: the last ones of the feed-forward parts.",
    )
    fourierft_frequencies: Int = Field(1000, ge=1, description="FourierFT: coefficients that train in each layer.")
    fourierft_scaling: Float = Field(150.0, gt=0, description="FourierFT: the update is multiplied by it.")
    fourierft_seed: Int = Field(777, ge=0, lt=1 << 63, description="FourierFT: the seed of the places of coefficients.")
    oft_block_size: Int = Field(
        32, ge=2, description="OFT: side of the blocks that turn the input; the divisor of a layer's width next to it."
    )
    oft_blocks: Int | None = Field(None, ge=1, description="OFT: the number of blocks instead of their size.")
    oft_block_share: Bool = Field(False, description="OFT: one block turns all parts of the input.")
    oft_constrained: Bool = Field(False, description="OFT: the blocks stay near those of no turn (COFT).")
    oft_eps: Float = Field(6e-5, gt=0, description="OFT: how near, with oft_constrained.")
    oft_exact: Bool = Field(False, description="OFT: orthogonal to rounding, by solving systems instead of a series.")
    oft_neumann_terms: Int = Field(5, ge=2, le=64, description="OFT: terms of the series without oft_exact.")
    boft_block_size: Int = Field(4, ge=2, description="BOFT: side of the blocks; it divides the width of every layer.")
    boft_blocks: Int | None = Field(None, ge=1, description="BOFT: the number of blocks instead of their size.")
    boft_factors: Int = Field(
        1, ge=1, le=32, description="BOFT: butterfly factors; each doubles the reach of a block and trains as much."
    )
    bottleneck_placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="Bottleneck: houlsby after attention and feed-forward parts, pfeiffer after the latter only, "
        "parallel beside their last layer. lora_rank is the width.",
    )
    bottleneck_activation: Literal["gelu", "relu", "silu", "tanh"] = Field(
        "gelu", description="Bottleneck: the nonlinearity in the middle."
    )
    bottleneck_scale: Float = Field(1.0, gt=0, description="Bottleneck: its output is multiplied by it.")
