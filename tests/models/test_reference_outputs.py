"""Checkpoints with outputs computed once by the authors' code (tests/fixtures/families)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec_parts import GQA
from oarsmith.models.spec_position import TwoRowRope

from .conftest import read_json
from .test_families import greedy

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
CASES = sorted(path.name for path in FAMILIES.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_logits_row_by_row(name: str) -> None:
    """Stored bf16 weights are computed in fp32, as the reference was. Rows have their own lengths and are alone."""
    expected, metadata = np.load(FAMILIES / name / "expected.npz"), read_json(FAMILIES / name / "metadata.json")
    model = load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    ids, logits = torch.from_numpy(expected["input_ids"]), torch.from_numpy(expected["logits"])
    lengths = expected["lengths"].tolist() if "lengths" in expected else [ids.shape[1]] * len(ids)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            found = model(ids[row : row + 1, :length])[0]
            torch.testing.assert_close(found, logits[row, :length], rtol=0, atol=metadata["logits_atol"])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_norms(name: str) -> None:
    expected = np.load(FAMILIES / name / "expected.npz")
    model = load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    ids = torch.from_numpy(expected["input_ids"])[:1]
    loss = functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    grad = model.embedding.weight.grad
    assert grad is not None and float(grad.norm()) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    norms = dict(zip(expected["grad_names"].tolist(), expected["grad_norms"].tolist(), strict=True))
    parameters = dict(model.named_parameters())
    places = families.find(model.config).names(model.spec).places
    places = tuple(place for place in places if parameters[place.parameter].requires_grad)
    assert {place.file for place in places} == set(norms)
    for place in places:
        part = parameters[place.parameter].grad
        assert part is not None
        assert float(place.view(part).norm()) == pytest.approx(norms[place.file], rel=1e-3, abs=1e-5), place.file


@pytest.mark.parametrize("name", CASES)
def test_greedy(name: str) -> None:
    expected = np.load(FAMILIES / name / "expected.npz")
    model = load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    assert greedy(model, expected["input_ids"][0].tolist(), 16) == expected["greedy"].tolist()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_of_the_continuation(name: str) -> None:
    """Each step's logits with the cache, fed the reference's own tokens."""
    expected, metadata = np.load(FAMILIES / name / "expected.npz"), read_json(FAMILIES / name / "metadata.json")
    model = load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    ids, chosen = expected["input_ids"][0].tolist(), expected["greedy"].tolist()
    cache, found = model.new_cache(1, len(ids) + len(chosen)), []
    for piece in (ids, *([token] for token in chosen[:-1])):
        hidden = model.hidden(torch.tensor(piece), cache.extend([len(piece)]), cache)
        found.append(model.logits(hidden[-1:])[0])
    wanted = torch.from_numpy(expected["greedy_logits"])
    torch.testing.assert_close(torch.stack(found), wanted, rtol=0, atol=metadata["logits_atol"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_greedy_without_a_cache(name: str) -> None:
    """The whole again for each token: some rules follow the length, so this may be another continuation."""
    expected = np.load(FAMILIES / name / "expected.npz")
    model = load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    ids = expected["input_ids"][0].tolist()
    for _ in range(16):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[-16:] == expected["greedy_nocache"].tolist()


@torch.no_grad()
def test_chatglm_frequencies_are_those_of_half_precision() -> None:
    """What the authors' code would give without that rounding: told apart by 4e-4 at 40 tokens."""
    expected = np.load(FAMILIES / "chatglm_6b" / "expected.npz")
    model = load_decoder(FAMILIES / "chatglm_6b", dtype=torch.float32).eval()
    ids, (layer, *_) = torch.from_numpy(expected["input_ids"][:1]), model.spec.layers
    assert isinstance(layer.attention, GQA) and isinstance(layer.attention.position, TwoRowRope)
    rounded = layer.attention.position
    exact = replace(rounded, rope=replace(rounded.rope, fp16_frequencies=False))
    spec = replace(
        model.spec,
        layers=(replace(layer, attention=replace(layer.attention, position=exact)),) * len(model.spec.layers),
    )
    unrounded = Decoder(spec, model.config)
    unrounded.load_state_dict(model.state_dict())
    wanted = torch.from_numpy(expected["logits_row0_exact_inv_freq"])
    torch.testing.assert_close(unrounded(ids)[0], wanted, rtol=0, atol=1e-4)
    assert float((model(ids)[0] - wanted).abs().max()) > 2e-4
