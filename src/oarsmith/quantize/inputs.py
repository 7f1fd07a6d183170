"""Where the inputs of a layer's maps come from: what can take a factor, a shift or a rotation off their channels.

A factor on a channel of an input is undone in the columns of every map that reads it, so that the layer stays the
function that it is. Shapes: D hidden, I in features, C channels of a source, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.models.block import Block
from oarsmith.models.linear import Linear
from oarsmith.models.norm import LayerNorm, RMSNorm
from oarsmith.models.spec import LayerSpec, NormedStream, OutputNorm, Parallel, PostNorm, Residual, Sequential
from oarsmith.models.spec_parts import FFN, GQA, LFA, MLA, MLP, AttentionSpec, GatedMLP, MoE


@dataclass(frozen=True)
class NormSource:
    """A norm gives the input: its weight, and its bias, take a factor."""

    norm: str


@dataclass(frozen=True)
class RowSource:
    """Rows of a map give the input, as they are or through something that a factor passes.

    Attributes:
        map: its path.
        rows_I: which row gives each channel of the input; several channels may share one.
        averaged: the input is an average of such rows over tokens, so that what all have in common passes.
    """

    map: str
    rows_I: Tensor
    averaged: bool = False


@dataclass(frozen=True)
class Input:
    """An input and everything that reads it.

    Attributes:
        maps: linear maps, by their paths in the block.
        others: further weights [.., D] whose columns belong to the input's channels (a router's).
        source: what gives it; None: nothing that could take a factor.
    """

    maps: tuple[str, ...]
    source: NormSource | RowSource | None
    others: tuple[str, ...] = ()


def inputs_of(spec: LayerSpec) -> tuple[Input, ...]:
    """Every input of a layer's maps, in the order in which they come up; each map reads one of them."""
    attention_norm, ffn_norm = "attention_norm", "ffn_norm"
    attention_maps, ffn_maps, others = _readers(spec.attention, spec.ffn)
    within, within_ffn = tuple(_inner(spec.attention)), tuple(_inner_ffn(spec.ffn, "ffn"))
    match spec.wiring:
        case Parallel(ffn_norm=None):
            own = NormSource(attention_norm) if not isinstance(spec.attention, LFA) else None
            return Input((*attention_maps, *ffn_maps), own, others), *within, *within_ffn
        case Parallel():
            first, second = _norm(None, attention_norm, spec.attention), _norm(None, ffn_norm, None)
        case Sequential(attention=attention_rule, ffn=ffn_rule):
            first = _norm(attention_rule, attention_norm, spec.attention)
            second = _norm(ffn_rule, ffn_norm, None)
    return Input(attention_maps, first), *within, Input(ffn_maps, second, others), *within_ffn


def _norm(rule: Residual | None, name: str, attention: AttentionSpec | None) -> NormSource | None:
    """Of a part that reads its norm's output, which nothing else reads."""
    if isinstance(rule, (OutputNorm, PostNorm, NormedStream)) or isinstance(attention, LFA):
        return None
    return NormSource(name)


def _readers(attention: AttentionSpec, ffn: FFN) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    match attention:
        case GQA():
            first: tuple[str, ...] = ("attention.qkv",)
        case MLA(q_down=None):
            first = ("attention.q_up", "attention.kv_down")
        case MLA():
            first = ("attention.q_down", "attention.kv_down")
        case LFA():
            first = ("attention.v",)
    match ffn:
        case GatedMLP():
            return first, ("ffn.gate_up",), ()
        case MLP():
            return first, ("ffn.up",), ()
        case MoE():
            maps = ["ffn.experts.gate_up"] + (["ffn.shared.gate_up"] if ffn.shared is not None else [])
            others = ["ffn.router"] + (["ffn.shared_gate"] if ffn.shared_gate else [])
            return first, tuple(maps), tuple(others)


def _inner(spec: AttentionSpec) -> Iterator[Input]:
    """Of the maps within attention."""
    match spec:
        case GQA():
            yield Input(("attention.out",), RowSource("attention.qkv", value_rows(spec), averaged=not spec.sinks))
        case MLA():
            if spec.q_down is not None:
                yield Input(("attention.q_up",), NormSource("attention.q_norm") if spec.q_norm is not None else None)
            yield Input(("attention.kv_up",), NormSource("attention.kv_norm"))
            head_H = torch.arange(spec.num_heads)[:, None] * (spec.nope_dim + spec.v_dim)
            rows_HV = head_H + spec.nope_dim + torch.arange(spec.v_dim)
            yield Input(("attention.out",), RowSource("attention.kv_up", rows_HV.flatten(), averaged=True))
        case LFA():
            yield Input(("attention.qk",), None)
            rows = torch.arange(spec.num_heads * spec.head_dim)
            yield Input(("attention.out",), RowSource("attention.v", rows, averaged=True))


def value_rows(spec: GQA) -> Tensor:
    """The row of ``qkv`` that gives each input channel of ``out``."""
    share, dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
    group_G = torch.arange(spec.num_kv_heads)
    if spec.packing == "grouped":
        first_G = (group_G * (share + 2) + share + 1) * dim
    else:
        first_G = (spec.num_heads + spec.num_kv_heads + group_G) * dim
    return (first_G.repeat_interleave(share)[:, None] + torch.arange(dim)).flatten()


