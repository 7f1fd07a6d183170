"""Parameters, FLOPs and cache bytes of a decoder, as functions of its spec.

FLOPs are those the model's mathematics needs, as in PaLM (Chowdhery et al. 2022, appendix B): two for each multiply-add
of a matrix product; no recomputation, no padding, no elementwise work, embeddings read and not multiplied. Two things
are finer than there: attention counts the pairs of query and key that see each other, and the output matrix only the
tokens it is multiplied with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from oarsmith.models.cache_form import CacheForm
from oarsmith.models.layout import Span
from oarsmith.models.spec import DecoderSpec, LayerSpec, named_norms
from oarsmith.models.spec_parts import GQA, LFA, MLA, AttentionSpec, LayerNormSpec, LinearSpec, MoE, NormSpec, QKNorm

_BESIDE_HEAD = re.compile(r"parts\.\d+\.maps\.head\.")
"""Names of parameters that an adapter has beside the output matrix."""

Pairs = Callable[[int | None], float]
"""How many pairs of query and key see each other in an attention with this window (None: without)."""


def parameter_sizes(spec: DecoderSpec) -> dict[str, int]:
    """Elements of every parameter of the plain decoder, by name. What a rewrite adds (adapters) is not in it."""
    embedding, head = spec.embedding, spec.head
    found = {"embedding.weight": spec.vocab_size * embedding.size}
    if embedding.positions is not None:
        width = embedding.size if embedding.projection is None else embedding.projection.out_features
        found["embedding.positions.weight"] = (embedding.positions.offset + embedding.positions.size) * width
    found |= _norm("embedding.norm", embedding.norm) | _linear("embedding.projection", embedding.projection)
    for index, layer in enumerate(spec.layers):
        found |= {f"layers.{index}.{name}": size for name, size in _layer_sizes(layer).items()}
    found |= _norm("final_norm", spec.final_norm) | _linear("head.projection", head.projection)
    if not head.tied:
        found["head.weight"] = _head_rows(spec) * _head_width(spec)
    return found


def num_parameters(spec: DecoderSpec) -> int:
    """All parameters of the plain decoder."""
    return sum(parameter_sizes(spec).values())


def num_active_parameters(spec: DecoderSpec) -> int:
    """Parameters that one token meets: of experts only the chosen ones."""
    idle = 0
    for layer in spec.layers:
        if isinstance(layer.ffn, MoE):
            experts = sum(_linear("up", layer.ffn.experts.gate_up).values())
            experts += sum(_linear("down", layer.ffn.experts.down).values())
            router = layer.ffn.router
            idle += experts // router.num_experts * (router.num_experts - router.top_k)
    return num_parameters(spec) - idle


def cache_bytes(
    spec: DecoderSpec, num_tokens: int, *, itemsize: int, num_sequences: int = 1, form: CacheForm | None = None
) -> int:
    """Bytes of a key/value cache with room for ``num_tokens`` in all sequences together, ``itemsize`` a number.

    ``form``: of keys and values in 8 bits.
    """
    per_token = per_sequence = 0

    def size(dim: int) -> int:
        return itemsize * dim if form is None else form.num_bytes(dim)

    for layer in spec.layers:
        match layer.attention:
            case GQA(num_kv_heads=groups, head_dim=dim):
                per_token += 2 * groups * size(dim)
            case MLA(latent_dim=latent, rope_dim=rope):
                per_token += size(latent + rope)
            case LFA(num_heads=heads, head_dim=dim, filter_norm=norm):
                per_token += 2 * heads * size(dim)
                per_sequence += itemsize * 2 * norm.size
    return num_tokens * per_token + num_sequences * per_sequence


def visible_pairs(spans: Sequence[Span], window: int | None = None) -> int:
    """Pairs of query and key that see each other in these spans."""

    def seen_by_first(n: int, prefix: int) -> int:
        """By the first n queries of a document together."""
        if prefix > 0:
            assert window is None, "no model has a prefix and a window"
            return n * prefix if n <= prefix else prefix * prefix + _sum_to(n) - _sum_to(prefix)
        return _sum_to(n) if window is None or n <= window else _sum_to(window) + (n - window) * window

    total = 0
    for span in spans:
        keys, queries = span.k_stop - span.k_start, span.q_stop - span.q_start
        prefix = min(span.prefix, keys)
        total += seen_by_first(keys, prefix) - seen_by_first(keys - queries, prefix)
    return total


def documents(lengths: Sequence[int]) -> list[Span]:
    """Plain causal documents of these lengths."""
    return [Span(0, length, 0, length) for length in lengths]


@dataclass(frozen=True)
class Flops:
    """Of a pass over some tokens: the forward pass, and what backward needs beside it."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class _Product:
    """A matrix that each token is multiplied with.

    ``size``: multiply-adds a token. ``entry``: it reads the residual stream (through a norm), not another product.
    """

    name: str
    size: float
    entry: bool


