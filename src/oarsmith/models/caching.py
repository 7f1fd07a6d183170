"""What a family's rules mean for a cache of its keys and values: one place, decided from the spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from oarsmith.models.spec import DecoderSpec, PrefixLM, ResetAfter
from oarsmith.models.spec_parts import GQA, LFA
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
        window: the most tokens that a query sees, itself included, in any layer; what lies before them is not needed
            any more. None: all that came.
        revocable: the last tokens of a sequence can be taken back: nothing is remembered of them beside their keys.
    """

    prefixes: bool
    whole_prompt: bool
    reread_after: int | None
    revocable: bool
    window: int | None = None

    def joined(self, other: CacheRules) -> CacheRules:
        """Where another model has keys in the same pages; this one's rule for reading again holds for both."""
        windows = (self.window, other.window)
        return replace(
            self,
            prefixes=self.prefixes and other.prefixes,
            whole_prompt=self.whole_prompt or other.whole_prompt,
            revocable=self.revocable and other.revocable,
            window=None if None in windows else max(window for window in windows if window is not None),
        )

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
            prefixes=not (follow or remembers or resets or whole) and all(part.prefixes for part in spec.parts),
            whole_prompt=whole,
            reread_after=next(iter(lengths), None),
            revocable=not (remembers or resets),
            window=_window(spec),
        )


def _window(spec: DecoderSpec) -> int | None:
    windows = [layer.attention.window if isinstance(layer.attention, GQA) else None for layer in spec.layers]
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None


def _scalings(spec: DecoderSpec) -> Iterator[RopeScaling]:
    for layer in spec.layers:
        position = layer.attention.position
        rope = position.rope if isinstance(position, TwoRowRope) else position
        if rope is not None and not isinstance(rope, Alibi) and rope.scaling is not None:
            yield rope.scaling
