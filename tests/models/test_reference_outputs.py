"""Checkpoints with outputs computed once by the authors' code (tests/fixtures/families)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models import families

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