class FlopCounter:
    """The FLOPs of training passes over a decoder.

    Backward needs, of each product x W, the gradient of W where W trains, and that of x where something trains that x
    depends on. With everything training this is 6 FLOPs a parameter and token, with adapters on frozen weights about 4.

    Args:
        trained: name -> elements of the parameters that train (all of them: ``parameter_sizes``; none: inference).
            Those of an adapter lie under the name of the map they sit on and each count as a product of their own.
    """

    def __init__(self, spec: DecoderSpec, trained: Mapping[str, int]) -> None:
        self._attention: dict[int | None, list[float]] = {}
        self._token = [0.0, 0.0]
        self._head = [0.0, 0.0]
        # What parts add comes in before the first layer, or at some layer after it, unless it belongs to the head.
        of_head = {name: size for name, size in trained.items() if _BESIDE_HEAD.match(name)}
        upstream = "embedding.weight" in trained or any(
            name.startswith("parts.") and name not in of_head for name in trained
        )
        if spec.embedding.projection is not None:
            size = spec.embedding.projection.in_features * spec.embedding.projection.out_features
            self._add(self._token, _Product("embedding.projection.weight", size, True), trained, upstream)
        upstream = upstream or any(name.startswith("embedding.") for name in trained)
        for index, layer in enumerate(spec.layers):
            of_layer = _strip(trained, f"layers.{index}.")
            self._add_layer(layer, of_layer, upstream)
            upstream = upstream or bool(of_layer)
        upstream = upstream or any(name.startswith("final_norm.") for name in trained)
        if spec.head.projection is not None:
            size = spec.head.projection.in_features * spec.head.projection.out_features
            self._add(self._head, _Product("head.projection.weight", size, True), trained, upstream)
            upstream = upstream or any(name.startswith("head.projection.") for name in trained)
        for name, size in of_head.items():
            self._add(self._head, _Product(name, size, False), trained, True)
        matrix = "embedding.weight" if spec.head.tied else "head.weight"
        self._add(self._head, _Product(matrix, _head_rows(spec) * _head_width(spec), True), trained, upstream)

    def count(self, pairs: Pairs, *, num_tokens: float, num_head_tokens: float) -> Flops:
        """Of a pass over ``num_tokens`` tokens, of which ``num_head_tokens`` go through the output matrix."""
        forward, backward = (
            num_tokens * token + num_head_tokens * head for token, head in zip(self._token, self._head, strict=True)
        )
        for window, (ahead, back) in self._attention.items():
            seen = pairs(window)
            forward, backward = forward + seen * ahead, backward + seen * back
        return Flops(forward, backward)

    def of_documents(self, lengths: Sequence[int], *, num_head_tokens: float | None = None) -> Flops:
        """Of plain causal documents; every token goes through the output matrix unless told otherwise."""
        spans, num_tokens = documents(lengths), sum(lengths)
        num_head_tokens = num_tokens if num_head_tokens is None else num_head_tokens
        return self.count(
            lambda window: visible_pairs(spans, window), num_tokens=num_tokens, num_head_tokens=num_head_tokens
        )

    def _add_layer(self, layer: LayerSpec, trained: Mapping[str, int], upstream: bool) -> None:
        experts = layer.ffn.router if isinstance(layer.ffn, MoE) else None
        for part, products in (("attention", _attention_products(layer.attention)), ("ffn", _ffn_products(layer))):
            before = upstream or any(name.startswith(f"{part}_norm.") for name in trained)
            own = [name for name in trained if name.startswith(f"{part}.")]
            for product in products:
                holder = product.name.removesuffix("weight")
                inner = any(not name.startswith(holder) for name in own)
                moved = before or (inner and not product.entry)
                self._add(self._token, product, trained, moved)
                share = experts.top_k / experts.num_experts if experts and ".experts." in product.name else 1.0
                for name in own:
                    if name.startswith(holder) and name not in (product.name, f"{holder}bias"):
                        self._add(self._token, _Product(name, trained[name] * share, False), trained, True)
            if part == "attention":
                moved = before or any(not name.startswith("attention.out.") for name in own)
                window, size = _scores(layer.attention)
                kept = self._attention.setdefault(window, [0.0, 0.0])
                kept[0] += 2 * size
                kept[1] += 4 * size if moved else 0
            upstream = before or bool(own)

    @staticmethod
    def _add(to: list[float], product: _Product, trained: Mapping[str, int], moved: bool) -> None:
        to[0] += 2 * product.size
        to[1] += 2 * product.size * (moved + (product.name in trained))


