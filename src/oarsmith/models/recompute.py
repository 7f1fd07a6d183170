"""What the backward pass computes again instead of keeping (Chen et al. 2016; Korthikanti et al. 2022, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oarsmith.errors import ModelError

Granularity = Literal["full", "full_attn", "core_attn"]


@dataclass(frozen=True)
class Recompute:
    """The numbers stay the same: what runs twice draws the same random numbers both times.

    Args:
        granularity: ``full``: whole blocks, of which the input alone is kept. ``full_attn``: the attention part of a
            block with its norms and projections. ``core_attn``: rotation, scores, softmax and their product with the
            values; q, k and v are kept as they come from the projections.
        skip_layers: blocks, counted from 0, that keep everything.
    """

    granularity: Granularity = "full"
    skip_layers: frozenset[int] = frozenset()

    def require(self, num_layers: int) -> None:
        """Refuse layers that a model of ``num_layers`` does not have.

        Raises:
            ModelError: names them.
        """
        strangers = sorted(layer for layer in self.skip_layers if not 0 <= layer < num_layers)
        if strangers:
            raise ModelError(
                f"layers {strangers} do not exist: the model has {num_layers}",
                where="no_recompute_layers",
                fix=f"count from 0 to {num_layers - 1}",
            )

    def of_layer(self, layer: int) -> Granularity | None:
        """What a block computes again."""
        return None if layer in self.skip_layers else self.granularity


def run(function: Callable[..., Tensor], *inputs: object, again: bool) -> Tensor:
    """``function(*inputs)``; with ``again`` only the inputs are kept, and it runs a second time in backward."""
    if again:
        return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False))
    return function(*inputs)
