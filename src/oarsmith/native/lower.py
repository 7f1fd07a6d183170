"""A decoder's spec and weights to a program. What has no operation is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.nn import functional

from oarsmith.errors import ModelError
from oarsmith.models.attention import Attention
from oarsmith.models.block import Block
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.decoder import Decoder
from oarsmith.models.facts import ModelFacts
from oarsmith.models.lfa import FilteredAttention
from oarsmith.models.mla import LatentAttention
from oarsmith.models.norm import LayerNorm, RMSNorm
from oarsmith.models.spec import (
    DecoderSpec,
    NormedStream,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    Residual,
    Sandwich,
    Sequential,
    linear_specs,
)
from oarsmith.models.spec_parts import GQA, LFA, MLA, AttentionSpec, LayerNormSpec, LinearSpec, QKNorm
from oarsmith.native.arena import Arena
from oarsmith.native.lower_attention import attention, padded_dim
from oarsmith.native.lower_ffn import feed_forward
from oarsmith.native.lower_filtered import filtered_attention
from oarsmith.native.lower_latent import latent_attention, latent_cache
from oarsmith.native.lowering import Bend, Lowering, Source, Target, rounded
from oarsmith.native.program import Matrix, Operation, Program
from oarsmith.native.stored import WeightFiles

Part = Callable[[Source, Target], None]

_log = logging.getLogger(__name__)


def refusal(spec: DecoderSpec) -> str | None:
    """What of a spec the step has no operation for; None: it can run it."""
    for layer in spec.layers:
        match layer.attention:
            case MLA(kv_up=LinearSpec(bias=True)):
                return "latents with a bias"
            case GQA(qk_norm=QKNorm(over="projection", q=LayerNormSpec()), head_dim=dim) if dim % 16:
                return "layer norms over projections of heads that are no multiple of 16"
    if spec.head.num_scores is not None:
        return "a head of scores"
    if spec.parts:
        return spec.parts[0].what
    rewritten = next((path for path, linear in linear_specs(spec) if linear.rewrite is not None), None)
    return None if rewritten is None else f"the rewritten map {rewritten}"


def lower(
    model: Decoder,
    precision: str,
    *,
    threads: int = 1,
    files: WeightFiles | None = None,
    own_form: CacheForm | None = None,
) -> tuple[Program, Arena]:
    """The program of a decoder, and its weights packed.

    Args:
        precision: of the weights, one of program.FORMATS. With ``int4`` the output matrix is int8.
        threads: that pack weights.
        files: where those weights are read that are on the meta device. What is stored there as codes keeps its
            numbers, in the format that holds them; the rest gets ``precision``.
        own_form: how the checkpoint wants keys and values to be kept.

    Raises:
        ModelError: the step has no operation for a part.
    """
    spec = model.spec
    if (reason := refusal(spec)) is not None:
        raise ModelError(f"the native step does not know {reason}", fix="run the model on PyTorch")
    low = Lowering(spec, precision, "int8" if precision == "int4" else precision, threads, files)
    table = _embed(low, model)
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        _block(low, block, index)
    body, low.ops = tuple(low.ops), []
    head_input, logits = low.buffer("head", spec.hidden_size), low.buffer("logits", spec.vocab_size)
    _head(low, model, head_input, logits, table)
    if files is not None:
        _log.info("weights as they are stored: %s", _summary(low))
    arena = low.weights.pack()
    program = Program(
        facts=ModelFacts.of(spec),
        widths=tuple(low.widths),
        stream=low.stream,
        head_input=head_input,
        logits=logits,
        body=body,
        head=tuple(low.ops),
        rotations=tuple(low.rotations),
        cache=tuple(_cache_dims(layer.attention) for layer in spec.layers),
        states=tuple(low.states),
        stored="fp32" if precision in ("fp32", "fp16") else "bf16",
        arena_bytes=arena.size,
        own_form=own_form,
    )
    return program, arena


def _summary(low: Lowering) -> str:
    kept = [f"{count} in {format}" for format, count in low.codes.items()]
    decoded = [f"{count} in {low.format} ({reason})" for reason, count in low.decoded.items()]
    return ", ".join([*kept, *decoded]) or "none of the step's"


def _cache_dims(spec: AttentionSpec) -> tuple[int, int, int]:
    match spec:
        case GQA(num_kv_heads=heads, head_dim=dim) | LFA(num_heads=heads, head_dim=dim):
            return heads, padded_dim(dim), padded_dim(dim)
        case MLA():
            return latent_cache(spec)


def _embed(low: Lowering, model: Decoder) -> Matrix:
    """Token ids to the stream. Returns the table."""
    spec, embedding = low.spec.embedding, model.embedding
    (table,) = low.matrices(embedding.weight, low.head_format)
    # Rounded as the decoder rounds it: in bf16 that is part of the model.
    scale = 1.0 if spec.scale is None else rounded(spec.scale, embedding.weight.dtype)
    target = low.stream if spec.projection is None else low.buffer("embedding", spec.size)
    low.ops.append(Operation(kind="embed", target=target, matrix=table, scale=scale))
    if embedding.projection is not None:
        low.linear(Source(target), embedding.projection, low.stream)
    if (learned := embedding.positions) is not None:
        low.ops.append(
            Operation(
                kind="embed",
                target=low.stream,
                keep=1.0,
                width=learned.weight.shape[1],
                positions=low.weights.vector(learned.weight),
                position_offset=learned.spec.offset,
            )
        )
    if embedding.norm is not None:
        low.normed(low.stream, low.norm(embedding.norm), low.stream)
    return table


def _block(low: Lowering, block: Block, index: int) -> None:
    def attend(source: Source, target: Target) -> None:
        match block.attention:
            case Attention():
                attention(low, block.attention, index, source, target)
            case LatentAttention():
                latent_attention(low, block.attention, index, source, target)
            case FilteredAttention():
                filtered_attention(low, block.attention, index, source, target)

    def feed(source: Source, target: Target) -> None:
        feed_forward(low, block.ffn, source, target)

    match block.wiring:
        case Sequential(attention=first, ffn=second):
            assert block.ffn_norm is not None, second
            _residual(low, first, block.attention_norm, block.attention_post_norm, attend)
            _residual(low, second, block.ffn_norm, block.ffn_post_norm, feed)
        case Parallel():
            # Both read the stream as it was before the block.
            before = low.buffer("before", low.spec.hidden_size)
            low.normed(low.stream, None, before)
            norm = low.norm(block.attention_norm)
            attend(Source(before, norm), Target(low.stream))
            feed(Source(before, norm if block.ffn_norm is None else low.norm(block.ffn_norm)), Target(low.stream))


def _residual(
    low: Lowering, rule: Residual, norm: RMSNorm | LayerNorm, post_norm: RMSNorm | LayerNorm | None, part: Part
) -> None:
    """The stream after ``part``, as models/block.py has it."""
    stream, own = low.stream, low.norm(norm)
    match rule:
        case PreNorm(scale=scale):
            part(Source(stream, own), Target(stream, scale=scale))
        case Sandwich():
            assert post_norm is not None, rule
            out = low.buffer("out", low.spec.hidden_size)
            part(Source(stream, own), Target(out, keep=0.0))
            low.normed(out, low.norm(post_norm), stream, keep=1.0)
        case OutputNorm():
            out = low.buffer("out", low.spec.hidden_size)
            part(Source(stream), Target(out, keep=0.0))
            low.normed(out, own, stream, keep=1.0)
        case PostNorm():
            part(Source(stream), Target(stream))
            low.normed(stream, own, stream)
        case NormedStream(scale=scale):
            low.normed(stream, own, stream)
            part(Source(stream), Target(stream, keep=scale))


def _head(low: Lowering, model: Decoder, source: int, logits: int, table: Matrix) -> None:
    spec, head, embedding = low.spec.head, model.head, model.embedding
    norm = None if model.final_norm is None else low.norm(model.final_norm)
    if head.projection is not None:
        projected = low.buffer("projected", head.projection.spec.out_features)
        low.linear(Source(source, norm), head.projection, projected)
        source, norm = projected, None
    matrix = table
    if not spec.tied or spec.normalized:
        weight = embedding.weight if head.weight is None else head.weight
        (matrix,) = low.matrices(weight, low.head_format, change=functional.normalize if spec.normalized else None)
    cap: Bend = {} if spec.softcap is None else {"activation": "cap", "limit": spec.softcap}
    low.ops.append(
        Operation(kind="linear", source=source, target=logits, norm=norm, matrix=matrix, scale=spec.scale, **cap)
    )
