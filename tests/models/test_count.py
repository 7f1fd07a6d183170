"""Counted parameters, FLOPs and cache bytes against the modules themselves and PyTorch's own FLOP counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matrix.rows import ROWS
from oarsmith import kernels
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models import families
from oarsmith.models.count import (
    FlopCounter,
    cache_bytes,
    documents,
    num_active_parameters,
    num_parameters,
    parameter_sizes,
    visible_pairs,
)
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout, Span
from oarsmith.models.spec import LayerSpec
from oarsmith.models.spec_parts import LFA, MoE
from tiny import batches_of, random_samples, tiny_decoder

FAMILIES = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(autouse=True)
def _one_thread(few_threads, monkeypatch):
    """Tiny matrices, and no rows beside the tokens' own: what a count is for is not what rounding up adds."""
    monkeypatch.setattr("oarsmith.kernels.rows.ROW_MULTIPLE", 1)


def build(name):
    return Decoder(families.build_spec(ROWS[name].config)[1], ROWS[name].config)


@FAMILIES
def test_parameters(name):
    with torch.device("meta"):
        model = build(name)
    assert parameter_sizes(model.spec) == {name: p.numel() for name, p in model.named_parameters()}
    assert num_parameters(model.spec) == sum(p.numel() for p in model.parameters())


def test_active_parameters():
    with torch.device("meta"):
        model = build("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    router = model.spec.layers[0].ffn.router
    assert 0 < router.top_k < router.num_experts
    everything = num_parameters(model.spec)
    assert num_active_parameters(model.spec) == everything - experts + experts * router.top_k // router.num_experts
    with torch.device("meta"):
        dense = build("llama")
    assert num_active_parameters(dense.spec) == num_parameters(dense.spec)


@FAMILIES
def test_cache_bytes(name):
    model = build(name)
    cache = model.new_cache(3, 5)
    held = [tensor for slots in cache._slots for tensor in slots] + [s for s in cache._states if s is not None]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in held)
    itemsize = model.embedding.weight.element_size()
    assert cache_bytes(model.spec, 15, itemsize=itemsize, num_sequences=3) == expected


def brute_force(spans, window):
    """Pair by pair, the rule as ``Span`` states it."""
    total = 0
    for span in spans:
        offset = (span.k_stop - span.k_start) - (span.q_stop - span.q_start)
        for query in range(span.q_stop - span.q_start):
            for key in range(span.k_stop - span.k_start):
                distance = query + offset - key
                total += (distance >= 0 and (window is None or distance < window)) or key < span.prefix
    return total


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_pairs(window):
    spans = [Span(0, 7, 0, 7), Span(7, 8, 7, 8), Span(8, 12, 0, 9), Span(12, 14, 12, 14)]
    assert visible_pairs(spans, window) == brute_force(spans, window)


@pytest.mark.parametrize("prefix", [1, 3, 9])
def test_visible_pairs_with_a_prefix(prefix):
    spans = [Span(0, 5, 0, 9, prefix), Span(5, 14, 0, 9, prefix)]
    assert visible_pairs(spans) == brute_force(spans, None)


@FAMILIES
def test_forward_flops(name):
    """Documents of one token: every score matrix is 1 x 1, so what runs is exactly what is needed."""
    model = build(name)
    if model.spec.visibility is not None:
        pytest.skip("its documents are longer than a token")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    ids = torch.arange(3, 8)
    layout = Layout.documents(range(6), torch.zeros(5, dtype=torch.long))
    with torch.no_grad(), kernels.using("native"), FlopCounterMode(display=False) as counter:
        model.eval().logits(model.hidden(ids, layout)[:2])
    counted = FlopCounter(model.spec, {}).of_documents([1] * 5, num_head_tokens=2)
    assert counted.backward == 0
    # The filter of LFA also runs over the two rows before each document.
    extra = sum(2 * 5 * _tap_rows(layer) for layer in model.spec.layers)
    assert counter.get_total_flops() == counted.forward + extra


def _tap_rows(layer: LayerSpec) -> int:
    """Multiply-adds beyond a token's own, for each document: one more row of the first tap's products."""
    return layer.attention.filter_norm.size**2 if isinstance(layer.attention, LFA) else 0


