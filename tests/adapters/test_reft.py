"""ReFT beside the papers' formulas: where states are edited, and how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.exact_file import EXACT
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS, load_adapter_weights
from oarsmith.adapters.reft import orthonormal, parse_position
from oarsmith.data.batch import make_batch
from oarsmith.data.samples import Sample
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models.layout import Layout

from .beside_peft import formula_close
from .conftest import Base, tokens
from .with_parts import answers_as_forward, off_is_base, packed_as_alone, read, saved, trained, under

IDS = tokens(2, 17)
LOREFT: dict[str, Any] = {"adapter_type": "reft", "lora_rank": 3, "reft_position": "f2+l3"}
KINDS: dict[str, dict[str, Any]] = {
    "loreft": LOREFT,
    "relu and bias": LOREFT | {"reft_act_fn": "relu", "reft_add_bias": True, "reft_layers": [1]},
    "tiny": LOREFT | {"reft_intervention_type": "tiny"},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_formulas(base: Callable[[str], Base], name: str) -> None:
    part = trained(under(base("llama").path, **KINDS[name])).parts[0]
    h = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    on = {key: tensor.detach().double() for key, tensor in part._table(1).items()}
    if name == "tiny":
        expected = h + h.double() @ on["down"].T @ on["down_scale"].diag() @ on["up"].T @ on["up_scale"].diag()
    else:
        rotate = orthonormal(on["rotate"]).double()
        torch.testing.assert_close(rotate @ rotate.T, torch.eye(3).double(), rtol=0, atol=1e-6)
        target = h.double() @ on["source"].T + on.get("bias", 0)
        target = target.relu() if name != "loreft" else target
        expected = h + (target - h.double() @ rotate.T) @ rotate
    formula_close(part.edit(1, h), expected)
    assert (expected - h).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("position", ["f2+l3", "f4", "l1"])
@pytest.mark.parametrize("prompt", [1, 2, 5, 9])
def test_where(base: Callable[[str], Base], position: str, prompt: int) -> None:
    """Only those states differ after the first layer, which are the first and last of the prompt."""
    path, ids = base("llama").path, IDS[0]
    model = trained(under(path, **LOREFT | {"reft_position": position, "reft_layers": [0]}))
    plain = oarsmith.load_model(path, device="cpu")
    seen: list[torch.Tensor] = []
    for decoder in (model, plain):
        decoder.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        decoder.hidden(ids, Layout.documents([0, 17], torch.arange(17)).asking([prompt]))
    moved = (seen[0] != seen[1]).any(-1).nonzero()[:, 0].tolist()
    counts = parse_position(position)
    assert counts is not None
    first, last = (min(count, prompt // 2) for count in counts)
    assert moved == [*range(first), *range(prompt - last, prompt)]


@pytest.mark.parametrize("name", KINDS)
def test_start_files_and_off(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = base("llama").path
    model, plain = under(path, **KINDS[name]).eval(), oarsmith.load_model(path, device="cpu")
    if name != "relu and bias":
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-4)
    trained(model)
    expected = model(IDS)
    assert (expected - plain(IDS)).abs().max() > 0.05
    folder = saved(model, tmp_path / "a", path)
    torch.testing.assert_close(oarsmith.load_model(folder, device="cpu")(IDS), expected, rtol=0, atol=1e-5)
    for key, tensor in load_file(folder / WEIGHTS).items():
        if key.endswith("rotate"):
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(3), rtol=0, atol=1e-5)
    again = under(path, **KINDS[name])
    load_adapter_weights(again, folder)
    for ours, theirs in zip(model.parts[0].parameters(), again.parts[0].parameters(), strict=True):
        assert torch.equal(ours, theirs), "training goes on from the very numbers"
    (folder / EXACT).unlink(missing_ok=True)
    torch.testing.assert_close(read(path, folder)(IDS), expected, rtol=0, atol=1e-5)
    off_is_base(model, path)
    with pytest.raises(ConfigError, match="ReFT cannot be merged"):
        merge_adapter(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("name", KINDS)
def test_packed(base: Callable[[str], Base], family: str, name: str) -> None:
    packed_as_alone(trained(under(base(family).path, **KINDS[name])), prompts=(3, 1, 6))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_the_engine_answers(base: Callable[[str], Base], name: str) -> None:
    """Prompts in pieces and read again; what is known of one is not taken for another that goes on from it."""
    engine = answers_as_forward(trained(under(base(name).path, **LOREFT), std=1.0))
    assert engine.runner.scheduler.num_found == 0
    assert engine.runner.scheduler.num_preempted > 0 or name == "mistral"


def test_prompts_of_training(base: Callable[[str], Base]) -> None:
    """A batch's prompts end before the first trained target; the loss is that of the same edits."""
    ids = IDS[0].tolist()
    samples = [
        Sample(ids=ids[:9], weights=[0] * 4 + [1] * 5, where="a"),
        Sample(ids=ids[9:12], weights=[0] * 3, where="b"),
        Sample(ids=ids[12:], weights=[1] * 5, where="c"),
    ]
    batch = make_batch(samples)
    assert batch.prompts == [4, 3, 1]
    model = trained(under(base("llama").path, **LOREFT))
    found = token_cross_entropy(model, batch, 1.0).total
    layout = Layout.documents([0, 9], torch.arange(9)).asking([4])
    logprobs = model.logits(model.hidden(torch.tensor(ids[:9]), layout)).log_softmax(-1)
    expected = -sum(float(logprobs[at, ids[at + 1]]) for at in range(3, 8))
    layout = Layout.documents([0, 5], torch.arange(5)).asking([1])
    logprobs = model.logits(model.hidden(torch.tensor(ids[12:]), layout)).log_softmax(-1)
    expected -= sum(float(logprobs[at, ids[13 + at]]) for at in range(4))
    assert found == pytest.approx(expected, rel=1e-4)


def test_dropout(base: Callable[[str], Base]) -> None:
    model = trained(under(base("llama").path, **LOREFT, reft_dropout=0.5))
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_refusals(base: Callable[[str], Base], tmp_path: Path) -> None:
    path = base("llama").path
    for changes, part in (
        ({"reft_layers": [2]}, "the model has layers 0 to 1"),
        ({"reft_layers": "x"}, "the model has layers 0 to 1"),
        ({"reft_position": "f0"}, "names no token"),
        ({"lora_rank": 25}, "does not fit into states of 24"),
    ):
        with pytest.raises(ConfigError, match=part):
            under(path, **LOREFT | changes)
    folder = saved(under(path, **LOREFT), tmp_path / "a", path)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    for values, part in (
        ({"layers": [5]}, "edits layer 5, which the base model does not have"),
        ({"layers": "all"}, "is no list of layers"),
        ({"position": "first"}, "names no token"),
        ({"act_fn": "gelu"}, "are not known"),
        ({"r": 2}, "has shape"),
    ):
        config.write_text(json.dumps(settings | values))
        with pytest.raises(CheckpointError, match=part):
            read(path, folder)
    config.write_text(json.dumps(settings))
    stored = load_file(folder / WEIGHTS)
    lost = next(iter(stored))
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        read(path, folder)
