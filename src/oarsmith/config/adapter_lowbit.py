"""Keys of the form in which frozen weights under an adapter are kept."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Int, JobConfig

WeightQuantizeAlgo = Literal["none", "nf4", "fp4", "weight_only_int8", "weight_only_int4", "a8w8linear", "as_stored"]
IN_BLOCKS = frozenset({"nf4", "fp4", "weight_only_int4"})
WITH_ABSMAX = frozenset({"nf4", "fp4"})


class LowBitKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    weight_quantize_algo: WeightQuantizeAlgo = Field(
        "none",
        description="How frozen weights under an adapter are kept. nf4, fp4: 4 bits in blocks (QLoRA). "
        "weight_only_int4: 4 bits in groups, asymmetric. weight_only_int8: 8 bits, a scale a row. a8w8linear: 8 bits, "
        "multiplied in 8 bits in both passes, faster on CPUs with VNNI. as_stored: the codes of a quantized "
        "checkpoint, where it has them.",
    )
    weight_blocksize: Int = Field(
        64, ge=2, le=4096, multiple_of=2, description="Numbers that share a scale, in nf4, fp4 and weight_only_int4."
    )
    weight_double_quant: Bool = Field(
        False, description="Keep the scales of nf4 and fp4 in 8 bits: 4.127 bits a weight instead of 4.5."
    )
    weight_double_quant_block_size: Int = Field(
        256, ge=2, le=65_536, description="Scales that share a scale of their own with weight_double_quant."
    )


class QatKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    qat: Literal["none", "w8a16", "w4a16", "w3a16", "w8a8", "w4a8", "fp8"] = Field(
        "none",
        description="Train for quantization: every map of the layers computes what it will be after 'oarsmith "
        "merge-adapter' and 'oarsmith quantize --algorithm rtn' with this scheme. Gradients pass straight through the "
        "rounding.",
    )
    qat_group_size: Int | None = Field(
        None, ge=-1, description="qat: columns that share a scale; -1: a row. Not given: as 'oarsmith quantize'."
    )
