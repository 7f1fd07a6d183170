"""Factors, shifts and rotations leave every family the function that it is. In float64: what remains is rounding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from matrix.rows import ROWS
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.models.linear import Linear
from oarsmith.models.norm import RMSNorm
from oarsmith.models.spec import PrefixLM
from oarsmith.models.spec_parts import GQA
from oarsmith.quantize import inputs, turn


def model_of(row: str) -> Decoder:
    """In float64, with gains and biases that are not what they are at first, and a head of its own."""
    config = {**ROWS[row].config, "tie_word_embeddings": False}
    _, spec = families.build_spec(config)
    model = Decoder(spec, config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.empty_like(parameter).normal_(std=0.1, generator=generator)
            if "norm" in name:
                parameter += 0.5
    return model.double().eval().requires_grad_(False)


def ids_of(model: Decoder) -> Tensor:
    ids = (torch.arange(24) * 37 + 11) % (model.spec.vocab_size - 8)
    if isinstance(rule := model.spec.visibility, PrefixLM):
        ids[6], ids[7] = rule.mask_ids[0], rule.start_id
    return ids[None]


def same(found: Tensor, expected: Tensor) -> None:
    # Routers, rotations and tables are fp32 in every model.
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("row", ROWS)
def test_each_map_reads_one_input(row: str) -> None:
    model = model_of(row)
    for spec, block in zip(model.spec.layers, model.blocks(), strict=True):
        maps = [path for one in inputs.inputs_of(spec) for path in one.maps]
        assert sorted(maps) == sorted(path for path, module in block.named_modules() if isinstance(module, Linear))


@pytest.mark.parametrize("row", ROWS)
def test_factors_and_shifts_change_nothing(row: str) -> None:
    model = model_of(row)
    ids = ids_of(model)
    expected, generator, divided = model(ids), torch.Generator().manual_seed(2), 0
    for spec, block in zip(model.spec.layers, model.blocks(), strict=True):
        for one in inputs.inputs_of(spec):
            module = inputs.linear(block, one.maps[0])
            own = module.spec.experts is not None and isinstance(one.source, inputs.RowSource)
            size = (module.spec.experts, module.spec.in_features) if own else (module.spec.in_features,)
            random = partial(torch.rand, size, generator=generator, dtype=torch.float64)
            if inputs.takes_factor(block, one):
                inputs.divide(block, one, inputs.shared_factor(one, random() + 0.5))
                divided += 1
            if inputs.takes_shift(block, one):
                inputs.shift(block, one, inputs.shared_factor(one, random() - 0.5))
    assert divided
    same(model(ids), expected)


@pytest.mark.parametrize("row", ROWS)
def test_a_turned_model_is_the_same(row: str) -> None:
    model = model_of(row)
    ids, spec = ids_of(model), model.spec
    expected = model(ids)
    try:
        turn.check_turns(spec)
    except ModelError as error:
        assert "cannot be rotated" in str(error)
        return
    generator = torch.Generator().manual_seed(3)

    def random_turn(size: int) -> turn.Turn:
        matrix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return lambda x: x @ matrix

    stream, norm = random_turn(spec.hidden_size), model.final_norm
    assert isinstance(norm, RMSNorm)
    if model.head.weight is None:  # a family whose head is always the table: here the logits are made by hand
        head = turn.turned_head(model.embedding.weight, norm, stream)
    else:
        head = turn.turned_head(model.head.weight, norm, stream)
    turn.clear_gains(norm)
    turn.turn_embedding(model, stream)
    for layer, block in zip(spec.layers, model.blocks(), strict=True):
        values = random_turn(layer.attention.head_dim) if isinstance(layer.attention, GQA) else None
        turn.turn_block(layer, block, stream, values)
    if model.head.weight is not None:
        model.head.weight.copy_(head)
        same(model(ids), expected)
    else:
        kept: list[Tensor] = []
        handle = nn.Module.register_forward_pre_hook(norm, lambda module, args: kept.append(args[0]))
        model(ids)
        handle.remove()
        same(model.head.bend(model.final(kept[-1]) @ head.t())[None], expected)
