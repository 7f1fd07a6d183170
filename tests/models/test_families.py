"""Every family and variant against transformers: logits, loss, gradients, greedy continuation with a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

from .conftest import BOTH_SPELLINGS, VARIANTS, Case, gradients_in_file_layout, old_spelling, read_json, tokens

Make = Callable[[str], Case]
# fp32 on both sides; products are summed in another order (q, k and v are one product here).
TOLERANCE = 1e-4


@torch.no_grad()
def oracle_logits(case: Case, ids: Tensor) -> Tensor:
    return case.oracle()(ids).logits


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """``count`` tokens, one at a time, with a cache."""
    cache, ids, found = model.new_cache(1, len(prompt) + count), prompt, []
    with torch.no_grad():
        for _ in range(count):
            hidden = model.hidden(torch.tensor(ids), cache.extend([len(ids)]), cache)
            ids = [int(model.logits(hidden[-1:]).argmax())]
            found += ids
    return found


@torch.no_grad()
def oracle_greedy(case: Case, prompt: list[int], count: int) -> tuple[list[int], float]:
    """The tokens, and the smallest distance between best and second best logit."""
    model, past, ids, found, margins = case.oracle(), None, prompt, [], []
    for _ in range(count):
        out = model(torch.tensor([ids]), past_key_values=past, use_cache=True)
        past, best = out.past_key_values, out.logits[0, -1].topk(2)
        ids = [int(best.indices[0])]
        margins.append(float(best.values[0] - best.values[1]))
        found += ids
    return found, min(margins)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(case: Make, name: str) -> None:
    """40 tokens: past the original context of the rope variants and past every window. Rows do not see each other."""
    made = case(name)
    ids = tokens(2, 40)
    with torch.no_grad():
        found = made.decoder()(ids)
    expected = oracle_logits(made, ids)
    assert found.shape == (2, 40, 101) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_right_padded_batch(case: Make, name: str) -> None:
    """Causality makes padding on the right harmless: what comes before it is as transformers gives it with a mask."""
    made, ids, length = case(name), tokens(2, 40, seed=8), 23
    mask = torch.ones_like(ids)
    mask[1, length:] = 0
    ids[1, length:] = 0
    found, expected = made.decoder()(ids), made.oracle()(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1, :length], expected[1, :length], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", BOTH_SPELLINGS)
def test_logits_from_an_older_config(case: Make, name: str, tmp_path: Path) -> None:
    """rope_theta and rope_scaling with "type", no layer_types, torch_dtype: what most published files say."""
    made = case(name)
    shutil.copytree(made.path, tmp_path / "old")
    config = read_json(made.path / "config.json")
    assert "rope_parameters" in config and "rope_theta" not in config
    (tmp_path / "old" / "config.json").write_text(json.dumps(old_spelling(config)))
    ids = tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path / "old")(ids), made.decoder()(ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_continuation(case: Make, name: str) -> None:
    """16 tokens from a prompt of 9: a context of 16 and windows of 5 and 7 are passed on the way."""
    made = case(name)
    prompt = tokens(9, seed=3).tolist()
    expected, margin = oracle_greedy(made, prompt, 16)
    assert margin > 2 * TOLERANCE, "this prompt decides nothing: choose another seed"
    assert greedy(made.decoder(), prompt, 16) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients(case: Make, name: str, tmp_path: Path) -> None:
    """The gradient of every tensor of the file, in the file's shape."""
    made, ids = case(name), tokens(1, 24, seed=5)
    oracle, model = made.oracle(), made.decoder()
    expected = oracle(ids, labels=ids).loss
    expected.backward()
    loss = functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    parameters, theirs = dict(model.named_parameters()), gradients_in_file_layout(oracle, tmp_path)
    places = families.find(model.config).names(model.spec).places
    assert {place.file for place in places} == set(theirs)
    for place in places:
        if not parameters[place.parameter].requires_grad:
            continue
        grad, want = parameters[place.parameter].grad, theirs[place.file]
        assert grad is not None, place.file
        # Two thousand terms in another order, some of size 1: 1e-5 of the largest entry.
        limit = max(1e-6, 2e-5 * float(want.abs().max()))
        found = place.view(grad).reshape(want.shape)
        torch.testing.assert_close(found, want, rtol=0, atol=limit, msg=lambda m, p=place: f"{p.file}: {m}")
    norms = float(model.embedding.weight.grad.norm()), float(oracle.get_input_embeddings().weight.grad.norm())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


