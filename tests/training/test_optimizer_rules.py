"""What every rule owes: exact masters, bitwise resuming, the same numbers in backward and in host memory, learning."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from oarsmith.errors import CheckpointError
from oarsmith.kernels.masters import join_master
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.models.decoder import Decoder
from oarsmith.training.optimizer import (
    AdafactorSettings,
    Adam8bit,
    AdamMini,
    AdamW,
    AdamWSettings,
    ApolloSettings,
    GaLoreSettings,
    MuonSettings,
    Optimizer,
    adafactor,
    apollo,
    block_matrices,
    embedding_names,
    fused_matrices,
    galore,
    muon,
    offloaded,
    step_size_units,
)
from oarsmith.training.optimizers.offload import Offloaded
from oarsmith.training.step import run_step, run_step_in_backward
from tiny import batches_of, random_samples, tiny_decoder

Named = Iterable[tuple[str, nn.Parameter]]
ADAM = AdamWSettings(weight_decay=0.1)
RULES: dict[str, Callable[[Named, Decoder], Optimizer]] = {
    "adamw": lambda named, model: AdamW(named, ADAM),
    "adamw_8bit": lambda named, model: Adam8bit(named, ADAM, wide=embedding_names(model)),
    "adamw_mini": lambda named, model: AdamMini(named, ADAM, step_size_units(model)),
    "adafactor": lambda named, model: adafactor(named, AdafactorSettings(weight_decay=0.1), fused_matrices(model)),
    "muon": lambda named, model: muon(named, MuonSettings(others=ADAM), block_matrices(model)),
    "galore": lambda named, model: galore(named, GaLoreSettings(rank=4, steps=3, adam=ADAM), block_matrices(model)),
    "apollo": lambda named, model: apollo(named, ApolloSettings(rank=4, steps=3, adam=ADAM), block_matrices(model)),
    "apollo_mini": lambda named, model: apollo(
        named, ApolloSettings(rank=1, steps=3, scale=128**0.5, scaling="tensor", adam=ADAM), block_matrices(model)
    ),
}
BATCHES = batches_of(random_samples((30, 11, 4, 22)), 4)
LR = 3e-3


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Callable[[Named, Decoder], Optimizer]:
    return RULES[request.param]


def model_of(dtype: torch.dtype = torch.float32) -> Decoder:
    """Weights that every dtype holds exactly."""
    return tiny_decoder().to(torch.bfloat16).to(torch.float16).float().to(dtype)


def grads_for(model: Decoder, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: (torch.randn(p.shape, generator=generator) * 0.01).to(dtype) for name, p in model.named_parameters()}


def steps(model: Decoder, optimizer: Optimizer, numbers: Iterable[int], dtype: torch.dtype = torch.float32) -> None:
    for number in numbers:
        optimizer.step(grads_for(model, number, dtype), lr=LR, grad_scale=0.5)


def same_weights(a: Decoder, b: Decoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_the_fp32_weights(rule: Callable[[Named, Decoder], Optimizer], dtype: torch.dtype) -> None:
    """bf16 and fp16 weights with their masters go bit for bit where fp32 weights go."""
    narrow, wide = model_of(dtype), model_of()
    first, second = rule(narrow.named_parameters(), narrow), rule(wide.named_parameters(), wide)
    steps(narrow, first, range(4))
    steps(wide, second, range(4))
    lost = 0
    for name, parameter in narrow.named_parameters():
        exact = dict(wide.named_parameters())[name].detach()
        assert torch.equal(first.master(name), exact), name
        # The nearest number of the dtype, or next to it on a tie; fp16's smallest step is 2^-24.
        torch.testing.assert_close(parameter.detach().float(), exact, rtol=2**-8, atol=2**-25)
        lost += int((parameter.detach().float() != exact).sum())
    assert lost > 1000, "the master holds what the weight cannot"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resuming_is_bitwise(rule: Callable[[Named, Decoder], Optimizer], dtype: torch.dtype) -> None:
    whole, resumed = model_of(dtype), model_of(dtype)
    optimizer = rule(whole.named_parameters(), whole)
    steps(whole, optimizer, range(4), dtype)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    again = rule(resumed.named_parameters(), resumed)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    again.load_state(saved, optimizer.step_count)
    steps(whole, optimizer, range(4, 8), dtype)
    steps(resumed, again, range(4, 8), dtype)
    assert same_weights(whole, resumed)
    assert all(torch.equal(tensor, again.state_tensors()[name]) for name, tensor in optimizer.state_tensors().items())
    assert again.step_count == 8


def test_state_of_another_rule_is_refused(rule: Callable[[Named, Decoder], Optimizer]) -> None:
    model = model_of()
    optimizer = rule(model.named_parameters(), model)
    tensors = dict(optimizer.state_tensors())
    name = next(iter(tensors))
    with pytest.raises(CheckpointError, match=f"does not fit this model and optimizer: {name}"):
        optimizer.load_state({**tensors, name: torch.zeros(1, 2, 3)}, 1)
    with pytest.raises(CheckpointError, match="x/y"):
        optimizer.load_state({**tensors, "x/y": torch.zeros(1)}, 1)


def test_updates_in_backward_are_the_same(rule: Callable[[Named, Decoder], Optimizer]) -> None:
    usual, early = model_of(torch.bfloat16), model_of(torch.bfloat16)
    first, second = rule(usual.named_parameters(), usual), rule(early.named_parameters(), early)
    for _ in range(3):
        expected = run_step(usual, OBJECTIVE, BATCHES, first, lr=LR, max_grad_norm=0.0)
        found = run_step_in_backward(early, OBJECTIVE, BATCHES[0], second, lr=LR)
        assert found == expected
    assert same_weights(usual, early) and second.step_count == 3
    assert all(torch.equal(tensor, second.state_tensors()[name]) for name, tensor in first.state_tensors().items())


def test_offloading_changes_nothing(rule: Callable[[Named, Decoder], Optimizer]) -> None:
    """On a CPU model, where the copies in host memory can be made all the same."""
    usual, away = model_of(torch.bfloat16), model_of(torch.bfloat16)
    first = rule(usual.named_parameters(), usual)
    second = Offloaded(away.named_parameters(), lambda named: rule(named, away))
    steps(usual, first, range(3), torch.bfloat16)
    steps(away, second, range(3), torch.bfloat16)
    assert same_weights(usual, away)
    saved = {name: tensor.clone() for name, tensor in second.state_tensors().items()}
    assert saved.keys() == first.state_tensors().keys()

    resumed = model_of(torch.bfloat16)
    third = Offloaded(resumed.named_parameters(), lambda named: rule(named, resumed))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in away.state_dict().items()})
    third.load_state(saved, 3)
    steps(usual, first, range(3, 5), torch.bfloat16)
    steps(resumed, third, range(3, 5), torch.bfloat16)
    assert same_weights(usual, resumed)
    assert all(torch.equal(third.master(name), first.master(name)) for name in first.parameters)


def test_offloading_is_for_accelerators() -> None:
    model = model_of()
    plain = offloaded(model.named_parameters(), lambda named: AdamW(named, ADAM))
    assert isinstance(plain, AdamW) and plain.parameters["head.weight"] is model.head.weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_from_a_gpu(rule: Callable[[Named, Decoder], Optimizer]) -> None:
    host, device = model_of(torch.bfloat16), model_of(torch.bfloat16).cuda()
    first = rule(host.named_parameters(), host)
    second = offloaded(device.named_parameters(), lambda named: rule(named, device))
    for number in range(3):
        grads = grads_for(host, number, torch.bfloat16)
        first.step(grads, lr=LR, grad_scale=0.5)
        second.step({name: grad.cuda() for name, grad in grads.items()}, lr=LR, grad_scale=0.5)
    assert all(torch.equal(p, q.cpu()) for p, q in zip(host.parameters(), device.parameters(), strict=True))
    assert {tensor.device.type for tensor in second.state_tensors().values()} == {"cpu"}


def test_learns(rule: Callable[[Named, Decoder], Optimizer]) -> None:
    model = model_of(torch.bfloat16)
    optimizer = rule(model.named_parameters(), model)
    losses = []
    for _ in range(12):
        result = run_step(model, OBJECTIVE, BATCHES, optimizer, lr=1e-2, max_grad_norm=1.0)
        losses.append(result.total / result.count)
    # 67 random tokens by heart; the start is ln(1120) = 7.0 and more.
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_changed_by_others_become_the_masters(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    for optimizer in (
        AdamW(model.named_parameters(), ADAM),
        Offloaded(model.named_parameters(), lambda named: AdamW(named, ADAM)),
    ):
        steps(model, optimizer, range(2))
        with torch.no_grad():
            model.head.weight.fill_(0.5)
        optimizer.adopt_weights()
        assert all(torch.equal(optimizer.master(name), p.detach().float()) for name, p in model.named_parameters())
        optimizer.step(grads_for(model, 9), lr=0.0, grad_scale=1.0)
        assert bool((model.head.weight == 0.5).all())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError, match="float64"):
        AdamW([("w", nn.Parameter(torch.zeros(2, dtype=torch.float64)))], ADAM)


def test_small_tensors_and_embeddings_keep_fp32_moments() -> None:
    model = model_of(torch.bfloat16)
    optimizer = Adam8bit(model.named_parameters(), ADAM, wide=embedding_names(model))
    kinds = {name: tensor.dtype for name, tensor in optimizer.state_tensors().items() if name.endswith("/exp_avg")}
    assert kinds["head.weight/exp_avg"] == torch.uint8
    assert kinds["embedding.weight/exp_avg"] == kinds["final_norm.weight/exp_avg"] == torch.float32
    assert kinds["layers.0.attention.qkv.weight/exp_avg"] == torch.float32, "2,048 elements"
    low = optimizer.state_tensors()["head.weight/low"]
    assert torch.equal(join_master(model.head.weight.data, low), optimizer.master("head.weight"))
