"""Methods that mergekit does not have, worked out by hand in float64, and all methods whatever is done at a time."""

import pytest
import torch

from oarsmith.errors import ConfigError, ModelError
from oarsmith.merge.flags import Flags, recipe_of_flags
from oarsmith.merge.job import TensorJob, blocks
from oarsmith.merge.registry import METHODS, find_method, with_sparsifier


def tensors(count, *, shape=(37, 29), seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, tuple(base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count))


def run(method, base, models, shared=None, own=None, sparsify="none", **keys):
    found = with_sparsifier(find_method(method), sparsify)
    shared, own = shared or {}, own or [{}] * len(models)
    defaults = {one.name: one for one in found.parameters}
    full = {name: p.checked(shared.get(name), name) for name, p in defaults.items() if not p.per_model}
    each = tuple({n: p.checked(o.get(n), n) for n, p in defaults.items() if p.per_model} for o in own)
    return found.merge(TensorJob("layer.weight", base, tuple(models), each, full, torch.float32, **keys))


def reference_ties(base, models, weights, elect):
    deltas = torch.stack([(m.double() - base.double()) * w for m, w in zip(models, weights, strict=True)])
    vote = deltas.sum(0) if elect == "sum" else deltas.sign().sum(0)
    agrees = deltas.sign() == torch.where(vote >= 0, 1.0, -1.0)
    divisor = (agrees * torch.tensor(weights)[:, None, None]).sum(0)
    return base.double() + (deltas * agrees).sum(0) / divisor.clamp(min=1e-12)


@pytest.mark.parametrize("elect", ["sum", "count"])
def test_signs_by_sum_and_by_count(elect):
    base, models = tensors(3)
    weights = [0.7, 0.2, 0.4]
    found = run(f"ties_{elect}", base, models, {"normalize": True}, [{"weight": w} for w in weights])
    torch.testing.assert_close(found.double(), reference_ties(base, models, weights, elect), atol=1e-6, rtol=0)


def test_linear_of_deltas():
    base, models = tensors(2)
    found = run("linear_deltas", base, models, {"normalize": False}, [{"weight": 0.5}, {"weight": 0.3}])
    expected = base.double() + 0.5 * (models[0] - base).double() + 0.3 * (models[1] - base).double()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_slerp_of_deltas():
    base, models = tensors(2)
    x, y = ((m - base).double() for m in models)
    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
    expected = base + (torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)
    found = run("slerp_deltas", base, models, {"t": 0.3})
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["linear", "multislerp", "sce", "model_stock", "ties", "karcher"])
@pytest.mark.parametrize("word", ["trim", "dare", "magprune", "breadcrumbs"])
def test_sparsifiers_and_methods_combine_freely(method, word):
    """A method of sparsified models is the method of models that were sparsified before."""
    base, models = tensors(3)
    own = [{"weight": 0.5, "density": 0.6}] * 3
    found = run(method, base, models, {}, own, word, seed=3)
    # "linear" leaves the weights as they are, so each model comes back as it was sparsified.
    single = []
    for index in range(3):
        own_one = [{"weight": 1.0 if i == index else 0.0, "density": 0.6} for i in range(3)]
        single.append(run("linear", base, models, {"normalize": False}, own_one, word, seed=3))
    plain = find_method(method)
    expected = run(method, None if plain.base == "none" else base, single, {}, [{"weight": 0.5}] * 3)
    assert torch.allclose(found, expected, atol=2e-5)


def test_many_blocks_are_one(monkeypatch):
    base, models = tensors(3, shape=(210, 333))
    own = [{"weight": w, "density": 0.5, "epsilon": 0.2, "gamma": 0.05} for w in (0.5, 0.3, 0.4)]
    before = {}
    for size in (1 << 18, 1000):
        monkeypatch.setattr("oarsmith.merge.job._BLOCK", size)
        assert len(list(blocks(210 * 333))) == (1 if size == 1 << 18 else 70)
        for name, method in METHODS.items():
            count = 2 if method.least == 2 and method.most == 2 else 1 if method.most == 1 else 3
            chosen = (base, models[0]) if method.base == "one of them" else models[:count]
            with_base = None if method.base in ("none", "one of them") else base
            shared = {"t": 0.3, "filter_wise": True, "select_topk": 0.4}
            found = run(name, with_base, chosen, shared, own[: len(chosen)], seed=9)
            if name in before:
                torch.testing.assert_close(found, before[name], atol=1e-6, rtol=0, msg=name)
            before[name] = found


def test_bf16_is_rounded_once():
    _, models = tensors(2)
    rounded, own = tuple(m.bfloat16() for m in models), ({"weight": 0.6},) * 2
    job = TensorJob("w", None, rounded, own, {"normalize": True}, torch.bfloat16)
    expected = (models[0].bfloat16().double() + models[1].bfloat16().double()) / 2
    assert torch.equal(find_method("linear").merge(job), expected.bfloat16())


@pytest.mark.parametrize("name", ["rescale_by", "magnitude_ranks", "trim_by"])
def test_words_that_a_parameter_does_not_have(name):
    base, models = tensors(2)
    sparsify = {"magnitude_ranks": "magprune", "trim_by": "trim"}.get(name, "dare")
    with pytest.raises(ConfigError, match=f"{name} = 'densty': must be"):
        run("task_arithmetic", base, models, {name: "densty"}, [{"weight": 1.0}] * 2, sparsify)


def test_weights_that_cancel():
    base, models = tensors(2)
    with pytest.raises(ModelError, match="sum to zero"):
        run("linear", base, models, {}, [{"weight": 1.0}, {"weight": -1.0}])
    with pytest.raises(ModelError, match="cancel"):
        run("multislerp", None, (models[0], -models[0]), {}, [{"weight": 1.0}] * 2)


def flags(**changes):
    values = {
        "models": ["a", "b"],
        "base": "c",
        "weights": [],
        "merge_method": "ties",
        "merge_type": None,
        "sparsify_type": None,
        "normalize": True,
        "slerp_alpha": 0.5,
        "slerp_normalize_eps": 1e-8,
        "slerp_dot_threshold": 0.9995,
        "ties_elect_type": "count",
        "reserve_p": 0.7,
        "rescale": True,
        "epsilon": 0.14,
        "dtype": None,
    }
    return Flags(**{**values, **changes})


def test_paddlenlps_names():
    recipe = recipe_of_flags(flags())
    assert (recipe.method, recipe.sparsify, recipe.base) == ("ties_count", "trim", "c")
    recipe = recipe_of_flags(flags(merge_method="dare_linear"))
    assert (recipe.method, recipe.sparsify) == ("linear_deltas", "dare")
    recipe = recipe_of_flags(flags(merge_method=None, merge_type="slerp", base=None))
    assert (recipe.method, recipe.sparsify, recipe.base) == ("slerp", "none", "a")
    recipe = recipe_of_flags(flags(merge_method="linear", sparsify_type="magprune"))
    assert (recipe.method, recipe.sparsify) == ("linear_deltas", "magprune")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": None}, "base"),
        ({"weights": [1.0]}, "1 weights"),
        ({"merge_method": "tie"}, "no merge method"),
        ({"merge_method": "della", "reserve_p": 0.99}, "leaves"),
        ({"merge_method": "slerp", "models": ["a", "b", "d"]}, "there are 3"),
    ],
)
def test_flags_that_contradict_each_other(changes, words):
    with pytest.raises(ValueError, match=words):
        recipe_of_flags(flags(**changes))