def _scores(attention: AttentionSpec) -> tuple[int | None, int]:
    """Window, and multiply-adds of all heads for one pair: score, and its share of the output."""
    match attention:
        case GQA(num_heads=heads, head_dim=dim, window=window):
            return window, 2 * heads * dim
        case MLA(num_heads=heads, nope_dim=nope, rope_dim=rope, v_dim=value):
            return None, heads * (nope + rope + value)
        case LFA(num_heads=heads, head_dim=dim):
            return None, 2 * heads * dim


def _attention_products(attention: AttentionSpec) -> Iterator[_Product]:
    if isinstance(attention, LFA):
        size = attention.filter_norm.size
        yield _Product("attention.filter.first.weight", 2 * size * (size // 2), True)
        yield _Product("attention.filter.second.weight", 2 * (size // 2) * size, False)
    direct = isinstance(attention, MLA) and attention.q_down is None
    entries = {"qkv", "q_down", "kv_down", "v"} | ({"q_up"} if direct else set())
    for name, linear in _linear_fields(attention):
        yield _Product(f"attention.{name}.weight", linear.in_features * linear.out_features, name in entries)


def _ffn_products(layer: LayerSpec) -> Iterator[_Product]:
    ffn, active = layer.ffn, 1
    if isinstance(ffn, MoE):
        active, width = ffn.router.top_k, ffn.experts.gate_up.in_features
        yield _Product("ffn.router.weight", ffn.router.num_experts * width, True)
        if ffn.shared_gate:
            yield _Product("ffn.shared_gate.weight", width, True)
    for name, linear in _linear_fields(ffn):
        times = active if linear.experts is not None else 1
        size = linear.in_features * linear.out_features * times
        yield _Product(f"ffn.{name}.weight", size, not name.endswith("down"))


def _layer_sizes(layer: LayerSpec) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, norm in named_norms(layer.wiring).items():
        found |= _norm(name, norm)
    for part, spec in (("attention", layer.attention), ("ffn", layer.ffn)):
        for name, linear in _linear_fields(spec):
            found |= _linear(f"{part}.{name}", linear)
    match layer.attention:
        case GQA(qk_norm=qk_norm, sinks=sinks, num_heads=heads):
            if isinstance(qk_norm, QKNorm):
                found |= _norm("attention.q_norm", qk_norm.q) | _norm("attention.k_norm", qk_norm.k)
            if sinks:
                found["attention.sinks"] = heads
        case MLA(q_norm=q_norm, kv_norm=kv_norm):
            found |= _norm("attention.q_norm", q_norm) | _norm("attention.kv_norm", kv_norm)
        case LFA(filter_norm=norm):
            size = norm.size
            found |= _norm("attention.filter.norm", norm)
            found |= {"attention.filter.first.weight": 2 * (size // 2) * size, "attention.filter.first.bias": size // 2}
            found |= {"attention.filter.second.weight": 2 * size * (size // 2), "attention.filter.second.bias": size}
    if isinstance(layer.ffn, MoE):
        router, width = layer.ffn.router, layer.ffn.experts.gate_up.in_features
        found["ffn.router.weight"] = router.num_experts * width
        found |= {"ffn.router.bias": router.num_experts} if router.bias else {}
        found |= {"ffn.router.correction": router.num_experts} if router.correction else {}
        found |= {"ffn.shared_gate.weight": width} if layer.ffn.shared_gate else {}
    return found


def _linear_fields(part: Any, path: str = "") -> Iterator[tuple[str, LinearSpec]]:
    """Linear maps at any depth of a part of a layer, by path within it."""
    for field in fields(part):
        value = vars(part)[field.name]
        if isinstance(value, LinearSpec):
            yield f"{path}{field.name}", value
        elif is_dataclass(value):
            yield from _linear_fields(value, f"{path}{field.name}.")


def _linear(name: str, linear: LinearSpec | None) -> dict[str, int]:
    if linear is None:
        return {}
    copies = linear.experts or 1
    found = {f"{name}.weight": copies * linear.out_features * linear.in_features}
    return found | ({f"{name}.bias": copies * linear.out_features} if linear.bias else {})


def _norm(name: str, norm: NormSpec | None) -> dict[str, int]:
    if norm is None:
        return {}
    if not isinstance(norm, LayerNormSpec):
        return {f"{name}.weight": norm.size}
    size = norm.size * (norm.heads or 1)
    found = {f"{name}.weight": size} if norm.affine else {}
    return found | ({f"{name}.bias": size} if norm.affine and norm.bias else {})


def _head_rows(spec: DecoderSpec) -> int:
    return spec.vocab_size if spec.head.num_scores is None else spec.head.num_scores


def _head_width(spec: DecoderSpec) -> int:
    return spec.hidden_size if spec.head.projection is None else spec.head.projection.out_features


def _strip(names: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): size for name, size in names.items() if name.startswith(prefix)}


def _sum_to(n: int) -> int:
    return n * (n + 1) // 2