def addmm_in_place(y_shape, a_shape, b_shape, **_):
    """PyTorch's counter knows only the variant that returns a new tensor."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def step_flops(model, batch):
    known = {torch.ops.aten.addmm_: addmm_in_place}
    with kernels.using("native"), FlopCounterMode(display=False, custom_mapping=known) as counter:
        token_cross_entropy(model, batch, 1.0).loss.backward()
    return counter.get_total_flops()


def counted_step(model, batch):
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head_tokens = int((batch.weights != 0).sum())
    lengths = [b - a for a, b in zip(batch.bounds[:-1], batch.bounds[1:], strict=True)]
    return FlopCounter(model.spec, trained).of_documents(lengths, num_head_tokens=head_tokens)


def score_flops(model, batch):
    """What the kernel does and the mathematics does not need: whole squares, and scores a second time in backward."""
    lengths = [b - a for a, b in zip(batch.bounds[:-1], batch.bounds[1:], strict=True)]
    squares, needed = sum(n * n for n in lengths), visible_pairs(documents(lengths))
    attention = model.spec.layers[0].attention
    product = 2 * attention.num_heads * attention.head_dim * len(model.spec.layers)
    return product * (7 * squares - 6 * needed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_training_flops(family):
    model = tiny_decoder(family)
    (batch,) = batches_of(random_samples((9, 4, 17)), 3)
    assert step_flops(model, batch) == counted_step(model, batch).total + score_flops(model, batch)


def test_training_flops_of_mixed_experts():
    model = build("qwen3_moe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    (batch,) = batches_of(random_samples((9, 4, 17), vocab_size=300), 3)
    assert any(isinstance(layer.ffn, MoE) for layer in model.spec.layers)
    assert step_flops(model, batch) == counted_step(model, batch).total + score_flops(model, batch)


def test_training_flops_of_adapters():
    config = tiny_decoder().config
    known, spec = families.build_spec(config)
    change = Lora(rank=4, alpha=8.0)
    # Maps of one segment each: those of several run as a block-diagonal product, which costs more than is needed.
    chosen = adapt_rewrite(lambda modules: {m: change for m in modules if m.endswith(("o_proj", "down_proj"))})
    model = Decoder(chosen(known, spec), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (batch,) = batches_of(random_samples((9, 4, 17)), 3)
    # Before the first adapter nothing needs a gradient: A of the first layer's o_proj has none to pass on, and its
    # attention runs forwards only (two products of the whole squares).
    spec = model.spec.layers[0].attention
    product = 2 * spec.num_heads * spec.head_dim
    squares, pairs = 81 + 16 + 289, visible_pairs(documents((9, 4, 17)))
    first = -2 * 4 * spec.out.in_features * 30 + product * 2 * (squares - pairs)
    later = product * (7 * squares - 6 * pairs)
    counted = counted_step(model, batch)
    assert step_flops(model, batch) == counted.total + first + later
    full = counted_step(tiny_decoder(), batch)
    assert counted.backward < 0.65 * full.backward


def test_training_flops_of_a_head_s_adapter():
    """It stands after everything frozen, so nothing else needs a gradient."""
    spec = tiny_decoder().spec
    plain, adapted = (
        FlopCounter(spec, trained).count(lambda _: 7, num_tokens=3, num_head_tokens=2)
        for trained in ({}, {"parts.0.maps.head.adapter.lm_head.lora_A": 50})
    )
    assert adapted.forward - plain.forward == 2 * 50 * 2 and adapted.backward == 2 * (2 * 50) * 2


def test_six_and_four_flops_a_parameter():
    """The rule of thumb of PaLM's appendix B, and its variant for frozen weights."""
    model = tiny_decoder()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2) - model.embedding.weight.numel()
    sizes = parameter_sizes(model.spec)
    flops = FlopCounter(model.spec, sizes).count(lambda _: 0, num_tokens=1, num_head_tokens=1)
    assert flops.total == 6 * matrices
    frozen = FlopCounter(model.spec, {"embedding.weight": 1}).count(lambda _: 0, num_tokens=1, num_head_tokens=1)
    assert frozen.total == 4 * matrices


def test_windows_are_counted_apart():
    spec = tiny_decoder("mistral").spec
    whole = FlopCounter(
        dataclasses.replace(
            spec,
            layers=tuple(
                dataclasses.replace(x, attention=dataclasses.replace(x.attention, window=None)) for x in spec.layers
            ),
        ),
        {},
    )
    short, long = FlopCounter(spec, {}).of_documents([50]).forward, whole.of_documents([50]).forward
    per_pair = sum(4 * layer.attention.num_heads * layer.attention.head_dim for layer in spec.layers)
    assert long - short == per_pair * (brute_force(documents([50]), None) - brute_force(documents([50]), 7))
