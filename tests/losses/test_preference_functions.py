"""Every loss of a pair: TRL's own functions where it has them, the formula in float64 elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oarsmith.errors import ConfigError
from oarsmith.losses.preference.objective import PreferenceLoss
from oarsmith.losses.preference.pairs import Options, Pairs, WholeStep
from oarsmith.losses.preference.table import ALIASES, LOSS_TYPES

IN_TRL = [
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "discopop",
    "bco_pair",
    "nca_pair",
    "sppo_hard",
]
IN_TRL += ["apo_zero", "apo_down", "aot", "aot_unpaired"]
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's functions."""
    pytest.importorskip("trl")
    from . import trl_parts

    return trl_parts


def made_tokens(
    seed: int = 0, count: int = 7, length: int = 9, dtype: torch.dtype = torch.float64, size: float = 3.0
) -> Any:
    """Log-probabilities of tokens; log-ratios of answers of about ``size``."""
    from .trl_parts import Tokens

    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, length + 1, (2 * count,), generator=draw)
    mask = (torch.arange(length) < sizes[:, None]).long()
    logprobs = (-3 * torch.rand(2 * count, length, generator=draw, dtype=torch.float64) - 0.05).to(dtype)
    squares = -2 * torch.rand(2 * count, length, generator=draw, dtype=torch.float64).to(dtype)
    noise = size * torch.randn(2 * count, generator=draw, dtype=torch.float64).to(dtype)
    return Tokens(logprobs.requires_grad_(), squares, mask, (logprobs.detach() * mask).sum(1) + noise)


def pairs_of(tokens: Any) -> Pairs:
    sums, sizes = tokens.masked.sum(1).double(), tokens.mask.sum(1).double()
    return Pairs(*(part for values in (sums, tokens.references.double(), sizes) for part in values.chunk(2)))


