"""The tensor names of a family as a table, and the operators that follow from it and the spec."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from oarsmith.models.names import (
    Duplicate,
    Ignored,
    NameMap,
    Place,
    conv1d,
    expert_linears,
    join,
    linear,
    norm,
    stacked_experts,
    whole,
)
from oarsmith.models.spec import DecoderSpec, LayerSpec, named_norms
from oarsmith.models.spec_parts import FFN, GQA, LFA, MLA, MLP, AttentionSpec, GatedMLP, LinearSpec, MoE

Operator = Place | Ignored | Duplicate

SCORE = "score.weight"
"""What transformers calls the head of every ``...ForSequenceClassification``."""

_LATER_LAYERS = 16  # far more than any release has

ROPE_BUFFERS = Ignored(r".*rotary_(pos_)?emb\.inv_freq", "computed from the config")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls its parts; the defaults are the Llama line's. Projections are named by their segments.

    Everything from ``attention`` to ``ffn_post_norm`` is relative to the layer; what belongs to attention or to the
    experts is relative to those. An empty name adds nothing to the path.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    embedding_norm: str = ""
    embedding_projection: str = ""
    layers: str = "model.layers"
    attention: str = "self_attn"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    kv_norm: str = "kv_a_layernorm"
    sinks: str = "sinks"
    filter: str = ""
    ffn: str = "mlp"
    router: str = "gate"
    correction: str = "e_score_correction_bias"
    experts: str = "experts.{}"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    final_norm: str = "model.norm"
    head_projection: str = ""
    head: str = "lm_head"
    optional_prefix: str = "model."
    transposed: bool = False
    stacked_experts: bool = False
    later_layers: str = ""
    ignored: tuple[Ignored, ...] = (ROPE_BUFFERS,)


def name_map(spec: DecoderSpec, names: Names) -> NameMap:
    """All operators of a model, in the order in which families write their tensors."""
    found: list[Operator] = list(_embedding(spec, names))
    for index, layer in enumerate(spec.layers):
        found += _layer(layer, join(names.layers, str(index)), f"layers.{index}", names)
    if spec.final_norm is not None:
        found += norm(names.final_norm, "final_norm", spec.final_norm)
    if spec.head.projection is not None:
        found += linear(names.head_projection, "head.projection", spec.head.projection)
    if spec.head.num_scores is not None:
        found.append(Place(SCORE, "head.weight", whole))
        found.append(Ignored(re.escape(f"{names.head}.weight"), "it gives logits of tokens, and the model scores"))
    elif spec.head.tied:
        found.append(Duplicate(f"{names.head}.weight", "embedding.weight"))
    else:
        found.append(Place(f"{names.head}.weight", "head.weight", whole))
    if names.later_layers:
        numbers = "|".join(str(len(spec.layers) + extra) for extra in range(_LATER_LAYERS))
        found.append(Ignored(rf"{re.escape(names.layers)}\.({numbers})\..*", names.later_layers))
    return NameMap((*found, *names.ignored), optional_prefix=names.optional_prefix)


def _embedding(spec: DecoderSpec, names: Names) -> Iterator[Operator]:
    embedding = spec.embedding
    yield Place(f"{names.embedding}.weight", "embedding.weight", whole)
    if embedding.positions is not None:
        yield Place(f"{names.positions}.weight", "embedding.positions.weight", whole)
    if embedding.norm is not None:
        yield from norm(names.embedding_norm, "embedding.norm", embedding.norm)
    if embedding.projection is not None:
        yield from linear(names.embedding_projection, "embedding.projection", embedding.projection)


def _layer(layer: LayerSpec, file: str, here: str, names: Names) -> Iterator[Operator]:
    words = {
        "attention_norm": names.attention_norm,
        "attention_post_norm": names.attention_post_norm,
        "ffn_norm": names.ffn_norm,
        "ffn_post_norm": names.ffn_post_norm,
    }
    for part, spec in named_norms(layer.wiring).items():
        yield from norm(join(file, words[part]), f"{here}.{part}", spec)
    yield from _attention(layer.attention, join(file, names.attention), f"{here}.attention", names)
    yield from _ffn(layer.ffn, join(file, names.ffn), f"{here}.ffn", names)


def _attention(spec: AttentionSpec, file: str, here: str, names: Names) -> Iterator[Operator]:
    match spec:
        case GQA():
            yield from _linear(file, f"{here}.qkv", spec.qkv, names)
            if spec.qk_norm is not None:
                yield from norm(join(file, names.q_norm), f"{here}.q_norm", spec.qk_norm.q)
                yield from norm(join(file, names.k_norm), f"{here}.k_norm", spec.qk_norm.k)
            if spec.sinks:
                yield Place(join(file, names.sinks), f"{here}.sinks", whole)
        case MLA():
            if spec.q_down is not None:
                yield from linear(file, f"{here}.q_down", spec.q_down)
            if spec.q_norm is not None:
                yield from norm(join(file, names.q_norm), f"{here}.q_norm", spec.q_norm)
            for part, part_spec in (("q_up", spec.q_up), ("kv_down", spec.kv_down), ("kv_up", spec.kv_up)):
                yield from linear(file, f"{here}.{part}", part_spec)
            yield from norm(join(file, names.kv_norm), f"{here}.kv_norm", spec.kv_norm)
        case LFA():
            yield from linear(file, f"{here}.qk", spec.qk)
            yield from linear(file, f"{here}.v", spec.v)
            yield from _filter(spec, join(file, names.filter), f"{here}.filter")
    yield from _linear(file, f"{here}.out", spec.out, names)


def _filter(spec: LFA, file: str, here: str) -> Iterator[Operator]:
    """Convolution weights are stored as [out, in, 2, 1], the older tap first."""
    for file_name, name in (("conv1", "first"), ("conv2", "second")):
        yield Place(f"{file}.{file_name}.weight", f"{here}.{name}.weight", _taps_last)
        yield Place(f"{file}.{file_name}.bias", f"{here}.{name}.bias", whole)
    yield from norm(f"{file}.output_layernorm", f"{here}.norm", spec.filter_norm)


def _taps_last(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0)[..., None]


def _ffn(spec: FFN, file: str, here: str, names: Names) -> Iterator[Operator]:
    match spec:
        case GatedMLP():
            yield from _linear(file, f"{here}.gate_up", spec.gate_up, names)
            yield from _linear(file, f"{here}.down", spec.down, names)
        case MLP():
            yield from _linear(file, f"{here}.up", spec.up, names)
            yield from _linear(file, f"{here}.down", spec.down, names)
        case MoE():
            yield from _experts(spec, file, here, names)


def _experts(spec: MoE, file: str, here: str, names: Names) -> Iterator[Operator]:
    router = join(file, names.router)
    yield Place(f"{router}.weight", f"{here}.router.weight", whole)
    if spec.router.bias:
        yield Place(f"{router}.bias", f"{here}.router.bias", whole)
    if spec.router.correction:
        yield Place(f"{router}.{names.correction}", f"{here}.router.correction", whole)
    for part, linear_spec, runs in (("gate_up", spec.experts.gate_up, 2), ("down", spec.experts.down, 1)):
        parameter, name = f"{here}.experts.{part}", join(file, names.experts)
        if names.stacked_experts:
            yield from stacked_experts(name, parameter, linear_spec, runs)
        else:
            yield from expert_linears(name, parameter, linear_spec)
    if spec.shared is not None:
        yield from linear(join(file, names.shared), f"{here}.shared.gate_up", spec.shared.gate_up)
        yield from linear(join(file, names.shared), f"{here}.shared.down", spec.shared.down)
    if spec.shared_gate:
        yield Place(f"{join(file, names.shared_gate)}.weight", f"{here}.shared_gate.weight", whole)


def _linear(file: str, parameter: str, spec: LinearSpec, names: Names) -> Iterator[Place]:
    return conv1d(file, parameter, spec) if names.transposed else linear(file, parameter, spec)
