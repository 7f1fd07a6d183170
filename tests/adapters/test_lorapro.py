"""LoRA-Pro's gradients beside what they minimise, and in the trainer's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oarsmith
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.lorapro import FullGradients, LoraPro, nearest
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import global_norm, run_step
from tiny import batches_of, random_samples, tiny_decoder

from .conftest import Base, mixtral
from .relatives import SOME, by_peft, close, logits, our_gradients, saved, trained, under, whole

PRO = LoraPro(rank=3, alpha=6.0)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, A, and the gradients of A and B."""
    g, a = drawn(*b.shape[:-2], b.shape[-2], 9, seed=1), drawn(*b.shape[:-2], b.shape[-1], 9, seed=2)
    return g, a, scale * b.mT @ g, scale * g @ a.mT


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_nearest_step(scale: float) -> None:
    """What is left of G is what no step of A and B can reach: (1 - P_B) G (1 - P_A)."""
    b = drawn(7, 3, seed=3)
    g, a, da, db = problem(b, scale)
    ga, gb = nearest(a, b, da, db, scale)
    left = g - scale * (gb @ a + b @ ga)
    outside_b = torch.eye(7).double() - b @ torch.linalg.pinv(b)
    outside_a = torch.eye(9).double() - torch.linalg.pinv(a) @ a
    close(left, outside_b @ g @ outside_a)


def test_the_choice_of_x() -> None:
    """Among the pairs with that product, the one nearest to the plain gradients."""
    b, scale = drawn(7, 3, seed=3), 2.0
    _, a, da, db = problem(b, scale)
    ga, gb = nearest(a, b, da, db, scale)
    x = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    distance = (ga + x @ a - da).square().sum() + (gb - b @ x - db).square().sum()
    (slope,) = torch.autograd.grad(distance, x)
    assert slope.abs().max() < 1e-9
    # Theorem 2.3's equation, solved as a plain linear system.
    inverse, eye = torch.linalg.inv(b.t() @ b), torch.eye(3).double()
    right = -inverse @ da @ a.t() / scale**2
    system = torch.kron(b.t() @ b, eye) + torch.kron(eye, a @ a.t())
    x = torch.linalg.solve(system, right.flatten()).view(3, 3)
    close(ga, inverse @ da / scale**2 + x @ a)
    outside = torch.eye(7).double() - b @ inverse @ b.t()
    close(gb, outside @ db @ torch.linalg.inv(a @ a.t()) / scale**2 - b @ x)


def test_the_first_step_and_lost_directions() -> None:
    """B is zero, or of a lower rank: still the best that can be reached, and nothing is infinite."""
    for b in (torch.zeros(7, 3).double(), drawn(7, 1, seed=3) @ drawn(1, 3, seed=4)):
        g, a, da, db = problem(b, 2.0)
        ga, gb = nearest(a, b, da, db, 2.0)
        left = g - 2.0 * (gb @ a + b @ ga)
        outside_b = torch.eye(7).double() - b @ torch.linalg.pinv(b, rtol=1e-6)
        close(left, outside_b @ g @ (torch.eye(9).double() - torch.linalg.pinv(a) @ a))
    ga, gb = nearest(a, torch.zeros(7, 3).double(), torch.zeros(3, 9).double(), db, 2.0)
    assert not ga.any() and gb.isfinite().all()
    still = nearest(a, b, torch.zeros_like(da), torch.zeros_like(db), 2.0)
    assert not still[0].any() and not still[1].any(), "an expert that no token came to"


def test_experts_are_matrices_of_their_own() -> None:
    b = drawn(4, 7, 3, seed=3)
    _, a, da, db = problem(b, 2.0)
    together = nearest(a.float(), b.float(), da.float(), db.float(), 2.0)
    for index in range(4):
        for found, expected in zip(together, nearest(a[index], b[index], da[index], db[index], 2.0), strict=True):
            close(found[index].double(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_start_merge_and_files(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    whole(path, PRO, SOME[name])
    if name != "mixtral":
        model = trained(under(path, PRO, SOME[name]))
        close(logits(by_peft(base(name), saved(model, tmp_path / "a"))), logits(model))
        close(logits(oarsmith.load_model(path, adapter=tmp_path / "a", device="cpu")), logits(model))


def test_over_8_bits(base: Callable[[str], Base]) -> None:
    whole(base("llama").path, PRO, SOME["llama"], INT8_ROWS)


def test_the_full_gradient_of_a_model(base: Callable[[str], Base]) -> None:
    """Of W by autograd, beside what the adjusted pair says."""
    model = trained(under(base("llama").path, PRO, "down_proj"))
    name = "layers.1.ffn.down"
    weight = model.get_parameter(f"{name}.weight").requires_grad_()
    grads = our_gradients(model)
    g = grads.pop(f"{name}.weight")
    weight.requires_grad_(False)
    found = FullGradients(model).adjusted(grads)
    a, b = (model.get_parameter(f"{name}.adapter.down_proj.lora_{letter}") for letter in "AB")
    ga, gb = (found[f"{name}.adapter.down_proj.lora_{letter}"] for letter in "AB")
    step = PRO.scale * (gb @ a + b @ ga)
    outside_b = torch.eye(len(b)) - b @ torch.linalg.pinv(b)
    outside_a = torch.eye(a.shape[1]) - torch.linalg.pinv(a) @ a
    close(g - step, outside_b @ g @ outside_a, atol=1e-4)


def test_in_a_step() -> None:
    """The optimizer gets the adjusted gradients, and the norm that is clipped is that of the plain ones."""

    class Seen(AdamW):
        def step(self, grads, *, lr, grad_scale):
            self.seen, self.grad_scale = {name: grad.clone() for name, grad in grads.items()}, grad_scale
            super().step(grads, lr=lr, grad_scale=grad_scale)

    model = tiny_decoder(lora_rank=2)
    for _, module in adapted_modules(model):
        module.changes = dict.fromkeys(module.changes, LoraPro(rank=2, alpha=4.0))
    batches = batches_of(random_samples([9, 12, 7]), 1)
    trained_ = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Seen(trained_, AdamWSettings())
    plain = {}

    class Watching(FullGradients):
        def adjusted(self, grads):
            plain.update({name: grad.clone() for name, grad in grads.items()})
            return super().adjusted(grads)

    result = run_step(model, OBJECTIVE, batches, optimizer, lr=0.0, max_grad_norm=1e-3, hooks=Watching(model), number=1)
    expected = FullGradients(model).adjusted(plain)
    assert result.grad_norm == pytest.approx(global_norm(plain.values()))
    assert optimizer.grad_scale == pytest.approx(1e-3 / result.grad_norm, rel=1e-3)
    assert optimizer.seen.keys() == expected.keys()
    for name, grad in optimizer.seen.items():
        close(grad, expected[name])
    assert any(not torch.equal(grad, plain[name]) for name, grad in optimizer.seen.items())
