"""One update: clipping, what a broken step leaves, and the keys of randomness. Sums over splits: tests/invariance."""

import math

import pytest
import torch

from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import (
    Gradients,
    NonFiniteError,
    global_norm,
    run_step,
    run_step_in_backward,
    seed_step,
)
from tiny import batches_of, one_step, random_samples, tiny_decoder

BATCHES = batches_of(random_samples((9, 20, 4)), 2)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def update(model, *, max_grad_norm=0.0, lr=0.0, batches=BATCHES):
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    return run_step(model, OBJECTIVE, batches, optimizer, lr=lr, max_grad_norm=max_grad_norm), optimizer


def test_result():
    model = tiny_decoder()
    result, _ = update(model)
    expected = one_step(model, BATCHES)
    assert result.total / result.count == pytest.approx(expected.loss, rel=1e-6)
    assert result.count == sum(batch.num_trained for batch in BATCHES)
    assert result.num_tokens == 33
    norm = math.sqrt(sum(float(grad.double().norm()) ** 2 for grad in expected.grads.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters()), "gradients are freed"


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_scales_what_the_optimizer_sees_and_reports_the_norm_before(limit):
    model = tiny_decoder()
    grads = one_step(model, BATCHES).grads
    norm = global_norm(grads.values())
    result, optimizer = update(model, max_grad_norm=limit)
    assert result.grad_norm == pytest.approx(norm)
    factor = 0.5 / norm if limit == 0.5 else 1.0
    first = optimizer.state_tensors()["final_norm.weight/exp_avg"]
    # The first moment after one step is (1 - beta1) times the clipped gradient.
    torch.testing.assert_close(first, 0.1 * factor * grads["final_norm.weight"], rtol=1e-4, atol=1e-9)


def broken_weights():
    model = tiny_decoder()
    with torch.no_grad():
        model.layers[1].attention.qkv.weight[3, 5] = math.nan
    return model


def test_nan_is_noticed_and_nothing_applied():
    model = broken_weights()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        run_step(model, OBJECTIVE, BATCHES, optimizer, lr=1.0, max_grad_norm=1.0)
    assert optimizer.step_count == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))
        assert parameter.grad is None
    assert all(not tensor.any() for tensor in optimizer.state_tensors().values())


def test_a_gradient_that_overflows_is_noticed():
    model = tiny_decoder()
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 1e38 * 1e38)
    with pytest.raises(NonFiniteError, match="the gradient norm is"):
        update(model, lr=1.0)


def test_unreached_parameters_count_as_zero():
    model = tiny_decoder()
    model.layers[0].requires_grad_(False)
    extra = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("unused", extra)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(trained, AdamWSettings())
    run_step(model, OBJECTIVE, BATCHES, optimizer, lr=0.1, max_grad_norm=1.0)
    assert torch.equal(extra, torch.ones(3))


def test_random_numbers_are_keyed():
    def draw(seed, purpose, step):
        seed_step(seed, purpose, step)
        return torch.rand(4).tolist()

    assert draw(1, "step", 5) == draw(1, "step", 5)
    assert len({tuple(draw(*key)) for key in [(1, "step", 5), (2, "step", 5), (1, "other", 5), (1, "step", 6)]}) == 4
    draw(2**40, "step", 1)


def test_inspect_sees_the_step_before_the_update():
    model = tiny_decoder()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    seen = []

    def inspect(result):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        seen.append(result)

    result = run_step(model, OBJECTIVE, BATCHES, optimizer, lr=0.1, max_grad_norm=1.0, inspect=inspect)
    assert seen == [result] and optimizer.step_count == 1
    assert not torch.equal(model.head.weight, before[-1])


def test_inspect_can_stop_the_step():
    model = tiny_decoder()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AdamW(model.named_parameters(), AdamWSettings())

    def refuse(result):
        raise RuntimeError(f"loss {result.total}")

    with pytest.raises(RuntimeError, match="loss"):
        run_step(model, OBJECTIVE, BATCHES, optimizer, lr=0.1, max_grad_norm=1.0, inspect=refuse)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters()) and optimizer.step_count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_gradients_are_taken_over_one_by_one(dtype):
    """While one micro-batch's gradients come in, at most one exists in bf16; the sums are fp32."""
    model = tiny_decoder().to(dtype)
    gradients = Gradients(model, wide=True)
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    for batch in BATCHES:
        OBJECTIVE(model, batch, 1.0).loss.backward()
    assert (max(alive) == 0) == (dtype == torch.bfloat16) and len(alive) == 2 * len(list(model.parameters()))
    assert {grad.dtype for grad in gradients.result().values()} == {torch.float32}
    gradients.clear()
    OBJECTIVE(model, BATCHES[0], 1.0).loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}, "a cleared one has let go"


