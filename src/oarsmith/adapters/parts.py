"""Every method that is a part of the model rather than a change of projections, and which parts a file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oarsmith.adapters.bitfit import biases_in, make_biases, read_biases
from oarsmith.adapters.methods import METHODS, changes_of
from oarsmith.adapters.part import MakePart, SpecRewrite, with_parts
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.prefix import make_prefix, read_prefix
from oarsmith.adapters.prompt import make_prompt, read_prompt
from oarsmith.adapters.reft import make_reft, read_reft
from oarsmith.adapters.score import make_score, read_score, scores_in
from oarsmith.adapters.targets import adapt_rewrite
from oarsmith.adapters.token_rows import make_token_rows, read_token_rows
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
        make: from a configuration's keys and the directory of the base to a part of a model.
        read: from a file's config and its tensors' shapes to the same.
    """

    name: str
    peft_type: str
    make: Callable[[AdapterKeys, Path, Family, DecoderSpec], PartSpec]
    read: Callable[[PeftConfig, Shapes, Family, DecoderSpec], PartSpec]


PART_METHODS = (
    PartMethod(name="prefix_tuning", peft_type="PREFIX_TUNING", make=make_prefix, read=read_prefix),
    PartMethod(name="prompt_tuning", peft_type="PROMPT_TUNING", make=make_prompt, read=read_prompt),
    PartMethod(name="p_tuning", peft_type="P_TUNING", make=make_prompt, read=read_prompt),
    PartMethod(name="reft", peft_type="REFT", make=make_reft, read=read_reft),
    PartMethod(name="bitfit", peft_type="BITFIT", make=make_biases, read=read_biases),
    PartMethod(name="trainable_tokens", peft_type="TRAINABLE_TOKENS", make=make_token_rows, read=read_token_rows),
)


def rewrite_of(keys: AdapterKeys, base: Path) -> SpecRewrite:
    """The spec rewrite that a configuration asks for.

    Args:
        base: the model's directory, for methods that look at its tokenizer.
    """
    makes = [method.make for method in PART_METHODS if method.name == keys.adapter_type]
    if keys.lora_bias != "none":
        makes.append(make_biases)
    if keys.trainable_tokens and make_token_rows not in makes:
        makes.append(make_token_rows)
    makers: list[MakePart] = [partial(make, keys, base) for make in makes]
    changes = any(method.name == keys.adapter_type for method in METHODS)
    inner = adapt_rewrite(lambda places: changes_of(keys, places)) if changes else _as_it_is

    def rewrite(family: Family, spec: DecoderSpec) -> DecoderSpec:
        scores = () if spec.head.num_scores is None else (partial(make_score, keys, base),)
        return with_parts(inner, [*makers, *scores])(family, spec)

    return rewrite


def parts_in_file(config: PeftConfig, shapes: Shapes) -> tuple[list[MakePart], bool]:
    """The parts of an adapter's file; and whether there is nothing else in it."""
    makers: list[MakePart] = [partial(read_score, config, shapes)] if scores_in(shapes) is not None else []
    for method in PART_METHODS:
        if method.peft_type == config.peft_type:
            return [partial(method.read, config, shapes), *makers], True
    if biases_in(shapes):
        makers.append(partial(read_biases, config, shapes))
    if config.values.get("trainable_token_indices"):
        makers.append(partial(read_token_rows, config, shapes))
    return makers, False


def _as_it_is(family: Family, spec: DecoderSpec) -> DecoderSpec:
    return spec
