"""PEFT's adapters read by us and ours by PEFT: the same logits and gradients; what we do not compute is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.change import Change
from oarsmith.adapters.linear import Adapt, adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.methods import find_method
from oarsmith.adapters.peft_config import read_adapter_config
from oarsmith.adapters.peft_layout import adapter_rewrite, adapter_tensors, write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import CheckpointError
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec import linear_specs

from .conftest import Adapted, Base, randomise, tokens

MakeAdapted = Callable[..., Adapted]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
# fp32; x A^T B^T is added to another product first than in PEFT.
TOLERANCE = 1e-4

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all projections": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"}),
    "q and v only": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "k only": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj"]}),
    "up and down": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": ["up_proj", "down_proj"]}),
    "one layer": ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "regex": ("llama", {"r": 2, "target_modules": r".*\.1\.(self_attn\.o_proj|mlp\.gate_proj)"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"self_attn.v_proj": 3, r"layers\.0\..*\.gate_proj": 5, "proj": 100},
            "use_rslora": True,
        },
    ),
    "biases": ("llama", {"r": 2, "bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    "adapted biases": ("llama", {"r": 2, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "gaussian start": ("llama", {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["o_proj"]}),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 7, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 all": ("gpt2", {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 biases": ("gpt2", {"r": 2, "bias": "all", "target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "gpt2 rslora": ("gpt2", {"r": 4, "use_rslora": True, "target_modules": ["c_proj"], "fan_in_fan_out": True}),
}


def read(made: Adapted) -> Decoder:
    return oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_merged_logits(adapted: MakeAdapted, name: str) -> None:
    kind, arguments = CASES[name]
    made, ids = adapted(kind, **arguments), tokens(2, 17)
    with torch.no_grad():
        model, expected = read(made), made.oracle(ids).logits
        plain = made.base.oracle()(ids).logits
        assert (expected - plain).abs().max() > 0.05, "the adapter must do something"
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE)
        merged = merge_adapter(model)
        torch.testing.assert_close(merged(ids), expected, rtol=0, atol=TOLERANCE)
        theirs = made.oracle.merge_and_unload()
    weights = dict(theirs.named_parameters())
    parameters = dict(merged.named_parameters())
    for place in oarsmith.models.families.find(merged.config).names(merged.spec).places:
        found = place.view(parameters[place.parameter])
        torch.testing.assert_close(found, weights[place.file], rtol=1e-6, atol=1e-6, msg=lambda m, p=place: p.file + m)


@pytest.mark.parametrize("name", ["all projections", "q and v only", "patterns", "gpt2 all"])
def test_gradients(adapted: MakeAdapted, name: str) -> None:
    kind, arguments = CASES[name]
    made, ids = adapted(kind, **arguments), tokens(1, 17)
    for parameter_name, parameter in made.oracle.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    made.oracle(ids).logits.square().mean().backward()
    expected = {n.replace(".default", ""): p.grad for n, p in made.oracle.named_parameters() if p.grad is not None}
    model = read(made)
    model(ids).square().mean().backward()
    found = adapter_tensors(model)
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert tensor.grad is not None
        # fp32 sums along two paths of 17 tokens and two layers: 1e-4 of the largest entry.
        limit = max(1e-6, 1e-4 * float(expected[key].abs().max()))
        torch.testing.assert_close(tensor.grad, expected[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")
    adapter = {id(p) for p in found.values()}
    for parameter_name, parameter in model.named_parameters():
        frozen = id(parameter) not in adapter
        assert parameter.requires_grad != frozen, parameter_name
        assert parameter.dtype == torch.float32 and (parameter.grad is None) == frozen, parameter_name


WRITTEN: dict[str, tuple[str, str | tuple[str, ...], bool]] = {
    "all": ("llama", "all-linear", False),
    "part of a fused map": ("llama", ("q_proj", "v_proj"), False),
    "rslora": ("llama", ("o_proj", "gate_proj"), True),
    "one of two layers": ("llama", ("1.self_attn.k_proj", "0.mlp.up_proj"), False),
    "gpt2": ("gpt2", "all-linear", False),
    "gpt2, only the attention's c_proj": ("gpt2", ("attn.c_proj",), False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_peft_reads_ours(base: Callable[[str], Base], name: str, tmp_path: Path) -> None:
    kind, targets, rslora = WRITTEN[name]
    change = Lora(rank=3, alpha=7.0, rslora=rslora)
    model, oracle = written(
        base(kind), tmp_path / "adapter", lambda modules: dict.fromkeys(match_targets(modules, targets), change)
    )
    theirs = {n for n, _ in oracle.named_modules() if n.endswith("lora_A.default")}
    assert len(theirs) == len(adapter_tensors(model)) // 2, "the targets select exactly these modules"


def test_peft_reads_ranks_and_factors_that_differ(base: Callable[[str], Base], tmp_path: Path) -> None:
    def choose(modules: list[str]) -> dict[str, Change]:
        special = {"model.layers.0.mlp.down_proj": Lora(rank=4, alpha=5.0)}
        keys = {m: Lora(rank=3, alpha=9.0) for m in modules if m.endswith("k_proj")}
        return dict.fromkeys(match_targets(modules, "all-linear"), Lora(rank=3, alpha=7.0)) | special | keys

    written(base("llama"), tmp_path / "adapter", choose)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 7.0)
    down, keys = "model.layers.0.mlp.down_proj", [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)]
    assert config["rank_pattern"] == {down: 4} and config["alpha_pattern"] == {down: 5.0} | dict.fromkeys(keys, 9.0)


def written(base: Base, folder: Path, choose: Callable[[list[str]], dict[str, Change]]) -> tuple[Decoder, Any]:
    """An adapter of ours, and PEFT's model of its files: both answer the same, and so do we from the files."""
    model = load_decoder(base.path, rewrite=adapt_rewrite(choose)).eval()
    attach(model, seed=3)
    randomise(adapter_tensors(model).values(), seed=2, std=0.15)
    folder.mkdir()
    write_adapter(model, folder, base=str(base.path))
    oracle = peft.PeftModel.from_pretrained(base.oracle(), folder).eval()
    ids = tokens(2, 13)
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(oracle(ids).logits, expected, rtol=0, atol=TOLERANCE)
        assert (base.oracle()(ids).logits - expected).abs().max() > 0.05
        assert torch.equal(oarsmith.load_model(folder, device="cpu")(ids), expected), "and we read it too"
    return model, oracle


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["POLY", "MADE_UP", None])
def test_unknown_methods_are_refused(adapted: MakeAdapted, kind: str | None) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    path = made.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": kind}))
    message = refused(lambda: read(made))
    assert f"adapters of type '{kind}' cannot be read" in message and str(made.path) in message and "LORA" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [5]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq"},
    ],
)
def test_options_that_change_the_arithmetic_are_refused(adapted: MakeAdapted, changes: dict[str, Any]) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    path = made.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert next(iter(changes)) in refused(lambda: read(made))


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_an_adapter_of_another_base(base: Callable[[str], Base], method: str) -> None:
    message = refused(lambda: oarsmith.load_model(base("llama").path, adapter=FIXTURES / method))
    assert "model.layers.2" in message and "which the base model does not have" in message
    assert "llama_gqa_headdim" in message
    message = refused(lambda: oarsmith.load_model(base("gpt2").path, adapter=FIXTURES / method))
    assert "which the base model does not have" in message
    message = refused(lambda: oarsmith.load_model(FIXTURES / method))
    assert "base model" in message and "--adapter" in message


