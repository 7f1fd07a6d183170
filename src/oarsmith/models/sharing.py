"""Which models can compute the beginning that several documents share once for all of them."""

from __future__ import annotations

from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_position import DynamicScaling, LongScaling, Rope, SteppedScaling, TwoRowRope


def shares_beginnings(spec: DecoderSpec) -> bool:
    """Whether a token's states follow from those before it alone: not so where rotations or groups follow the length
    that its document has in the end, or an adapter's part treats tokens by their place in their document."""
    rules = {layer.attention.position for layer in spec.layers}
    ropes = [rule.rope if isinstance(rule, TwoRowRope) else rule for rule in rules]
    lengthy = (DynamicScaling, LongScaling, SteppedScaling)
    if spec.parts:
        return False
    return not any(isinstance(r, Rope) and isinstance(r.scaling, lengthy) for r in ropes)
