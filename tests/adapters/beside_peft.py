"""An adapter of PEFT's read by us, and one of ours read by PEFT: what has to be the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oarsmith
from oarsmith.adapters.change import Change
from oarsmith.adapters.linear import adapted_modules, attach
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS, adapter_tensors, write_adapter
from oarsmith.adapters.targets import adapt_rewrite
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import CheckpointError
from oarsmith.models.decoder import Decoder

from .conftest import Adapted, Base, randomise, tokens

# fp32; sums are taken in another order than in PEFT.
TOLERANCE = 1e-4


def read(made: Adapted) -> Decoder:
    return oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")


def same_answers_and_merge(made: Adapted, merged: Callable[[Any], Any] | None = None) -> None:
    """Logits, those after merging, and every weight and bias of the merged model.

    Args:
        merged: makes PEFT's merged model, where ``merge_and_unload`` does not.
    """
    ids = tokens(2, 17)
    with torch.no_grad():
        model, expected = read(made), made.oracle(ids).logits
        assert (expected - made.base.oracle()(ids).logits).abs().max() > 0.02, "the adapter must do something"
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE)
        plain = merge_adapter(model)
        torch.testing.assert_close(plain(ids), expected, rtol=0, atol=TOLERANCE)
        theirs = made.oracle.merge_and_unload() if merged is None else merged(made.oracle)
    weights, parameters = dict(theirs.named_parameters()), dict(plain.named_parameters())
    for place in oarsmith.models.families.find(plain.config).names(plain.spec).places:
        found = place.view(parameters[place.parameter])
        torch.testing.assert_close(found, weights[place.file], rtol=1e-5, atol=1e-5, msg=lambda m, p=place: p.file + m)


def same_gradients(made: Adapted, part: str, frozen: Collection[str] = ()) -> None:
    """Gradients of all the adapter's tensors.

    Args:
        part: is in the names of those.
        frozen: keys of a file that hold what does not train.
    """
    ids = tokens(1, 17)
    for name, parameter in made.oracle.named_parameters():
        parameter.requires_grad_(part in name)
    made.oracle(ids).logits.square().mean().backward()
    expected = {n.replace(".default", ""): p.grad for n, p in made.oracle.named_parameters() if p.grad is not None}
    model = read(made)
    model(ids).square().mean().backward()
    found = {key: tensor for key, tensor in adapter_tensors(model).items() if key not in frozen}
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert tensor.grad is not None
        limit = max(1e-6, 1e-4 * float(expected[key].abs().max()))
        torch.testing.assert_close(tensor.grad, expected[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


def randomised(model: Decoder, std: float = 0.15) -> Decoder:
    """Its adapters' parameters, far from the start."""
    randomise((p for _, m in adapted_modules(model) for p in m.adapter.parameters() if p.requires_grad), 2, std)
    return model


Choose = Callable[[Collection[str]], Mapping[str, Change]]


def fresh(base: Path, choose: Choose) -> Decoder:
    model = load_decoder(base, rewrite=adapt_rewrite(choose)).eval()
    attach(model, seed=3)
    return model


def saved(model: Decoder, folder: Path, base: Path) -> Path:
    folder.mkdir()
    write_adapter(model, folder, base=str(base))
    return folder


@torch.no_grad()
def read_by_peft(base: Base, folder: Path, choose: Choose, std: float = 0.15) -> Any:
    """Ours, written: PEFT answers the same with it, and so do we; gives PEFT's model."""
    model, ids = randomised(fresh(base.path, choose), std), tokens(2, 13)
    oracle = peft.PeftModel.from_pretrained(base.oracle(), saved(model, folder, base.path)).eval()
    expected = model(ids)
    torch.testing.assert_close(oracle(ids).logits, expected, rtol=0, atol=TOLERANCE)
    assert (base.oracle()(ids).logits - expected).abs().max() > 0.02
    again = oarsmith.load_model(folder, device="cpu")
    torch.testing.assert_close(again(ids), expected, rtol=0, atol=1e-5)
    written = load_file(folder / WEIGHTS)
    mine = adapter_tensors(again)
    assert written.keys() == mine.keys()
    assert all(torch.equal(mine[key].float(), tensor) for key, tensor in written.items())
    return oracle


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


def formula_close(found: Tensor, expected: Tensor) -> None:
    """fp32 beside a formula in fp64."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
