"""What a family's rules mean for a cache of its keys and values: one place, decided from the spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oarsmith.models.spec import DecoderSpec, PrefixLM, ResetAfter
from oarsmith.models.spec_parts import LFA
from oarsmith.models.spec_position import Alibi, DynamicScaling, LongScaling, RopeScaling, SteppedScaling, TwoRowRope


@dataclass(frozen=True)
class CacheRules:
    """How a sequence may be brought into a cache.

    Args:
        prefixes: keys and values follow from the tokens up to theirs alone, so that documents which begin alike can
            share them.
        whole_prompt: a prompt must come in one call: its tokens see each other in both directions.
        reread_after: the length after which what a cache holds of a document is void, so that all of it must be read
            again. LongRoPE turns every key by another list of frequencies from there on. Other rules that follow the
            length keep the keys they have, as the code of their models does.
        revocable: the last tokens of a sequence can be taken back: nothing is remembered of them beside their keys.
    """

    prefixes: bool
    whole_prompt: bool
    reread_after: int | None
    revocable: bool

    @staticmethod
    def of(spec: DecoderSpec) -> CacheRules:
        """The rules of a family."""
        scalings = list(_scalings(spec))
        lengths = {scaling.original_length for scaling in scalings if isinstance(scaling, LongScaling)}
        assert len(lengths) <= 1, lengths
        # Rotations that depend on the length of the document; what the filter and the visibility rule remember.
        follow = any(isinstance(scaling, (DynamicScaling, SteppedScaling, LongScaling)) for scaling in scalings)
        remembers = any(isinstance(layer.attention, LFA) for layer in spec.layers)
        rule = spec.visibility
        resets = isinstance(rule, ResetAfter) and not rule.training_only
        whole = isinstance(rule, PrefixLM)
        return CacheRules(
            prefixes=not (follow or remembers or resets or whole),
            whole_prompt=whole,
            reread_after=next(iter(lengths), None),
            revocable=not (remembers or resets),
        )


def _scalings(spec: DecoderSpec) -> Iterator[RopeScaling]:
    for layer in spec.layers:
        position = layer.attention.position
        rope = position.rope if isinstance(position, TwoRowRope) else position
        if rope is not None and not isinstance(rope, Alibi) and rope.scaling is not None:
            yield rope.scaling