def same(tokens: Any, ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    """Values and gradients."""
    grads = [torch.autograd.grad(loss, tokens.logprobs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
    assert float(grads[0].abs().sum()) > 0


def mean_loss(names: list[str], pairs: Pairs, options: Options, weights: list[float] | None = None) -> Tensor:
    loss = PreferenceLoss(terms=tuple(zip(names, weights or [1.0] * len(names), strict=True)), options=options)
    return loss.loss(pairs, loss.step_alone(pairs)).mean()


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("name", IN_TRL)
def test_trl(trl: Any, name: str, beta: float) -> None:
    smoothing = 0.2 if name in {"robust", "exo_pair", "aot", "aot_unpaired"} else 0.0
    tokens = made_tokens()
    theirs, _ = trl.dpo(tokens, [name], beta=beta, label_smoothing=smoothing)
    # Its exo_pair takes the smoothing in fp32.
    tolerance = 1e-7 if name == "exo_pair" else 1e-9
    same(tokens, mean_loss([name], pairs_of(tokens), Options(beta=beta, label_smoothing=smoothing)), theirs, tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [name for name in IN_TRL if LOSS_TYPES[name].divergences])
def test_trl_divergences(trl: Any, name: str, divergence: Any) -> None:
    # TRL's has no float64, and its discopop is nan at larger sizes.
    tokens = made_tokens(dtype=torch.float32, size=1.0)
    theirs, _ = trl.dpo(tokens, [name], f_divergence_type=divergence, f_alpha_divergence_coef=0.3, label_smoothing=0.1)
    smoothing = 0.1 if name in {"robust", "exo_pair"} else 0.0
    options = Options(f_divergence=divergence, f_alpha=0.3, label_smoothing=smoothing)
    same(tokens, mean_loss([name], pairs_of(tokens), options), theirs, tolerance=3e-5)


def test_trl_mixed(trl: Any) -> None:
    """MPO's mixture, without its SFT part."""
    tokens = made_tokens(1)
    theirs, _ = trl.dpo(tokens, ["sigmoid", "bco_pair", "apo_zero"], [0.8, 0.2, 1.5])
    same(tokens, mean_loss(["sigmoid", "bco_pair", "apo_zero"], pairs_of(tokens), Options(), [0.8, 0.2, 1.5]), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_trl_without_reference(trl: Any, name: str, smoothing: float) -> None:
    tokens = made_tokens(2)
    pairs = pairs_of(tokens)
    chosen, rejected = pairs.means if name == "simpo" else (pairs.chosen, pairs.rejected)
    kind = "sigmoid" if name == "cpo" else "simpo"
    theirs = trl.cpo(chosen, rejected, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing, loss_type=kind)
    same(tokens, mean_loss([name], pairs, Options(beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing)), theirs)


def test_trl_odds_ratio(trl: Any) -> None:
    tokens = made_tokens(3)
    pairs = pairs_of(tokens)
    theirs = trl.odds_ratio(*pairs.means, beta=0.3)
    same(tokens, mean_loss(["orpo"], pairs, Options(beta=0.3)), theirs, tolerance=1e-6)  # it computes in fp32
    same(tokens, mean_loss(["or"], pairs, Options(beta=0.3)), theirs / 0.3, tolerance=1e-6)


def hand(chosen: float, rejected: float, chosen_reference: float, rejected_reference: float) -> Pairs:
    values = chosen, rejected, chosen_reference, rejected_reference, 4.0, 8.0
    return Pairs(*(torch.tensor([value], dtype=torch.float64) for value in values))


def s(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def one(name: str, pairs: Pairs, **options: Any) -> float:
    function = LOSS_TYPES[name].function
    assert function is not None
    return float(function(pairs, Options(**options), WholeStep.of(pairs)))


def test_by_hand() -> None:
    """One pair: r_c = -3, r_r = -7, z = 4."""
    pairs = hand(-13.0, -27.0, -10.0, -20.0)
    assert one("sigmoid", pairs, beta=0.5, label_smoothing=0.1) == pytest.approx(
        -0.9 * math.log(s(2)) - 0.1 * math.log(s(-2))
    )
    assert one("dpop_added", pairs, beta=0.5, dpop_lambda=5.0) == pytest.approx(-math.log(s(2)) + 15)
    assert one("dpop", pairs, beta=0.5, dpop_lambda=5.0) == pytest.approx(-math.log(s(0.5 * (4 - 15))))
    above = hand(-9.0, -27.0, -10.0, -20.0)
    assert one("dpop", above, beta=0.5) == one("dpop_added", above, beta=0.5) == one("sigmoid", above, beta=0.5)
    # Both means are below 0.
    assert one("kto_pair", pairs, beta=0.5) == pytest.approx(0.5 * ((1 - s(-1.5)) + (1 - s(3.5))))
    assert one("simpo", pairs, beta=2.0, simpo_gamma=0.5) == pytest.approx(-math.log(s(2 * (-3.25 + 3.375) - 0.5)))


def test_kto_pair_uses_the_other_sides_mean() -> None:
    """Two pairs: KL_c = 1, KL_r = 4; no gradient through them."""
    values = [[-4.0, -2.0], [-3.0, 1.0], [-6.0, -2.0], [-3.0, -7.0], [1.0, 1.0], [1.0, 1.0]]
    pairs = Pairs(*(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values))
    assert pairs.chosen_ratio.tolist() == [2.0, 0.0] and pairs.rejected_ratio.tolist() == [0.0, 8.0]
    losses = LOSS_TYPES["kto_pair"].function(pairs, Options(beta=1.0), WholeStep.of(pairs))  # type: ignore[misc]
    expected = [0.5 * ((1 - s(c - 4)) + (1 - s(1 - r))) for c, r in ((2.0, 0.0), (0.0, 8.0))]
    assert losses.tolist() == pytest.approx(expected)
    losses.sum().backward()
    assert pairs.chosen.grad is not None
    assert pairs.chosen.grad.tolist() == pytest.approx([-0.5 * s(c - 4) * s(4 - c) for c in (2.0, 0.0)])


def test_bco_shift_is_the_mean_of_earlier_steps() -> None:
    loss = PreferenceLoss(terms=(("bco_pair", 1.0),))
    loss.note({"border": 3.0}, 2.0)
    loss.note({"border": 6.0}, 4.0)
    again = PreferenceLoss(terms=(("bco_pair", 1.0),))
    again.load_state(loss.state())
    pairs = hand(-13.0, -27.0, -10.0, -20.0)
    value = float(again.loss(pairs, again.step_alone(pairs)))
    assert value == pytest.approx(-math.log(s(-0.3 - 1.5)) - math.log(s(-(-0.7 - 1.5))))


@pytest.mark.parametrize("extreme", [1e3, 1e5])
@pytest.mark.parametrize("name", [name for name, kind in LOSS_TYPES.items() if kind.function is not None])
def test_finite_at_extremes(name: str, extreme: float) -> None:
    """Log-ratios of either sign and size, and certain answers."""
    function = LOSS_TYPES[name].function
    assert function is not None
    sides = [-extreme, -1e-12, 0.0]
    rows = [(c, r, cr, rr, 3.0, 5.0) for c in sides for r in sides for cr in sides for rr in sides]
    divergences = ["reverse_kl", *(DIVERGENCES if LOSS_TYPES[name].divergences else ())]
    for divergence in divergences:
        pairs = Pairs(*(torch.tensor(v, dtype=torch.float64).requires_grad_() for v in zip(*rows, strict=True)))
        options = Options(label_smoothing=0.1, f_divergence=divergence)  # type: ignore[arg-type]
        losses = function(pairs, options, WholeStep.of(pairs))
        grads = torch.autograd.grad(losses.sum(), [pairs.chosen, pairs.rejected])
        assert bool(torch.isfinite(losses).all()) and all(bool(torch.isfinite(g.float()).all()) for g in grads), (
            divergence
        )


def test_conservative_smoothing_of_every_sigmoid() -> None:
    """Turning a pair round swaps the two parts."""
    pairs = hand(-13.0, -27.0, -10.0, -20.0)
    turned = hand(-27.0, -13.0, -20.0, -10.0)
    for name in ("sigmoid", "cpo"):
        plain, round_ = one(name, pairs), one(name, turned)
        assert one(name, pairs, label_smoothing=0.3) == pytest.approx(0.7 * plain + 0.3 * round_)


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        ({"terms": (("dpo", 1.0),)}, {}, "there is no loss 'dpo'"),
        ({}, {"beta": 0.0}, "beta"),
        ({}, {"label_smoothing": 0.5}, "label_smoothing"),
        ({"terms": (("exo_pair", 1.0),)}, {}, "logarithm"),
        ({"terms": (("discopop", 1.0),)}, {"discopop_tau": 1.0}, "discopop_tau"),
        ({"terms": (("nca_pair", 1.0),)}, {"f_divergence": "forward_kl"}, "has no meaning in nca_pair"),
        ({"terms": (("aot_pair", 1.0),), "weighted": True}, {}, "sorts pairs apart"),
    ],
)
def test_refused(settings: Any, options: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PreferenceLoss(options=Options(**options), **settings)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "alignment.md").read_text(encoding="utf-8")
    for name, kind in LOSS_TYPES.items():
        ends = ("yes" if kind.reference else "no", "mean" if kind.averaged else "sum")
        assert f"| `{name}` | {kind.formula} | {kind.paper} | {ends[0]} | {ends[1]} |" in text.splitlines(), name
    assert all(f"`{name}`" in text for name in ALIASES)


def test_what_needs_a_reference() -> None:
    free = {name for name, kind in LOSS_TYPES.items() if not kind.reference}
    assert free == {"simpo", "cpo", "or", "orpo", "sft"}
    assert not PreferenceLoss(reference_free=True).needs_reference
    assert PreferenceLoss(terms=(("simpo", 1.0), ("sigmoid", 0.5))).needs_reference


def test_nll_weight() -> None:
    def weight(*names: str, ratio: float | None = None) -> float:
        return PreferenceLoss(terms=tuple((name, 0.5) for name in names), sft_loss_ratio=ratio).nll_weight

    assert (weight("sigmoid"), weight("orpo"), weight("cpo", "sft"), weight("or")) == (0, 0.5, 1.0, 0)
    assert (weight("orpo", ratio=0.2), weight("sigmoid", "sft", ratio=0.2), weight("orpo", ratio=0.0)) == (0.2, 0.7, 0)
