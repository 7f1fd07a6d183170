"""Every method that is a part of the model rather than a change of projections, and which parts a file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oarsmith.adapters.methods import METHODS, changes_of
from oarsmith.adapters.part import MakePart, SpecRewrite, with_parts
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.prefix import make_prefix, read_prefix
from oarsmith.adapters.targets import adapt_rewrite
from oarsmith.config.adapters import AdapterKeys
from oarsmith.models.families import Family
from oarsmith.models.spec import DecoderSpec, PartSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a file's tensors."""


@dataclass(frozen=True, kw_only=True)
class PartMethod:
    """A method.

    Attributes:
        name: ours, the ``adapter_type`` of a configuration.
        peft_type: what PEFT calls it, or what we do where it has no such method.
        make: from a configuration's keys to a part of a model.
        read: from a file's config and its tensors' shapes to the same.
    """

    name: str
    peft_type: str
    make: Callable[[AdapterKeys, Family, DecoderSpec], PartSpec]
    read: Callable[[PeftConfig, Shapes, Family, DecoderSpec], PartSpec]


PART_METHODS = (PartMethod(name="prefix_tuning", peft_type="PREFIX_TUNING", make=make_prefix, read=read_prefix),)


def rewrite_of(keys: AdapterKeys, base: Path) -> SpecRewrite:
    """The spec rewrite that a configuration asks for.

    Args:
        base: the model's directory, for methods that look at its tokenizer.
    """
    makers: list[MakePart] = [partial(method.make, keys) for method in PART_METHODS if method.name == keys.adapter_type]
    changes = any(method.name == keys.adapter_type for method in METHODS)
    inner = adapt_rewrite(lambda places: changes_of(keys, places)) if changes else _as_it_is
    return with_parts(inner, makers)


def parts_in_file(config: PeftConfig, shapes: Shapes) -> tuple[list[MakePart], bool]:
    """The parts of an adapter's file; and whether there is nothing else in it."""
    for method in PART_METHODS:
        if method.peft_type == config.peft_type:
            return [partial(method.read, config, shapes)], True
    return [], False


def _as_it_is(family: Family, spec: DecoderSpec) -> DecoderSpec:
    return spec
