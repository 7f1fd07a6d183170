"""AdamW against torch.optim, its state in a checkpoint, and what a bf16 weight keeps between updates."""

import pytest
import torch
from torch import nn

from oarsmith.errors import CheckpointError
from oarsmith.training.optimizer import AdamW, AdamWSettings

SETTINGS = AdamWSettings(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
SHAPES = {"matrix": (7, 5), "bias": (11,)}


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step, dtype=torch.float32):
    return {name: p.detach() for name, p in parameters(dtype, seed=100 + step).items()}


def updated(own, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.step(gradients(step, dtype), lr=0.01, grad_scale=0.5)
    return own


def test_as_torch_with_decay_on_matrices_alone():
    own, theirs = parameters(), parameters()
    updated(own, AdamW(own.items(), SETTINGS), range(20))
    reference = torch.optim.AdamW(
        [{"params": [theirs["matrix"]], "weight_decay": 0.3}, {"params": [theirs["bias"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in range(20):
        for name, grad in gradients(step).items():
            theirs[name].grad = grad * 0.5
        reference.step()
    for name in own:
        # fp32 in another order of operations, 20 times.
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_bitwise(dtype):
    own = parameters(dtype)
    whole = AdamW(own.items(), SETTINGS)
    updated(own, whole, range(5), dtype)
    saved = {name: tensor.clone() for name, tensor in whole.state_tensors().items()}
    copy = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
    resumed = AdamW(copy.items(), SETTINGS)
    resumed.load_state(saved, whole.step_count)
    updated(own, whole, range(5, 9), dtype)
    updated(copy, resumed, range(5, 9), dtype)
    for name in own:
        assert torch.equal(own[name], copy[name])
    assert all(torch.equal(tensor, resumed.state_tensors()[name]) for name, tensor in whole.state_tensors().items())


def test_bf16_weights_lose_nothing_between_updates():
    """Updates far below bf16's resolution add up, because the remainder is kept: as an fp32 weight would."""
    tiny = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = AdamW([("w", tiny)], AdamWSettings())
    for _ in range(100):
        optimizer.step({"w": torch.ones(8, 8, dtype=torch.bfloat16)}, lr=1e-4, grad_scale=1.0)
    # 100 steps of about 1e-4 each; a single one is a 40th of bf16's step below 1.
    torch.testing.assert_close(tiny.detach().float(), torch.full((8, 8), 0.99), rtol=0, atol=2**-9)


def test_state_of_another_model_is_refused():
    optimizer = AdamW(parameters().items(), SETTINGS)
    tensors = optimizer.state_tensors()
    tensors["other/exp_avg"] = tensors.pop("bias/exp_avg")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        optimizer.load_state(tensors, 3)


def test_state_has_its_memory_from_the_start():
    optimizer = AdamW(parameters(torch.bfloat16).items(), SETTINGS)
    kinds = {name.split("/")[1]: tensor.dtype for name, tensor in optimizer.state_tensors().items()}
    assert kinds == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "low": torch.int16}
