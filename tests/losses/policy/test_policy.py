"""Policy losses against values and gradients of TRL and verl (float64)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oarsmith.config.policy import PRESETS
from oarsmith.losses.policy.divergence import corrected_kl, estimate_kl, sampling_correction
from oarsmith.losses.policy.surrogates import SURROGATES, SurrogateOptions, log_ratios
from oarsmith.losses.policy.value import value_loss
from oarsmith.losses.policy.weights import token_weights

FIXTURES = Path(__file__).parents[2] / "fixtures" / "losses"
# Both sides compute in float64, in other orders.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(
    values: Tensor,
    old: Tensor,
    advantages: Tensor,
    sizes: list[int],
    *,
    level: Any,
    how: Any,
    options: SurrogateOptions,
) -> Tensor:
    ratio = log_ratios(values, old, sizes, level).exp()
    weights, count = token_weights(how, sizes, longest=16)
    return (SURROGATES["clipped"](values, ratio, advantages, options).loss_N * weights).sum() / count


@pytest.mark.parametrize(
    ("name", "level", "how"),
    [
        ("grpo_dapo", "token", "token-mean"),
        ("grpo_grpo", "token", "seq-mean-token-mean"),
        ("grpo_gspo", "sequence", "seq-mean-token-mean"),
    ],
)
def test_grpo_family_as_trl(name: str, level: str, how: str) -> None:
    case = read(name)
    given, asked = case["inputs"], case["hyperparameters"]
    mask = tensor(given["completion_mask"]).bool()
    sizes = mask.sum(-1).tolist()
    values = tensor(given["per_token_logps"])[mask].requires_grad_()
    old = tensor(given["old_per_token_logps"])[mask]
    advantages = tensor(given["advantages"]).repeat_interleave(torch.tensor(sizes))
    options = SurrogateOptions(clip_low=asked["epsilon"], clip_high=asked.get("epsilon_high", asked["epsilon"]))
    loss = loss_of(values, old, advantages, sizes, level=level, how=how, options=options)
    loss.backward()
    # TRL's weights of tokens are float32 sums in places.
    assert loss.item() == pytest.approx(case["expected"]["loss"], rel=1e-6)
    torch.testing.assert_close(
        values.grad, tensor(case["expected"]["grad_per_token_logps"])[mask], rtol=1e-5, atol=1e-8
    )


def test_rloo_as_its_definition() -> None:
    """mean over answers of -min(r A, clip(r) A), r = exp(sum of log p - log p_old): Ahmadian et al. 2024, TRL's
    RLOOTrainer."""
    draw = torch.Generator().manual_seed(3)
    sizes, advantages = [2, 5, 1], tensor([0.7, -1.1, 0.4])
    values = torch.randn(8, generator=draw, dtype=torch.float64).requires_grad_()
    old = values.detach() + 0.05 * torch.randn(8, generator=draw, dtype=torch.float64)
    ratios = torch.stack([part.sum() for part in (values - old).split(sizes)]).exp()
    expected = -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).mean()
    (expected_grad,) = torch.autograd.grad(expected, values, retain_graph=True)
    preset = PRESETS["rloo"]
    loss = loss_of(
        values,
        old,
        advantages.repeat_interleave(torch.tensor(sizes)),
        sizes,
        level=preset.level,
        how=preset.aggregation,
        options=SurrogateOptions(clip_low=preset.clip_low, clip_high=preset.clip_high),
    )
    (grad,) = torch.autograd.grad(loss, values)
    # Weights of tokens are float32.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)


def test_dual_clip_as_verl() -> None:
    case = read("ppo_vanilla_token-mean")
    given, asked = case["inputs"], case["hyperparameters"]
    mask = tensor(given["response_mask"]).bool()
    sizes = mask.sum(-1).tolist()
    values = tensor(given["log_prob"])[mask].requires_grad_()
    options = SurrogateOptions(
        clip_low=asked["clip_ratio"], clip_high=asked["clip_ratio"], dual_clip=asked["clip_ratio_c"]
    )
    old, advantages = tensor(given["old_log_prob"])[mask], tensor(given["advantages"])[mask]
    loss = loss_of(values, old, advantages, sizes, level="token", how="token-mean", options=options)
    loss.backward()
    assert loss.item() == pytest.approx(case["expected"]["loss"], rel=1e-9)
    torch.testing.assert_close(values.grad, tensor(case["expected"]["grad_log_prob"])[mask], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("how", ["k1", "abs", "k2", "k3"])
def test_kl_as_verl(how: Any) -> None:
    case = read("kl_estimators")
    found = estimate_kl(tensor(case["inputs"]["logprob"]), tensor(case["inputs"]["ref_logprob"]), how)
    torch.testing.assert_close(found, tensor(case["expected"][how]), **CLOSE)


def test_k3_is_bounded_where_asked() -> None:
    values, reference = tensor([-30.0]), tensor([0.0])
    assert estimate_kl(values, reference, "k3").item() == 10.0
    assert estimate_kl(values, reference, "k3", bounded=False).item() > 1e12


def test_value_loss_as_verl() -> None:
    case = read("value_loss_clip0.2")
    given = case["inputs"]
    mask = tensor(given["response_mask"]).bool()
    values, old, returns = (tensor(given[key])[mask] for key in ("vpreds", "values", "returns"))
    loss, cut = value_loss(values, old, returns, case["hyperparameters"]["cliprange_value"])
    assert loss.mean().item() == pytest.approx(case["expected"]["loss"], rel=1e-9)
    assert cut.double().mean().item() == pytest.approx(case["expected"]["clipfrac"], rel=1e-6)


def test_unclipped_value_loss_is_half_the_square() -> None:
    loss, cut = value_loss(tensor([1.0, 3.0]), tensor([0.0, 0.0]), tensor([2.0, 0.0]), None)
    assert loss.tolist() == [0.5, 4.5] and not cut.any()


def test_cispo_keeps_the_gradient_of_cut_tokens() -> None:
    values = tensor([0.0, 1.0, -2.0]).requires_grad_()
    ratio = (values - tensor([0.0, -1.0, 0.0])).exp()
    found = SURROGATES["cispo"](values, ratio, tensor([1.0, 1.0, -2.0]), SurrogateOptions(ceiling=5.0))
    found.loss_N.sum().backward()
    assert values.grad is not None
    # r = 1, e^2 (cut to 5), e^-2.
    torch.testing.assert_close(
        values.grad, tensor([-1.0, -5.0, 2.0]) * tensor([1.0, 1.0, 1.0]).mul(tensor([1.0, 1.0, 0.1353352832366127]))
    )
    assert found.high_N.tolist() == [False, True, False]


def test_sapo_on_policy_has_the_gradient_of_the_plain_loss() -> None:
    advantages = tensor([0.7, -1.3])
    grads = []
    for name in ("sapo", "plain"):
        values = tensor([-1.0, -2.0]).requires_grad_()
        ratio = (values - values.detach()).exp()
        SURROGATES[name](values, ratio, advantages, SurrogateOptions()).loss_N.sum().backward()
        grads.append(values.grad)
    torch.testing.assert_close(*grads, **CLOSE)  # type: ignore[arg-type]


def test_two_sided_clip_bounds_the_loss_of_bad_tokens() -> None:
    ratio, advantages = tensor([50.0]), tensor([-1.0])
    free = SURROGATES["clipped"](ratio.log(), ratio, advantages, SurrogateOptions())
    bound = SURROGATES["clipped"](ratio.log(), ratio, advantages, SurrogateOptions(two_sided=4.0))
    assert (free.loss_N.item(), bound.loss_N.item()) == (50.0, 4.0)


def test_weights_of_the_four_rules() -> None:
    sizes, kept = [2, 3, 1], [True, False, True]
    found = {
        how: (weights.tolist(), count)
        for how in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
        for weights, count in [token_weights(how, sizes, kept=kept, longest=10)]  # type: ignore[arg-type]
    }
    assert found["token-mean"] == ([1, 1, 0, 0, 0, 1], 3.0)
    assert found["seq-mean-token-mean"] == ([0.5, 0.5, 0, 0, 0, 1], 3.0)
    assert found["seq-mean-token-sum"] == ([1, 1, 0, 0, 0, 1], 3.0)
    assert found["seq-mean-token-sum-norm"] == ([1, 1, 0, 0, 0, 1], 30.0)


def test_sampling_correction_modes() -> None:
    old, sampled, sizes = tensor([0.0, 1.0, 0.5]), tensor([0.0, 0.0, 0.0]), [2, 1]
    exp = torch.exp(tensor([0.0, 1.0, 0.5]))
    found = {
        how: sampling_correction(old, sampled, sizes, how, 2.0)
        for how in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    }
    torch.testing.assert_close(found["token_truncate"], exp.clamp(max=2.0))
    torch.testing.assert_close(found["token_mask"], tensor([1.0, 0.0, exp[2].item()]))
    torch.testing.assert_close(found["sequence_truncate"], tensor([2.0, 2.0, exp[2].item()]))
    torch.testing.assert_close(found["sequence_mask"], tensor([0.0, 0.0, exp[2].item()]))


def test_corrected_kl_is_the_kl_times_the_ratio() -> None:
    assert corrected_kl(tensor([2.0]), tensor([0.5])).item() == 1.0