def _inner_ffn(spec: FFN, path: str) -> Iterator[Input]:
    match spec:
        case GatedMLP(down=down, activation=activation):
            # act(gate) * up: a factor on up passes.
            rows = down.in_features + torch.arange(down.in_features)
            linear = isinstance(activation, str)
            yield Input((f"{path}.down",), RowSource(f"{path}.gate_up", rows) if linear else None)
        case MLP(down=down, activation=activation):
            rows = torch.arange(down.in_features)
            yield Input((f"{path}.down",), RowSource(f"{path}.up", rows) if activation == "relu" else None)
        case MoE():
            yield from _inner_ffn(spec.experts, f"{path}.experts")
            if spec.shared is not None:
                yield from _inner_ffn(spec.shared, f"{path}.shared")


def num_channels(block: Block, one: Input) -> int:
    """Channels of the source that can have factors of their own."""
    size = linear(block, one.maps[0]).spec.in_features
    return len(one.source.rows_I.unique()) if isinstance(one.source, RowSource) else size


def shared_factor(one: Input, factor_I: Tensor) -> Tensor:
    """One factor for channels that come from the same row: their largest."""
    if not isinstance(one.source, RowSource):
        return factor_I
    rows_I = one.source.rows_I
    most = factor_I.new_zeros(*factor_I.shape[:-1], int(rows_I.max()) + 1)
    index = rows_I.expand(factor_I.shape)
    return most.scatter_reduce(-1, index, factor_I, "amax", include_self=False).gather(-1, index)


@torch.no_grad()
def divide(block: Block, one: Input, factor_I: Tensor) -> None:
    """Divide an input's channels by factors, and multiply the columns that read them. In place.

    Args:
        factor_I: above zero, the same for channels from one row; [E, I] of stacked maps that each have their own.
    """
    match one.source:
        case NormSource(norm=norm):
            _divide_norm(block.get_submodule(norm), factor_I)
        case RowSource(map=path, rows_I=rows_I):
            # Rows that several channels share are read before they are written: each is divided once.
            source = linear(block, path)
            source.weight[..., rows_I, :] = source.weight[..., rows_I, :] / factor_I[..., None]
            if source.bias is not None:
                source.bias[..., rows_I] = source.bias[..., rows_I] / factor_I
        case None:
            raise AssertionError(f"{one.maps[0]} has no source")
    for path in one.maps:
        linear(block, path).weight.mul_(factor_I[..., None, :] if factor_I.dim() > 1 else factor_I)
    for path in one.others:
        other_weight(block, path).mul_(factor_I)


def _divide_norm(norm: nn.Module, factor_D: Tensor) -> None:
    match norm:
        case RMSNorm():
            offset = 1.0 if norm.spec.unit_offset else 0.0
            norm.weight.copy_((norm.weight + offset) / factor_D - offset)
        case LayerNorm(weight=nn.Parameter() as weight):
            weight.div_(factor_D)
            if norm.bias is not None:
                norm.bias.div_(factor_D)
        case _:
            raise AssertionError(f"{norm} has no weight")


def takes_factor(block: Block, one: Input) -> bool:
    """Whether an input's channels can be divided by factors."""
    match one.source:
        case NormSource(norm=norm):
            found = block.get_submodule(norm)
            return isinstance(found, RMSNorm) or (isinstance(found, LayerNorm) and found.weight is not None)
        case RowSource():
            return True
        case None:
            return False


@torch.no_grad()
def shift(block: Block, one: Input, shift_I: Tensor) -> None:
    """Take numbers off an input's channels, and add what the maps make of them to their biases. In place."""
    match one.source:
        case NormSource(norm=norm):
            bias = block.get_submodule(norm).bias
            assert isinstance(bias, nn.Parameter), norm
            bias.sub_(shift_I)
        case RowSource(map=path, rows_I=rows_I):
            source_bias = linear(block, path).bias
            assert source_bias is not None, path
            source_bias[..., rows_I] = source_bias[..., rows_I] - shift_I
        case None:
            raise AssertionError(f"{one.maps[0]} has no source")
    for path in one.maps:
        module = linear(block, path)
        assert module.bias is not None, path
        module.bias.add_(module.weight @ shift_I)


def takes_shift(block: Block, one: Input) -> bool:
    """Whether numbers can be taken off: source and readers have biases, and nothing else reads the input."""
    if one.others or any(linear(block, path).bias is None for path in one.maps):
        return False
    match one.source:
        case NormSource(norm=norm):
            found = block.get_submodule(norm)
            return isinstance(found, LayerNorm) and found.bias is not None
        case RowSource(map=path, averaged=averaged):
            return averaged and linear(block, path).bias is not None
        case None:
            return False


def linear(block: Block, path: str) -> Linear:
    """A linear map of a block."""
    found = block.get_submodule(path)
    assert isinstance(found, Linear), path
    return found


def other_weight(block: Block, path: str) -> Tensor:
    """The weight of a reader that is no linear map of the spec."""
    weight = block.get_submodule(path).weight
    assert isinstance(weight, Tensor), path
    return weight
