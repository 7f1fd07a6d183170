"""What no algorithm can work on, refused with its name.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.errors import ModelError


def check_finite(tensor: Tensor, what: str, where: str | None = None) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: naming how many there are.
    """
    # One sum is quick; only where it is not finite, which huge numbers do too, are they counted.
    if bool(torch.isfinite(tensor.sum())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ModelError(
            f"{what}: {bad} of {tensor.numel()} numbers are NaN or infinite, which nothing can be rounded to",
            where=where,
            fix="check the model in floats first (oarsmith eval); run calibration in bfloat16 or float32, not float16",
        )


def check_weight(weight_OI: Tensor, where: str | None = None) -> None:
    """Refuse what is no finite matrix of at least one column.

    Raises:
        ModelError: naming the shape or the numbers.
    """
    if weight_OI.dim() != 2 or weight_OI.shape[1] == 0:
        raise ModelError(
            f"a weight of shape {tuple(weight_OI.shape)} is no matrix [out, in] with columns",
            where=where,
            fix="give one matrix at a time, stacked experts one by one",
        )
    check_finite(weight_OI, "a weight", where)
