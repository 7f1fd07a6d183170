"""What an adapter does to one projection y = W x + b, as functions of the adapter's tensors.

A projection is what a checkpoint names (``q_proj``), also where the decoder computes several as one map. An adapter's
tensors are fp32 whatever the base's dtype: they are small, and updates are not lost to rounding.

Shapes: T tokens, I in features, O out features, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

Weight = Callable[[], Tensor]
"""Makes the frozen W [O, I] in fp32, for methods that look at it."""


@dataclass(frozen=True)
class Size:
    """Of a projection."""

    out_features: int
    in_features: int


@dataclass(frozen=True)
class Sitting:
    """An adapter's tensors on one projection: ``on["lora_A"]``."""

    size: Size
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True, kw_only=True)
class Change(ABC):
    """A method with its numbers (rank, scale, ...), on one projection.

    The adapted projection is ``after(W before(x) + b + added(before(x)))``; a method says what of the three it has. All
    functions are given one projection; experts, whose tensors lie stacked, are gone through one by one.

    Attributes:
        keys: name of each tensor -> what follows the projection's name in PEFT's files. A projection may lack some.
        table_keys: what follows the embedding's name in PEFT's files -> the same for projections, where the method can
            sit there (``on_table``).
        frozen: names of tensors that do not train.
        turns_input: there is a ``before``. ``scales_output``: there is an ``after``.
        mergeable: there is a plain projection that does the same.
        adds: ``merged`` adds a matrix that does not depend on W, so it can be taken off again.
    """

    keys: ClassVar[Mapping[str, str]]
    table_keys: ClassVar[Mapping[str, str]] = {}
    frozen: ClassVar[frozenset[str]] = frozenset()
    turns_input: ClassVar[bool] = False
    scales_output: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    adds: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, size: Size) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor.

        Raises:
            ConfigError: the method cannot sit on a projection of this size.
        """

    @abstractmethod
    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        """Give the tensors the values that training begins with, in place: the adapted model is the base model."""

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        """What W is applied to, in x's dtype."""
        return x_TI

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor | None:
        """What is added to the product [T, O], in x's dtype; None: nothing."""
        return None

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        """What becomes of the sum, of which the bias is a part, in y's dtype."""
        return y_TO

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        """The W [O, I] of a plain projection that does the same, fp32 to fp32.

        Raises:
            ConfigError: there is none.
        """
        raise NotImplementedError(type(self).__name__)

    def unmerged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        """The W [O, I] that ``merged`` made this of, fp32 to fp32; for changes that add."""
        assert self.adds, type(self).__name__
        return weight_OI - self.merged(on, torch.zeros_like(weight_OI))

    def stored(self, on: Sitting) -> Mapping[str, Tensor]:
        """What a file holds, by what follows the projection's name there."""
        return {ending: on[name] for name, ending in self.keys.items() if name in on.tensors}

    def restore(self, on: Sitting, found: Mapping[str, Tensor]) -> None:
        """Take what a file holds, of the shapes that ``stored`` gives."""
        for name, ending in self.keys.items():
            if name in on.tensors:
                on[name].copy_(found[ending])

    def exact(self, on: Sitting) -> Mapping[str, Tensor]:
        """What training goes on from and PEFT's file cannot say, by names of its own; in a file beside it, and
        ``restore`` finds it with the rest where that file is there."""
        return {}

    def on_table(self) -> Change | None:
        """The same change where W [E, V] is the embedding and a token takes a column; None: there is none."""
        return None

    @property
    def made_of_weight(self) -> bool:
        """Whether a file lacks tensors that ``reset`` makes of W."""
        return False

    def among(self, sizes: Sequence[Size]) -> Change:
        """The change to put on all projections of a model that it was chosen for, which have these sizes."""
        return self

    def shared(self) -> Mapping[str, Tensor]:
        """What a file holds once for all projections, by name."""
        return {}

    def restore_shared(self, found: Mapping[str, Tensor]) -> None:
        """Take it, of the shapes that ``shared`` gives."""
        assert not found, type(self).__name__

    def peft_config(self) -> Mapping[str, Any]:
        """The method's part of ``adapter_config.json``."""
        raise NotImplementedError(type(self).__name__)

    @classmethod
    def peft_configs(cls, changes: Mapping[str, Change]) -> dict[str, Any]:
        """That part for all projections, by name; where they differ, PEFT has patterns of ranks and factors."""
        common, *others = (dict(change.peft_config()) for change in dict.fromkeys(changes.values()))
        if not others:
            return common
        alpha = "lora_alpha" if "lora_alpha" in common else "alpha"
        for patterns, key in (("rank_pattern", "r"), ("alpha_pattern", alpha)):
            table = {name: change.peft_config()[key] for name, change in changes.items()}
            common[patterns] = {name: value for name, value in table.items() if value != common[key]}
        return common

    def merged_bias(self, on: Sitting, bias_O: Tensor | None) -> Tensor | None:
        """Its bias, fp32 to fp32."""
        return bias_O


@dataclass(frozen=True, kw_only=True)
class LowRank(Change):
    """W + B A, where the tensors make A [r, I] and B [O, r]. All of a map are computed as one pair of products."""

    adds: ClassVar[bool] = True

    dropout: float = 0.0

    @abstractmethod
    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        """A and B in fp32, any scale in B."""

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor | None:
        a_rI, b_Or = (factor.to(x_TI.dtype) for factor in self.factors(on))
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        return functional.linear(functional.linear(dropped_TI, a_rI), b_Or)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        a_rI, b_Or = self.factors(on)
        return weight_OI + b_Or @ a_rI


@dataclass(frozen=True, kw_only=True)
class Delta(Change):
    """W + D, where the tensors make a whole D."""

    adds: ClassVar[bool] = True

    dropout: float = 0.0

    @abstractmethod
    def delta(self, on: Sitting) -> Tensor:
        """D [O, I] in fp32."""

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor | None:
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        return functional.linear(dropped_TI, self.delta(on).to(x_TI.dtype))

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return weight_OI + self.delta(on)
