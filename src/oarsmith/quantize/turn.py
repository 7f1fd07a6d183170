"""A model turned: the same function with its residual stream, and each head's values, in another basis.

A Hadamard basis spreads the few large channels that spoil a scale over all of them (QuaRot, Ashkboos et al. 2024,
section 4; the matrices R1 and R2 of SpinQuant, Liu et al. 2024). Gains of norms go into the maps that read them first,
since only a norm without gains commutes with a rotation; the head then has a matrix of its own.

Shapes: D hidden, V vocabulary, I in, O out features, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.models.block import Block
from oarsmith.models.decoder import Decoder
from oarsmith.models.norm import RMSNorm
from oarsmith.models.spec import DecoderSpec, LayerSpec, Parallel, PreNorm, Sequential
from oarsmith.models.spec_parts import GQA, LFA, MLP, GatedMLP, MoE, RMSNormSpec
from oarsmith.quantize.inputs import NormSource, inputs_of, linear, other_weight, value_rows

Turn = Callable[[Tensor], Tensor]
"""x [.., D] to x R with an orthogonal R [D, D]."""


def check_turns(spec: DecoderSpec) -> None:
    """Whether a model can be turned.

    Raises:
        ModelError: a part of it does not commute with a rotation.
    """
    embedding, head = spec.embedding, spec.head
    norms = [spec.final_norm]
    for layer in spec.layers:
        if isinstance(layer.attention, LFA):
            raise _not_turned("its filters work on single channels")
        match layer.wiring:
            case Parallel(norm=norm, ffn_norm=ffn_norm):
                norms += [norm] if ffn_norm is None else [norm, ffn_norm]
            case Sequential(attention=PreNorm(norm=first), ffn=PreNorm(norm=second)):
                norms += [first, second]
            case _:
                raise _not_turned("a norm lies on what its layers add to the stream")
    if not all(isinstance(norm, RMSNormSpec) for norm in norms):
        raise _not_turned("its norms take the mean of the channels off, or it has none at the end")
    if embedding.norm is not None or embedding.projection is not None:
        raise _not_turned("a norm or a map follows its embedding")
    if head.projection is not None or head.normalized:
        raise _not_turned("its head does more than multiply")


def _not_turned(why: str) -> ModelError:
    return ModelError(f"the model cannot be rotated: {why}", where="rotate", fix="leave rotate out")


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the turned model, whose head has a matrix of its own."""
    return config | {"tie_word_embeddings": False}


@torch.no_grad()
def turn_embedding(model: Decoder, turn: Turn) -> None:
    """The tables of tokens and positions in the new basis. In place."""
    for table in (
        model.embedding.weight,
        None if model.embedding.positions is None else model.embedding.positions.weight,
    ):
        if table is not None:
            table.copy_(turn(table))


@torch.no_grad()
def turned_head(weight_VD: Tensor, norm: RMSNorm, turn: Turn) -> Tensor:
    """The output matrix that reads the turned stream behind a norm without gains."""
    return turn(weight_VD * _gains(norm))


@torch.no_grad()
def turn_block(spec: LayerSpec, block: Block, turn: Turn, turn_values: Turn | None = None) -> None:
    """A layer in the new basis. In place.

    Args:
        turn_values: x [.., K] to x R with an R of the size of a head, for the values of plain attention.
    """
    for one in inputs_of(spec):
        if one.source not in (NormSource("attention_norm"), NormSource("ffn_norm")):
            continue
        assert isinstance(one.source, NormSource)
        norm = block.get_submodule(one.source.norm)
        assert isinstance(norm, RMSNorm), norm
        gains_D = _gains(norm)
        for weight in (
            *(linear(block, path).weight for path in one.maps),
            *(other_weight(block, p) for p in one.others),
        ):
            weight.copy_(turn(weight * gains_D))
        clear_gains(norm)
    for path in ("attention.out", *_writers(spec)):
        module = linear(block, path)
        module.weight.copy_(turn(module.weight.transpose(-1, -2)).transpose(-1, -2))
        if module.bias is not None:
            module.bias.copy_(turn(module.bias))
    if turn_values is not None and isinstance(spec.attention, GQA):
        _turn_values(spec.attention, block, turn_values)


def _writers(spec: LayerSpec) -> tuple[str, ...]:
    match spec.ffn:
        case GatedMLP() | MLP():
            return ("ffn.down",)
        case MoE(shared=None):
            return ("ffn.experts.down",)
        case MoE():
            return ("ffn.experts.down", "ffn.shared.down")


def _turn_values(spec: GQA, block: Block, turn: Turn) -> None:
    """Each head's values, and the columns of ``out`` that read them."""
    qkv, out, dim = linear(block, "attention.qkv"), linear(block, "attention.out"), spec.head_dim
    rows = value_rows(spec).unique()
    qkv.weight[rows] = turn(qkv.weight[rows].unflatten(0, (-1, dim)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    if qkv.bias is not None:
        qkv.bias[rows] = turn(qkv.bias[rows].unflatten(0, (-1, dim))).flatten()
    out.weight.copy_(turn(out.weight.unflatten(1, (-1, dim))).flatten(1))


def _gains(norm: RMSNorm) -> Tensor:
    return norm.weight + 1.0 if norm.spec.unit_offset else norm.weight.clone()


@torch.no_grad()
def clear_gains(norm: RMSNorm) -> None:
    """Make all gains 1. In place."""
    norm.weight.fill_(0.0 if norm.spec.unit_offset else 1.0)
