"""Adapters side by side in one engine: each request answers as in an engine with its adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.linear import adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError
from random_adapter import randomise
from tiny import tiny_decoder

from .accounts import account, finish

Tiny = Callable[[str], Path]
PROMPTS = [[5, 17, 88, 3], [9], list(range(20, 33)), [150, 2, 2, 7, 61, 61], list(range(20, 35))]
GREEDY = Sampling(max_new_tokens=20, logprobs=1)
DRAWN = Sampling(max_new_tokens=20, temperature=1.0, seed=3, n=2, logprobs=0)


def make_adapter(base: Path, folder: Path, seed: int, *, rank: int = 3, targets: str = "all-linear", **more) -> Path:
    """A random adapter on some projections."""
    change = Lora(rank=rank, alpha=1.5 * rank, **more)
    model = load_decoder(
        base, rewrite=adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, targets), change))
    )
    attach(model, seed)
    randomise(model, 0.15, seed)
    folder.mkdir()
    write_adapter(model, folder, base=str(base))
    return folder


def engine_of(base: Path, *, adapter: Path | None = None, dtype: str = "fp32", **options: Any) -> Engine:
    """An engine of a directory without a tokenizer."""
    return Engine(oarsmith.load_model(base, dtype=dtype, device="cpu", adapter=adapter), **options)


def same(found: list[Completion], expected: list[Completion]) -> None:
    for answer, other in zip(found, expected, strict=True):
        assert [answer.ids, *(a.ids for a in answer.others)] == [other.ids, *(a.ids for a in other.others)]
        for choice, wanted in zip(answer.logprobs, other.logprobs, strict=True):
            assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-5)


# Fused maps with other projections in each; transposed weights; MLA, whose kv_up lies in keys; routed experts.
CASES = {
    "llama": ("all-linear", "q_proj", r".*\.(v_proj|down_proj)"),
    "mistral": ("all-linear", "v_proj", "gate_proj"),
    "gpt2": ("all-linear", "c_attn", "c_fc"),
}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "several"])
@pytest.mark.parametrize("name", CASES)
def test_each_answers_as_alone(tiny_model: Tiny, tmp_path: Path, name: str, sampling: Sampling) -> None:
    """Different adapters in the same steps, with few pages and prompts in pieces; the base beside them is the base."""
    base = tiny_model(name)
    paths = {
        f"a{index}": make_adapter(base, tmp_path / str(index), index, rank=2 + index, targets=targets)
        for index, targets in enumerate(CASES[name])
    }
    expected: dict[str | None, list[Completion]] = {None: engine_of(base).generate(PROMPTS, sampling)}
    for key, path in paths.items():
        expected[key] = engine_of(base, adapter=path).generate(PROMPTS, sampling)
    assert len({tuple(answer.ids for answer in answers) for answers in expected.values()}) == len(expected)
    sizes = {"batch_size": 5, "num_pages": 24, "block_size": 4, "max_step_tokens": 9}
    for options in ({}, sizes):
        engine = engine_of(base, adapters=paths, **options)
        ids = {
            (key, index): engine.add(prompt, sampling, adapter=key, index=index)
            for index, prompt in enumerate(PROMPTS)
            for key in expected
        }
        found = finish(engine)
        for key, answers in expected.items():
            same([found[ids[key, index]] for index in range(len(PROMPTS))], answers)
            # Again, from what is known of them.
            same(engine.generate(PROMPTS, sampling, adapter=key), answers)
        account(engine)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen2"])
def test_maps_that_see_other_rows_than_tokens(tmp_path: Path, family: str) -> None:
    """Latents of the whole cache, tokens sorted by their experts; and biases."""
    base = tmp_path / "base"
    oarsmith.save_model(oarsmith.new_model(CONFIGS[family], seed=1), base)
    paths = {key: make_adapter(base, tmp_path / key, seed) for seed, key in enumerate("ab")}
    engine = engine_of(base, adapters=paths, block_size=4)
    wanted = [(prompt, key) for prompt in PROMPTS for key in (None, "a", "b")]
    ids = [engine.add(prompt, GREEDY, adapter=key) for prompt, key in wanted]
    found = finish(engine)
    alone = {key: engine_of(base, adapter=path) for key, path in paths.items()}
    alone[None] = engine_of(base)
    for id, (prompt, key) in zip(ids, wanted, strict=True):
        same([found[id]], alone[key].generate(prompt, GREEDY))


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}
CONFIGS = {
    "qwen2": {**_SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "mixtral": {
        **_SMALL,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        **_SMALL,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def test_prefixes_are_not_mixed(tiny_model: Tiny, tmp_path: Path) -> None:
    """Pages of one adapter are not found for another, nor for a later one of its name."""
    base = tiny_model("llama")
    one, two = (make_adapter(base, tmp_path / str(seed), seed) for seed in range(2))
    engine = engine_of(base, adapters={"a": one, "b": two}, block_size=4)
    scheduler = engine.runner.scheduler
    long = list(range(1, 18))
    for key in ("a", "b", None):
        engine.generate(long, GREEDY, adapter=key)
        assert scheduler.num_found == 0
    engine.generate(long, GREEDY, adapter="b")
    assert scheduler.num_found == 16
    engine.remove_adapter("b")
    engine.add_adapter("b", one)
    same(engine.generate(long, GREEDY, adapter="b"), engine.generate(long, GREEDY, adapter="a"))
    assert scheduler.num_found == 16 + 16
    # Those that come at once do not wait for one another.
    ids = [engine.add([*long, 1], GREEDY, adapter=key) for key in ("a", "b", None)]
    found = finish(engine)
    same([found[ids[0]]], [found[ids[1]]])
    assert found[ids[2]].ids != found[ids[0]].ids


def test_guesses_beams_and_streams(tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model("llama")
    path = make_adapter(base, tmp_path / "a", 1)
    model = oarsmith.load_model(base, dtype="fp32", device="cpu")
    search = Sampling(max_new_tokens=8, num_beams=3, n=2)
    alone = engine_of(base, adapter=path)
    for speculative in (None, "ngram", model):
        engine = Engine(model, adapters={"a": path}, speculative=speculative)
        same(engine.generate(PROMPTS, GREEDY, adapter="a"), alone.generate(PROMPTS, GREEDY))
        (found,), (expected,) = engine.generate(PROMPTS[0], search, adapter="a"), alone.generate(PROMPTS[0], search)
        assert [found.ids, found.others[0].ids] == [expected.ids, expected.others[0].ids]


def test_a_base_with_an_adapter_of_its_own(tiny_model: Tiny, tmp_path: Path) -> None:
    """The bank lies on top of it."""
    base = tiny_model("llama")
    under, over = (make_adapter(base, tmp_path / str(seed), seed) for seed in range(2))
    engine = engine_of(base, adapter=under, adapters={"over": over})
    same(engine.generate(PROMPTS, GREEDY), engine_of(base, adapter=under).generate(PROMPTS, GREEDY))
    model = oarsmith.load_model(base, dtype="fp32", device="cpu")
    with torch.no_grad():
        for path in (under, over):
            for name, module in adapted_modules(oarsmith.load_model(base, dtype="fp32", device="cpu", adapter=path)):
                model.get_submodule(name).weight.add_(module.merged()[0] - module.weight)
    same(engine.generate(PROMPTS, GREEDY, adapter="over"), Engine(model).generate(PROMPTS, GREEDY))


def test_rank_stabilised_and_bf16(tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model("llama")
    path = make_adapter(base, tmp_path / "a", 1, rslora=True)
    engine = engine_of(base, adapters={"a": path})
    same(
        engine.generate(PROMPTS, GREEDY, adapter="a"),
        engine_of(base, adapter=path).generate(PROMPTS, GREEDY),
    )
    (found,) = engine_of(base, dtype="bf16", adapters={"a": path}).generate(PROMPTS[0], GREEDY, adapter="a")
    (expected,) = engine_of(base, dtype="bf16", adapter=path).generate(PROMPTS[0], GREEDY)
    assert found.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=0.1)


def test_adapters_come_and_go(tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model("llama")
    path = make_adapter(base, tmp_path / "a", 1)
    engine = engine_of(base)
    plain = engine.generate(PROMPTS, GREEDY)
    with pytest.raises(ConfigError, match=r"there is no adapter 'a'\n.*add it first"):
        engine.generate(PROMPTS, GREEDY, adapter="a")
    id = engine.add(PROMPTS[0], GREEDY)
    with pytest.raises(ConfigError, match="the first adapter came while requests are open"):
        engine.add_adapter("a", path)
    engine.abort(id)
    engine.add_adapter("a", path)
    with pytest.raises(ConfigError, match="there is an adapter 'a' already"):
        engine.add_adapter("a", path)
    with pytest.raises(ConfigError, match=r"there is no adapter 'x'\n.*known: a"):
        engine.add(PROMPTS[0], GREEDY, adapter="x")
    assert not engine.busy
    adapted = engine.generate(PROMPTS, GREEDY, adapter="a")
    assert [answer.ids for answer in adapted] != [answer.ids for answer in plain]
    engine.add(PROMPTS[0], GREEDY, adapter="a", id="mine")
    engine.step()
    with pytest.raises(ConfigError, match="a request goes through the adapter 'a'"):
        engine.remove_adapter("a")
    # Another one beside it, in the middle of an answer.
    engine.add_adapter("b", make_adapter(base, tmp_path / "b", 2, targets="k_proj"))
    same([finish(engine)["mine"]], adapted[:1])
    engine.remove_adapter("a")
    with pytest.raises(ConfigError, match="there is no adapter 'a'"):
        engine.remove_adapter("a")
    same(engine.generate(PROMPTS, GREEDY), plain)
    engine.remove_adapter("b")
    same(engine.generate(PROMPTS, GREEDY), plain)


def test_what_does_not_fit_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    base, other = tiny_model("llama"), tmp_path / "other"
    oarsmith.save_model(tiny_decoder(intermediate_size=64), other)
    engine = engine_of(base, adapters={})
    for name, folder, message in [
        ("x", make_adapter(other, tmp_path / "sizes", 1), "has shape"),
        ("x", make_adapter(tiny_model("gpt2"), tmp_path / "names", 1), "which the base model does not have"),
        ("x", tmp_path / "nothing", r"no adapter_config\.json"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            engine.add_adapter(name, folder)
    biased = make_adapter(base, tmp_path / "biased", 1) / "adapter_model.safetensors"
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file(load_file(biased) | bias, biased)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: biases of the base cannot be changed for single"):
        engine.add_adapter("x", biased.parent)
    with pytest.raises(ConfigError, match="there is no adapter 'x'"):
        engine.generate(PROMPTS[0], adapter="x")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        engine_of(base, adapters={"x": tmp_path / "nothing"})


def test_the_given_decoder_is_left_alone(tiny_model: Tiny, tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = oarsmith.load_model(base, dtype="fp32", device="cpu")
    spec, names = model.spec, [name for name, _ in model.named_parameters()]
    engine = Engine(model, adapters={"a": make_adapter(base, tmp_path / "a", 1)})
    before = model(torch.tensor([PROMPTS[0]]))
    first = engine.generate(PROMPTS, GREEDY, adapter="a")
    assert torch.equal(model(torch.tensor([PROMPTS[0]])), before)
    assert model.spec is spec and [name for name, _ in model.named_parameters()] == names
    # The weights are the same, not copies.
    with torch.no_grad():
        model.layers[0].attention.qkv.weight.mul_(1.5)
    engine.forget()
    assert [answer.ids for answer in engine.generate(PROMPTS, GREEDY, adapter="a")] != [answer.ids for answer in first]
