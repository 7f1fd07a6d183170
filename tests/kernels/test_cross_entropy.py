"""Head and cross-entropy in chunks against one big cross_entropy with autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels import cross_entropy, head_loss, token_logprobs, token_logprobs_squares
from oarsmith.kernels.select import library, using

from .conftest import randn

# Sums in another order; bf16: logits are rounded to 8 bits of mantissa before the softmax, the gradient after it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> object:
    """Both implementations have to pass."""
    if request.param == "native" and library() is None:
        pytest.skip("no compiled kernels here")
    with using(request.param):
        yield request.param


@pytest.fixture(params=["one chunk", "many pieces", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A chunk and a piece of one never have fewer than 64 tokens, so 150 tokens make three."""
    if request.param != "one chunk":
        monkeypatch.setattr(cross_entropy, "PIECE_BYTES", 1)
    if request.param == "many chunks":
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    return 3 if request.param == "many chunks" else 1


def problem(num_tokens: int, dtype: torch.dtype, vocab: int = 37, dim: int = 9) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = randn(num_tokens, dim, dtype=dtype), randn(vocab, dim, dtype=dtype, seed=1)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets, torch.rand(num_tokens, generator=generator)


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 leaves and the log-probabilities."""
    leaves = hidden.double().detach().requires_grad_(), weight.double().detach().requires_grad_()
    logits = leaves[0] @ leaves[1].t()
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    return *leaves, -functional.cross_entropy(logits, targets, reduction="none")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 150])
def test_head_loss(backend: str, chunks: int, num_tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, coef = problem(num_tokens, dtype)
    wide_hidden, wide_weight, logprobs = exact(hidden, weight, targets)
    (-(coef.double() * logprobs).sum()).backward()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = head_loss(*leaves, targets, coef)
    result.loss.backward()
    close(result.loss.detach(), -(coef.double() * logprobs.detach()).sum(), dtype)
    close(result.logprobs_N, logprobs.detach(), dtype)
    for leaf, wide in zip(leaves, (wide_hidden, wide_weight), strict=True):
        assert leaf.grad is not None and wide.grad is not None and leaf.grad.dtype == dtype
        close(leaf.grad, wide.grad, dtype)
    with torch.no_grad():
        again = head_loss(*leaves, targets, coef)
    assert torch.equal(again.loss, result.loss.detach()) and torch.equal(again.logprobs_N, result.logprobs_N)
    hits = (hidden.float() @ weight.float().t()).argmax(-1) == targets
    if dtype == torch.float32:  # bf16 logits can tie
        assert torch.equal(result.correct_N, hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(backend: str, chunks: int, dtype: torch.dtype) -> None:
    """A loss whose coefficients depend on the log-probabilities."""
    hidden, weight, targets, _ = problem(150, dtype)

    def objective(logprobs: Tensor) -> Tensor:
        return -functional.logsigmoid(logprobs.unflatten(0, (2, 75)).sum(-1) / 10).sum()

    wide_hidden, wide_weight, logprobs = exact(hidden, weight, targets)
    objective(logprobs).backward()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = token_logprobs(*leaves, targets)
    assert found.dtype == torch.float32
    close(found.detach(), logprobs.detach(), dtype)
    objective(found).backward()
    # Three chunks of bf16 gradients, each rounded.
    for leaf, wide in zip(leaves, (wide_hidden, wide_weight), strict=True):
        assert leaf.grad is not None and wide.grad is not None
        close(leaf.grad, wide.grad, dtype)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precise_logprobs(backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cap: float | None) -> None:
    """As exact in 16 bits as in fp32, in several blocks of both sides; gradients are those of the other way."""
    monkeypatch.setattr(cross_entropy, "PRECISE_ROWS", 16)
    monkeypatch.setattr(cross_entropy, "PRECISE_TOKENS", 64)
    hidden, weight, targets, coef = problem(150, dtype)
    wide_hidden, wide_weight, logprobs = exact(hidden, weight, targets, cap)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = token_logprobs(*leaves, targets, softcap=cap, precise=True)
    close(found.detach(), logprobs.detach(), torch.float32)
    rounded = token_logprobs(*leaves, targets, softcap=cap)
    if dtype == torch.bfloat16:
        assert (rounded - logprobs).abs().max() > 100 * (found - logprobs).abs().max()
    grads = [torch.autograd.grad((coef * of).sum(), leaves) for of in (found, rounded)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    again, squares = token_logprobs_squares(*leaves, targets, softcap=cap)
    assert torch.equal(again, found) and squares.dtype == torch.float32 and not squares.requires_grad
    logits = wide_hidden.detach() @ wide_weight.detach().t()
    p = (logits if cap is None else (logits / cap).tanh() * cap).softmax(-1)
    close(squares, p.square().sum(-1).log(), torch.float32)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 65, 150])
def test_softcap(backend: str, chunks: int, num_tokens: int, dtype: torch.dtype) -> None:
    """Logits far into the bend (up to 4 times the cap): values and both gradients, through either function."""
    hidden, weight, targets, coef = problem(num_tokens, dtype)
    cap = 2.0
    assert num_tokens == 1 or float((hidden.float() @ weight.float().t()).abs().max()) > 4 * cap
    wide_hidden, wide_weight, logprobs = exact(hidden, weight, targets, cap)
    (-(coef.double() * logprobs).sum()).backward()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = head_loss(*leaves, targets, coef, softcap=cap)
    found = token_logprobs(*leaves, targets, softcap=cap)
    close(result.logprobs_N, logprobs.detach(), dtype)
    close(found.detach(), logprobs.detach(), dtype)
    close(result.loss.detach(), -(coef.double() * logprobs.detach()).sum(), dtype)
    for loss in (result.loss, -(coef * found).sum()):
        for have, wide in zip(torch.autograd.grad(loss, leaves), (wide_hidden, wide_weight), strict=True):
            assert wide.grad is not None and have.dtype == dtype
            close(have, wide.grad, dtype)
    with torch.no_grad():
        free = head_loss(*leaves, targets, coef)
    assert not torch.allclose(free.logprobs_N, result.logprobs_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_tokens", [1, 65, 150])
def test_z_loss(backend: str, chunks: int, num_tokens: int, softcap: float | None, dtype: torch.dtype) -> None:
    """coef * z * lse^2 beside the cross-entropy, with a z so large that its gradient is as large as the other."""
    hidden, weight, targets, coef = problem(num_tokens, dtype)
    z, (wide_hidden, wide_weight, logprobs) = 0.2, exact(hidden, weight, targets, softcap)
    logits = wide_hidden @ wide_weight.t()
    lse = (logits if softcap is None else (logits / softcap).tanh() * softcap).logsumexp(-1)
    expected = (coef.double() * (z * lse.square() - logprobs)).sum()
    wide_grads = torch.autograd.grad(expected, (wide_hidden, wide_weight))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = head_loss(*leaves, targets, coef, softcap=softcap, z_loss=z)
    close(result.loss.detach(), expected.detach(), dtype)
    close(result.lse_N, lse.detach(), dtype)
    plain = head_loss(*leaves, targets, coef, softcap=softcap)
    assert torch.equal(plain.logprobs_N, result.logprobs_N), "what is reported stays the cross-entropy"
    grads, plain_grads = (torch.autograd.grad(found.loss, leaves) for found in (result, plain))
    for have, without, wide in zip(grads, plain_grads, wide_grads, strict=True):
        assert have.dtype == dtype and not torch.allclose(have, without, rtol=0.1)
        close(have, wide, dtype)
    with torch.no_grad():
        again = head_loss(*leaves, targets, coef, softcap=softcap, z_loss=z)
    assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


def test_z_loss_pulls_the_denominator_to_one(backend: str) -> None:
    """Logits shifted by a constant have the same probabilities; the z term alone tells them apart."""
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + 4.0
    losses = [
        head_loss(logits - shift, torch.eye(5), torch.zeros(8, dtype=torch.int64), torch.ones(8), z_loss=0.1).loss
        for shift in (0.0, 4.0)
    ]
    assert losses[0] > losses[1] + 8 * 0.1 * 4.0


def test_softcap_of_huge_logits(backend: str) -> None:
    """tanh is flat there: a finite loss, and a gradient of exactly zero."""
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = head_loss(hidden, weight, torch.tensor([1, 1]), torch.ones(2), softcap=5.0).loss
    loss.backward()
    assert loss.item() == pytest.approx(10.0, abs=1e-3)
    assert hidden.grad is not None and not hidden.grad.any()


def test_loss_scaled_from_outside(backend: str) -> None:
    hidden, weight, targets, coef = problem(20, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    once = torch.autograd.grad(head_loss(hidden, weight, targets, coef).loss, (hidden, weight))
    scaled = torch.autograd.grad(head_loss(hidden, weight, targets, coef).loss * -2.5, (hidden, weight))
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a * -2.5, b)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(backend: str, wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets, coef = problem(20, torch.float32)
    both = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(head_loss(*both, targets, coef).loss, both)
    leaves = hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    head_loss(*leaves, targets, coef).loss.backward()
    for leaf, asked, value in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(leaf.grad, value) if asked else leaf.grad is None


def test_no_tokens(backend: str) -> None:
    hidden, weight, targets, coef = problem(0, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    result = head_loss(hidden, weight, targets, coef)
    result.loss.backward()
    assert result.loss.item() == 0 and weight.grad is not None and not weight.grad.any()
    assert token_logprobs(hidden, weight, targets).shape == (0,)
    assert token_logprobs(hidden, weight, targets, precise=True).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, targets, coef = problem(11, dtype)
    views = torch.cat((hidden, hidden), -1)[:, :9], weight.t().contiguous().t()
    assert not views[0].is_contiguous() and not views[1].is_contiguous()
    found, expected = (
        torch.autograd.grad(head_loss(*leaves, targets, coef).loss, leaves)
        for leaves in ([x.detach().requires_grad_() for x in pair] for pair in (views, (hidden, weight)))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_same_call_twice(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    torch.set_num_threads(2)
    hidden, weight, targets, coef = problem(150, torch.bfloat16, vocab=101)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        result = head_loss(*leaves, targets, coef)
        return result.loss.detach(), *torch.autograd.grad(result.loss, leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_nan_and_infinity_stay(backend: str) -> None:
    hidden, weight, targets, coef = problem(6, torch.float32)
    hidden[2, 3] = math.nan
    hidden.requires_grad_()
    result = head_loss(hidden, weight, targets, coef)
    assert result.logprobs_N.isnan().tolist() == [False, False, True, False, False, False]
    assert result.loss.isnan()
    (grad,) = torch.autograd.grad(result.loss, hidden)
    assert grad[2].isnan().all() and grad[3].isfinite().all()


IMPROBABLE = [
    lambda h, w, t: head_loss(h, w, t, torch.ones(2)).loss,
    token_logprobs,
    lambda h, w, t: token_logprobs(h, w, t, precise=True),
]


@pytest.mark.parametrize("call", IMPROBABLE)
def test_improbable_target(backend: str, call: Callable[..., Tensor]) -> None:
    """-log p far beyond what exp can hold is still exact."""
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    found = call(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))
    assert found.abs().sum().item() == pytest.approx(600.0)


def test_targets_outside_the_vocabulary_are_refused(backend: str) -> None:
    """The kernel writes at the target: a wrong one would damage memory."""
    hidden, weight, targets, coef = problem(6, torch.float32)
    for wrong in (-100, 37):
        targets[3] = wrong
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            head_loss(hidden, weight, targets, coef)
        with pytest.raises(AssertionError):
            token_logprobs(hidden, weight, targets, precise=True)


def test_coefficients_get_no_gradient(backend: str) -> None:
    hidden, weight, targets, coef = problem(6, torch.float32)
    with pytest.raises(AssertionError, match="token_logprobs"):
        head_loss(hidden.requires_grad_(), weight, targets, coef.requires_grad_())