FROZEN_PADDING = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi3"),
    *("olmo2", "granite", "smollm3", "starcoder2", "cohere", "glm", "glm4", "deepseek_v2", "deepseek_v3", "gpt_oss"),
)


@pytest.mark.parametrize("name", [*FROZEN_PADDING, "opt", "bloom", "gpt2", "gpt_neox", "falcon_7b"])
def test_gradient_of_the_padding_row(name: str) -> None:
    """Where transformers makes the table with a padding index, that row learns from the output alone."""
    kind, arguments = VARIANTS[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**arguments, "pad_token_id": 5}))
    theirs = model.get_input_embeddings().padding_idx
    spec = families.build_spec(model.config.to_dict())[1]
    assert spec.embedding.padding_id == theirs == (5 if name in (*FROZEN_PADDING, "opt") else None)


def test_padding_row_where_the_config_is_silent() -> None:
    for name in ("gemma", "gemma2", "gemma3", "cohere", "olmo2", "llama"):
        kind, arguments = VARIANTS[name]
        config = {**arguments, "model_type": kind.model_type}
        config.pop("pad_token_id", None)
        assert families.build_spec(config)[1].embedding.padding_id == kind().pad_token_id


def test_bf16_stays_near(case: Make) -> None:
    """The gemma embedding scale and the norms round as transformers' do; the rest is bf16 noise."""
    for name in ("llama_gqa_head_dim", "gemma", "gpt2"):
        made, ids = case(name), tokens(1, 24)
        with torch.no_grad():
            exact = made.oracle()(ids).logits
            theirs = made.oracle().bfloat16()(ids).logits.float()
            ours = load_decoder(made.path, dtype=torch.bfloat16)(ids).float()
        noise, error = float((theirs - exact).square().mean().sqrt()), float((ours - exact).square().mean().sqrt())
        assert error < 1.5 * noise, (name, error, noise)


def test_mistral_without_the_key_has_the_family_window(case: Make, tmp_path: Path) -> None:
    """null means no window; a missing key means what the family's own config class says."""
    config = read_json(case("mistral").path / "config.json")
    config.pop("layer_types", None)
    windows = {}
    for name, value in {"set": 7, "null": None, "missing": ...}.items():
        changed = {key: item for key, item in config.items() if key != "sliding_window"}
        if value is not ...:
            changed["sliding_window"] = value
        windows[name] = families.build_spec(changed)[1].layers[0].attention.window
    assert windows == {"set": 7, "null": None, "missing": 4096}


def test_qwen2_layers_below_the_border_are_full(case: Make) -> None:
    for config in (read_json(case("qwen2_sliding").path / "config.json"),):
        for spelled in (config, old_spelling(config)):
            layers = families.build_spec(spelled)[1].layers
            assert [layer.attention.window for layer in layers] == [None, None, 5]
            switched_off = {**spelled, "use_sliding_window": False}
            assert {layer.attention.window for layer in families.build_spec(switched_off)[1].layers} == {None}


def test_gemma_gelu_means_the_tanh_approximation() -> None:
    config = {**VARIANTS["gemma"][1], "model_type": "gemma"}
    for activation in ({"hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"}, {}):
        spec = families.build_spec({**config, **activation})[1]
        assert spec.layers[0].ffn.activation == "gelu_tanh" and spec.head.tied and spec.embedding.scale == 32**0.5
    assert (
        families.build_spec({k: v for k, v in config.items() if k != "head_dim"})[1].layers[0].attention.head_dim == 256
    )