def test_an_adapter_of_a_wider_base(adapted: MakeAdapted) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    stored = load_file(made.path / "adapter_model.safetensors")
    name = next(n for n in stored if "lora_B" in n)
    save_file({**stored, name: torch.zeros(32, 2)}, made.path / "adapter_model.safetensors")
    assert "has shape (32, 2), the base model asks for (24, 2)" in refused(lambda: read(made))


def test_incomplete_and_surplus_tensors(adapted: MakeAdapted) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    path = made.path / "adapter_model.safetensors"
    stored = load_file(path)
    name = next(n for n in sorted(stored) if "lora_B" in n)
    save_file({k: v for k, v in stored.items() if k != name}, path)
    assert f"tensor {name} is missing" in refused(lambda: read(made))
    other = name.replace("lora_B", "lora_A")
    save_file({k: v for k, v in stored.items() if k != other}, path)
    module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    assert f"{module} has no lora_A.weight" in refused(lambda: read(made))
    for wrong in (torch.zeros(0, 24), torch.zeros(2)):
        save_file({**stored, other: wrong}, path)
        assert f"{module} has a lora_A of shape {tuple(wrong.shape)}" in refused(lambda: read(made))
    odd = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({**stored, odd: torch.zeros(2, 61)}, path)
    assert f"tensor {odd[:-1]}B is missing" in refused(lambda: read(made))
    odd = "base_model.model.model.norm.lora_embedding_A"
    save_file({**stored, odd: torch.zeros(2, 61)}, path)
    assert "sits on model.norm, which the base model does not have" in refused(lambda: read(made))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_E": torch.zeros(2)}, path)
    assert "sits on nothing" in refused(lambda: read(made))
    path.write_bytes(path.read_bytes()[:20])
    assert "truncated" in refused(lambda: read(made))
    path.unlink()
    assert "no such file" in refused(lambda: read(made))


