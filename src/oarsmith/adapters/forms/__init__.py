"""Forms in which frozen weights are kept: as they are, or in fewer bits.

A form makes a tuple of tensors of a weight W [O, I], computes x W^T and dy W with them, and gives W back as far as it
is kept.
"""

from oarsmith.adapters.forms.form import DENSE, Parts, WeightForm
from oarsmith.adapters.forms.int8_rows import INT8_ROWS
from oarsmith.adapters.forms.low_bit import AS_STORED, Blocks, Groups, Rows, Stored
from oarsmith.adapters.forms.product import low_rank_product, product

__all__ = [
    "AS_STORED",
    "DENSE",
    "INT8_ROWS",
    "Blocks",
    "Groups",
    "Parts",
    "Rows",
    "Stored",
    "WeightForm",
    "low_rank_product",
    "product",
]
