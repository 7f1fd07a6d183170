"""The decoder as data: frozen values that say what to build, before any module exists.

A family turns a ``config.json`` into a :class:`DecoderSpec`. Capabilities (adapters, quantized linears, sharding)
rewrite the spec; nothing patches modules afterwards. Where families differ in kind, the slot holds a sum type
(``GQA | MLA | LFA``, ``GatedMLP | MLP | MoE``, ``Rope | Alibi | None``), never a set of flags. Modules are named like
the fields here, so a field's path in the spec is its module's path in the decoder.

``spec_parts.py`` holds what a block is made of, ``spec_position.py`` how positions enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from oarsmith.models.spec_parts import FFN, AttentionSpec, LinearSpec, NormSpec

if TYPE_CHECKING:
    from oarsmith.models.part import Part


@dataclass(frozen=True, kw_only=True)
class PreNorm:
    """x + scale * f(norm(x))."""

    norm: NormSpec
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """x + post_norm(f(norm(x)))."""

    norm: NormSpec
    post_norm: NormSpec


@dataclass(frozen=True, kw_only=True)
class OutputNorm:
    """x + norm(f(x))."""

    norm: NormSpec


@dataclass(frozen=True, kw_only=True)
class PostNorm:
    """norm(x + f(x))."""

    norm: NormSpec


@dataclass(frozen=True, kw_only=True)
class NormedStream:
    """h = norm(x); scale * h + f(h): the normed input is what goes on."""

    norm: NormSpec
    scale: float = 1.0


Residual = PreNorm | Sandwich | OutputNorm | PostNorm | NormedStream


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Attention, then the feed-forward part, each with its residual rule."""

    attention: Residual
    ffn: Residual


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """x + attention(norm(x)) + ffn(norm(x)); one norm for both unless ``ffn_norm`` is there."""

    norm: NormSpec
    ffn_norm: NormSpec | None = None


def named_norms(wiring: Sequential | Parallel) -> dict[str, NormSpec]:
    """The norms of a block under their modules' names."""
    match wiring:
        case Sequential(attention=attention, ffn=ffn):
            found = {"attention_norm": attention.norm, "ffn_norm": ffn.norm}
            if isinstance(attention, Sandwich):
                found["attention_post_norm"] = attention.post_norm
            if isinstance(ffn, Sandwich):
                found["ffn_post_norm"] = ffn.post_norm
            return found
        case Parallel(norm=norm, ffn_norm=ffn_norm):
            return {"attention_norm": norm} | ({} if ffn_norm is None else {"ffn_norm": ffn_norm})


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A residual block."""

    attention: AttentionSpec
    ffn: FFN
    wiring: Sequential | Parallel


@dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A table of ``size`` usable positions after ``offset`` rows that are never used (OPT)."""

    size: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """Token ids to the first hidden state: table, scale, projection, positions, norm, in this order.

    ``size``: of a table row, where it is not the hidden size (then ``projection`` leads there). ``padding_id``: this
    row gets no gradient from the input.
    """

    size: int
    scale: float | None = None
    positions: LearnedPositions | None = None
    norm: NormSpec | None = None
    projection: LinearSpec | None = None
    padding_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The last hidden state to logits: projection, matrix, scale, softcap, in this order.

    ``tied``: the matrix is the embedding table. ``normalized``: its rows are divided by their length. ``softcap`` c:
    logits become c * tanh(logit / c). ``num_scores``: the matrix has so many rows and gives scores of texts in place of
    logits of tokens (a reward model: one); None: a row a token.
    """

    tied: bool
    projection: LinearSpec | None = None
    normalized: bool = False
    scale: float = 1.0
    softcap: float | None = None
    num_scores: int | None = None


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """Tokens before ``start_id`` see each other in both directions; those after it are generated (ChatGLM-6B).

    From ``start_id`` on the position stays that of the first token of ``mask_ids`` that the prefix holds, the earlier
    ids preferred, and the second row counts 1, 2, ...; before it the second row is 0.
    """

    start_id: int
    mask_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ResetAfter:
    """Tokens after ``end_id`` see neither it nor anything before it; positions go on (Yuan 2).

    ``training_only``: outside training the documents are plainly causal.
    """

    end_id: int
    training_only: bool = False


class PartSpec(Protocol):
    """Builds a part that a rewrite adds to a decoder (an adapter's prefix, say); see ``part.py``.

    Attributes:
        what: names it.
        num_virtual: tokens that it puts in front of every document.
        prefixes: keys and values follow from the tokens up to theirs alone, as far as it has a say.
    """

    @property
    def what(self) -> str: ...

    @property
    def num_virtual(self) -> int: ...

    @property
    def prefixes(self) -> bool: ...

    def build(self, spec: DecoderSpec) -> Part: ...


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Everything the decoder is, and nothing about how it is trained, stored or run.

    ``max_positions`` is the context the checkpoint states. ``visibility``: who sees whom beside plain causality within
    a document. ``init_std``: deviation of fresh weights; ``residual_init_std``: of the maps that write to the residual
    stream, where the family's paper has its own for them. ``parts``: what rewrites have added.
    """

    vocab_size: int
    hidden_size: int
    embedding: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    head: HeadSpec
    max_positions: int
    visibility: PrefixLM | ResetAfter | None = None
    init_std: float = 0.02
    residual_init_std: float | None = None
    parts: tuple[PartSpec, ...] = ()

    @property
    def num_virtual(self) -> int:
        """Tokens in front of every document that are none of its own."""
        return sum(part.num_virtual for part in self.parts)


def linear_specs(spec: DecoderSpec) -> Iterator[tuple[str, LinearSpec]]:
    """Every linear map of the layers with its module path (``layers.3.attention.qkv``)."""
    for index, layer in enumerate(spec.layers):
        yield from _linears(layer, f"layers.{index}")


def rewrite_linears(spec: DecoderSpec, rule: Callable[[str, LinearSpec], LinearSpec]) -> DecoderSpec:
    """A copy of ``spec`` with each linear map of the layers replaced by ``rule(path, linear)``."""
    layers = tuple(_rewritten(layer, f"layers.{index}", rule) for index, layer in enumerate(spec.layers))
    return replace(spec, layers=layers)


def _linears(part: Any, path: str) -> Iterator[tuple[str, LinearSpec]]:
    """Linear maps at any depth of a part: modules are named like the fields."""
    for field in fields(part):
        value, name = getattr(part, field.name), f"{path}.{field.name}"
        if isinstance(value, LinearSpec):
            yield name, value
        elif is_dataclass(value):
            yield from _linears(value, name)


def _rewritten(part: Any, path: str, rule: Callable[[str, LinearSpec], LinearSpec]) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(part):
        value, name = getattr(part, field.name), f"{path}.{field.name}"
        if isinstance(value, LinearSpec):
            changes[field.name] = rule(name, value)
        elif is_dataclass(value):
            changes[field.name] = _rewritten(value, name, rule)
    return replace(part, **changes) if changes else part
