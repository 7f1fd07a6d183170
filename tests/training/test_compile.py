"""torch.compile: the same loss and gradients as without, and no new code for new packs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oarsmith.errors import ConfigError
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models.recompute import Recompute
from oarsmith.training.compile import compile_model
from tiny import batches_of, environment, largest_difference, one_step, random_samples, tiny_decoder

PACKS = ((30, 20), (7, 9, 40), (100,), (3, 3, 3, 3), (64, 64), (2,), (11, 22, 33), (5, 90, 1), (70, 1, 1))


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Code of this module's tests in a place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_same_step_and_one_graph_for_all_packs(family: str) -> None:
    torch._dynamo.reset()
    model, plain = tiny_decoder(family, num_hidden_layers=3).train(), tiny_decoder(family, num_hidden_layers=3).train()
    compile_model(model)
    counts, breaks = [], len(torch._dynamo.utils.counters["graph_break"])
    for pack in PACKS:
        batches = batches_of(random_samples(pack), len(pack))
        found, expected = one_step(model, batches), one_step(plain, batches)
        # fp32, sums fused and in another order, through three layers.
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert largest_difference(found.grads, expected.grads) < 1e-5
        counts.append(graphs())
    assert counts[0] > 0 and counts[-1] == counts[0], counts
    assert len(torch._dynamo.utils.counters["graph_break"]) == breaks


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["full", "full_attn", "core_attn"])
def test_with_recompute(granularity: str) -> None:
    torch._dynamo.reset()
    model, plain = tiny_decoder().train(), tiny_decoder().train()
    compile_model(model)
    model.recompute = Recompute(granularity)
    batches = batches_of(random_samples((30, 20)), 2)
    found, expected = one_step(model, batches), one_step(plain, batches)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert largest_difference(found.grads, expected.grads) < 1e-5


@pytest.mark.slow
def test_outside_training() -> None:
    torch._dynamo.reset()
    model, plain = tiny_decoder().eval(), tiny_decoder().eval()
    compile_model(model)
    with torch.no_grad():
        for pack in PACKS:
            (batch,) = batches_of(random_samples(pack), len(pack))
            found, expected = (token_cross_entropy(x, batch, 1.0).total for x in (model, plain))
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_code_is_kept(tmp_path: Path) -> None:
    """A second process finds the code of the first under the cache of the kernels."""
    program = (
        "import torch, torch._dynamo.utils as u\n"
        "from oarsmith.training.compile import compile_model\n"
        "from tiny import *\n"
        "model = tiny_decoder(num_hidden_layers=1).train()\n"
        "compile_model(model)\n"
        "one_step(model, batches_of(random_samples((30, 20)), 2))\n"
        "print(u.counters['aot_autograd']['autograd_cache_hit'] + u.counters['inductor']['fxgraph_cache_hit'])\n"
    )
    tests = str(Path(__file__).parents[1])
    settings = {**environment(), "OARSMITH_CACHE": str(tmp_path)}
    settings.pop("TORCHINDUCTOR_CACHE_DIR", None)
    settings["PYTHONPATH"] += os.pathsep + tests
    hits = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
        hits.append(int(done.stdout.split()[-1]))
    assert hits[0] == 0 < hits[1]
    assert any((tmp_path / "inductor").rglob("*.so"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        compile_model(tiny_decoder())


def test_the_users_own_cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_model(tiny_decoder())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("OARSMITH_CACHE", "/of/kernels")
    compile_model(tiny_decoder())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/of/kernels/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")  # so that it is put back