def test_unreached_gradients_take_no_memory():
    model = tiny_decoder()
    grads = Gradients(model, wide=False).result()
    assert all(grad.untyped_storage().nbytes() == 4 and not grad.any() for grad in grads.values())
    assert {name: grad.shape for name, grad in grads.items()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_in_backward_no_gradient_outlives_its_update(family, recompute):
    """Also with tied embeddings, whose gradient has two sources, and recomputed blocks."""
    batch = batches_of(random_samples((9, 20, 4)), 3)[0]
    usual, early = tiny_decoder(family), tiny_decoder(family)
    if recompute:
        from oarsmith.models.recompute import Recompute

        usual.recompute = early.recompute = Recompute()
    first, second = (AdamW(model.named_parameters(), AdamWSettings()) for model in (usual, early))
    alive = []
    second_update = second.update

    def counting(name, grad, **numbers):
        alive.append(sum(p.grad is not None for p in early.parameters()))
        second_update(name, grad, **numbers)

    second.update = counting
    expected = run_step(usual, OBJECTIVE, [batch], first, lr=0.01, max_grad_norm=0.0)
    found = run_step_in_backward(early, OBJECTIVE, batch, second, lr=0.01)
    assert found == expected and max(alive) == 0 and len(alive) == len(list(early.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), early.parameters(), strict=True))
    for parameter in early.parameters():
        assert not parameter._post_accumulate_grad_hooks, "nothing stays behind"


def test_in_backward_parameters_without_a_gradient_decay_all_the_same():
    results = []
    for in_backward in (False, True):
        model = tiny_decoder()
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, 3)))
        optimizer = AdamW(model.named_parameters(), AdamWSettings(weight_decay=0.5))
        if in_backward:
            run_step_in_backward(model, OBJECTIVE, BATCHES[0], optimizer, lr=0.1)
        else:
            run_step(model, OBJECTIVE, BATCHES[:1], optimizer, lr=0.1, max_grad_norm=0.0)
        results.append(model.unused.detach())
    assert torch.equal(*results) and results[0][0, 0] == pytest.approx(0.95)


def test_in_backward_a_gradient_that_is_not_finite_is_not_applied():
    model = tiny_decoder()
    name = "layers.1.attention.qkv.weight"
    parameters = dict(model.named_parameters())
    parameters[name].register_hook(lambda grad: grad * math.inf)
    before = {other: parameter.detach().clone() for other, parameter in parameters.items()}
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    with pytest.raises(NonFiniteError, match=f"the gradient of {name} is not finite; parameters of later") as caught:
        run_step_in_backward(model, OBJECTIVE, BATCHES[0], optimizer, lr=0.1)
    assert caught.value.partly_updated and "last checkpoint" in caught.value.fix
    changed = {other for other, parameter in parameters.items() if not torch.equal(parameter, before[other])}
    assert "head.weight" in changed and name not in changed
    assert not any(other.startswith(("layers.0.", "embedding")) for other in changed)
    assert not parameters[name]._post_accumulate_grad_hooks


def test_in_backward_a_loss_that_is_not_finite_updates_nothing():
    model = broken_weights()
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    with pytest.raises(NonFiniteError, match="the loss is nan") as caught:
        run_step_in_backward(model, OBJECTIVE, BATCHES[0], optimizer, lr=1.0)
    assert not caught.value.partly_updated
    assert all(not tensor.any() for tensor in optimizer.state_tensors().values())


def test_norm_of_bf16_gradients():
    grads = [torch.randn(300, 70).bfloat16(), torch.randn(5), torch.zeros(()).expand(4, 4)]
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert global_norm(grads) == pytest.approx(exact, rel=1e-6)
