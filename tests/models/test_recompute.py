"""What runs again in backward gives the same loss and gradients bit for bit, and is not kept in between."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from oarsmith import kernels
from oarsmith.adapters.linear import attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.data.batch import make_batch
from oarsmith.errors import ModelError
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.models.recompute import Granularity, Recompute, run
from random_adapter import randomise
from tiny import CONFIGS, environment, random_samples, tiny_decoder

from .conftest import Case, tokens
from .test_cache import AUTHORS, document, load

Make = Callable[[str], Case]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
# Every attention (grouped with norms, windows, caps, ALiBi, sinks; latent; filtered), every wiring, experts.
NAMES = [
    "llama_bias_tied",
    "mistral",
    "gemma2",
    "gpt2",
    "cohere_normed",
    "olmo2",
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "bloom",
    "opt_350m",
    "falcon_7b",
    "falcon_40b",
    "falcon_alibi_shared",
    "chatglm_6b",
    "chatglm2_6b",
    "qwen1_ntk_logn",
    "yuan2_2b",
]


def gradients(model: Decoder, ids_T: Tensor) -> list[Tensor]:
    loss = model(ids_T[None]).logsumexp(-1).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_same_gradients(case: Make, name: str, backend: kernels.select.Backend) -> None:
    ids_T = document(name, 15, 3) if name in AUTHORS else tokens(15)
    with kernels.using(backend):
        expected = gradients(load(case, name).train(), ids_T)
        for granularity in GRANULARITIES:
            model = load(case, name).train()
            model.recompute = Recompute(granularity=granularity)
            found = gradients(model, ids_T)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), granularity


def kept_bytes(model: Decoder, recompute: Recompute | None) -> int:
    """Size of all that is kept for backward (inputs of what runs again included), without parameters, each once."""
    model.recompute = recompute
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outcome = token_cross_entropy(model, make_batch(random_samples((90, 40))), 1.0)
    assert outcome.loss.requires_grad
    for x in gc.get_objects():
        # Not the states of the random numbers, 5 KB a call whatever the model.
        if issubclass(type(x), Tensor) and id(x) not in before and x.is_floating_point():
            keep(x)
    return sum(size for address, size in kept.items() if address not in parameters)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_less_is_kept(family: str, backend: kernels.select.Backend) -> None:
    """The more runs again, the less is kept; layers left out keep what they kept before."""
    model = tiny_decoder(family).train()
    with kernels.using(backend):
        sizes = [kept_bytes(model, None)]
        for granularity in reversed(GRANULARITIES):
            sizes.append(kept_bytes(model, Recompute(granularity=granularity)))
            assert kept_bytes(model, Recompute(granularity=granularity, skip_layers=frozenset({0, 1}))) == sizes[0]
            one = kept_bytes(model, Recompute(granularity=granularity, skip_layers=frozenset({1})))
            assert sizes[-1] < one < sizes[0]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, sizes


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dropout_and_noise_are_drawn_once(granularity: Granularity) -> None:
    """LoRA's dropout draws the same numbers again, and noise on the embeddings lies outside of what runs twice."""
    family, spec = families.build_spec(CONFIGS["llama"])
    change = Lora(rank=4, alpha=8.0, dropout=0.5)
    spec = adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))(family, spec)
    model, batch = Decoder(spec, CONFIGS["llama"]).train(), make_batch(random_samples((30, 11)))
    init_weights(model, 0)
    attach(model, 0)
    randomise(model, 0.1)
    found = []
    for recompute, alpha in ((None, 5.0), (Recompute(granularity=granularity), 5.0), (None, None)):
        model.recompute, model.neftune_alpha = recompute, alpha
        model.zero_grad()
        torch.manual_seed(3)
        token_cross_entropy(model, batch, 1.0).loss.backward()
        after = torch.rand(1)
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([*grads, after])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0]), "the noise changes the gradients"


def test_what_runs_again_and_when() -> None:
    """Once a backward pass, up to the last tensor that backward needs; a graph that is kept can be used again."""
    calls: list[str] = []

    def function(x: Tensor, factor: float) -> Tensor:
        calls.append("begin")
        noise = torch.rand(3)
        y = (x * noise * factor).sin().exp()
        calls.append("end")
        return y.neg()

    x = torch.arange(3.0).requires_grad_()
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(function(x, 2.0).sum(), x)
    after = torch.rand(1)
    torch.manual_seed(1)
    calls.clear()
    out = run(function, x, 2.0, again=True)
    assert torch.equal(torch.rand(1), after) and calls == ["begin", "end"]
    for _ in range(2):
        torch.manual_seed(5)
        calls.clear()
        (found,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert torch.equal(found, expected) and calls == ["begin"]  # exp keeps its result, and is the last to keep any
        torch.testing.assert_close(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        assert not run(function, x, 2.0, again=True).requires_grad


def test_another_second_run() -> None:
    """A function that is not the same both times is a mistake that is seen."""
    again = [False]

    def function(x: Tensor) -> Tensor:
        return x * 1.0 if again[0] else (x * x).exp()

    out = run(function, torch.ones(2, requires_grad=True), again=True)
    again[0] = True
    with pytest.raises(AssertionError, match="fewer tensors"):
        out.sum().backward()


NO_COMPILER = """
import sys
from oarsmith.models.recompute import Recompute
from tiny import batches_of, one_step, random_samples, tiny_decoder
model = tiny_decoder().train()
model.recompute = Recompute(sys.argv[1])
assert one_step(model, batches_of(random_samples((30, 20)), 2)).loss > 0
print(sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_compiler_is_not_imported(granularity: Granularity) -> None:
    """It takes seconds."""
    command, tests = [sys.executable, "-c", NO_COMPILER, granularity], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=environment(), check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_layers_that_do_not_exist() -> None:
    recompute = Recompute(skip_layers=frozenset({0, 2, -1}))
    with pytest.raises(ModelError, match=r"layers \[-1, 2\] do not exist"):
        recompute.require(2)
    Recompute(skip_layers=frozenset({0, 1})).require(2)