def test_damaged_config(tmp_path: Path) -> None:
    assert "no adapter_config.json" in refused(lambda: read_adapter_config(tmp_path))
    for text, part in (("{", "not valid JSON"), ("[]", "one JSON object"), ('{"peft_type": "ODD"}', "'ODD'")):
        (tmp_path / "adapter_config.json").write_text(text)
        assert part in refused(lambda: find_method(read_adapter_config(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lora_alpha": "8"}, "lora_alpha: '8' is not a number"),
        ({"lora_alpha": True}, "lora_alpha: True is not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is not a number of sane size"),
        ({"lora_alpha": 1e9}, "is not a number of sane size"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0 is not in [0, 1)"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' is not true or false"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], not an object"),
        ({"alpha_pattern": {"(": 1}}, "'(' is not a pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: None is not a number"),
    ],
)
def test_values_that_are_none(adapted: MakeAdapted, changes: dict[str, Any], part: str) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    path = made.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = refused(lambda: read(made))
    assert part in message and str(path) in message


def test_alpha_has_peft_s_default(adapted: MakeAdapted) -> None:
    made = adapted("llama", r=2, lora_alpha=8, target_modules=["q_proj"])
    path = made.path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "lora_alpha"}))
    changes = [change for _, module in adapted_modules(read(made)) for change in module.changes.values()]
    assert len(changes) == 2 and all(isinstance(change, Lora) and change.scale == 4.0 for change in changes)


def test_only_the_adapted_segments_of_a_fused_map(adapted: MakeAdapted) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj", "v_proj"])
    rewrite = adapter_rewrite(made.path)
    model = load_decoder(made.base.path, rewrite=rewrite)
    found = {path: linear.rewrite for path, linear in linear_specs(model.spec) if linear.rewrite is not None}
    assert set(found) == {"layers.0.attention.qkv", "layers.1.attention.qkv"}
    for rewritten in found.values():
        assert isinstance(rewritten, Adapt) and {name for name, _ in rewritten.changes} == {"q_proj", "v_proj"}
    ids, plain = tokens(1, 5), load_decoder(made.base.path)
    outputs: dict[str, list[torch.Tensor]] = {"plain": [], "adapted": []}
    for key, decoder in (("plain", plain), ("adapted", read(made))):
        decoder.layers[0].attention.qkv.register_forward_hook(lambda _, __, out, key=key: outputs[key].append(out))
        with torch.no_grad():
            decoder(ids)
    difference = (outputs["plain"][0] - outputs["adapted"][0]).abs().amax(0)
    assert difference[24:36].max() == 0, "k rows are the base's, bit for bit"
    assert difference[:24].min() > 0 and difference[36:].min() > 0


def test_adapters_survive_a_bf16_base(adapted: MakeAdapted, tmp_path: Path) -> None:
    """A and B stay fp32 whatever the base, and come back bit for bit."""
    made = adapted("llama", r=4, lora_alpha=10, target_modules="all-linear")
    model = oarsmith.load_model(made.base.path, dtype="bf16", device="cpu", adapter=made.path)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    (tmp_path / "again").mkdir()
    write_adapter(model, tmp_path / "again", base="b")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (made.path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    shutil.rmtree(tmp_path / "again")
