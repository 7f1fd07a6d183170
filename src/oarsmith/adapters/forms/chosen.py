"""From configuration keys to the form of frozen weights."""

from __future__ import annotations

from oarsmith.adapters.forms.form import DENSE, WeightForm
from oarsmith.adapters.forms.int8_rows import INT8_ROWS
from oarsmith.adapters.forms.low_bit import AS_STORED, Blocks, Groups, Rows
from oarsmith.config.adapter_lowbit import LowBitKeys
from oarsmith.kernels.coded import FP4, NF4


def chosen_form(keys: LowBitKeys) -> WeightForm:
    """The form that ``weight_quantize_algo`` and its keys ask for."""
    match keys.weight_quantize_algo:
        case "none":
            return DENSE
        case "nf4" | "fp4" as name:
            nested = keys.weight_double_quant_block_size if keys.weight_double_quant else None
            return Blocks(code=NF4 if name == "nf4" else FP4, block=keys.weight_blocksize, nested=nested)
        case "weight_only_int4":
            return Groups(group=keys.weight_blocksize)
        case "weight_only_int8":
            return Rows()
        case "a8w8linear":
            return INT8_ROWS
        case "as_stored":
            return AS_STORED
