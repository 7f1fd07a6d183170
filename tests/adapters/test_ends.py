"""LoRA on embedding and head, as PEFT has it: files both ways, gradients, merging, serving; tied heads too."""

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
from torch import Tensor

import oarsmith
from oarsmith import kernels
from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.paddle_layout import paddle_from_peft
from oarsmith.adapters.peft_layout import WEIGHTS, adapter_tensors
from oarsmith.checkpoint.config_file import read_config
from oarsmith.engine import Engine
from oarsmith.errors import CheckpointError, ConfigError, ModelError
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from tiny import TOKENIZER

from .beside_peft import same_gradients
from .conftest import Adapted, Base, tokens
from .with_parts import answers_as_forward, loss_of, off_is_base, packed_as_alone, read, saved, trained, under

IDS = tokens(2, 17)
# What each family calls its embedding; gpt2's, bloom's and mistral's heads are tied to it.
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bloom": "word_embeddings", "mistral": "embed_tokens"}
PROJECTION = {"llama": "q_proj", "gpt2": "c_attn", "bloom": "query_key_value", "mistral": "q_proj"}
OURS: dict[str, Any] = {"adapter_type": "lora", "lora_rank": 3, "lora_alpha": 5}
BOTH = ("embed_tokens", "lm_head")


def targets(name: str, which: str) -> list[str]:
    table = EMBEDDINGS[name]
    return {"embedding": [table], "head": ["lm_head"], "all": [table, "lm_head", PROJECTION[name]]}[which]


@torch.no_grad()
@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("which", ["embedding", "head", "all"])
def test_peft_s(adapted: Callable[..., Adapted], tmp_path: Path, name: str, which: str) -> None:
    """Logits, the file again, and after merging, which gives a tied head a matrix of its own."""
    patterns = {"rank_pattern": {"lm_head": 5}, "alpha_pattern": {EMBEDDINGS[name]: 11}, "use_rslora": True}
    made = adapted(name, r=4, lora_alpha=6, target_modules=targets(name, which), **patterns)
    model, expected = read(made.base.path, made.path), made.oracle(IDS).logits
    assert (expected - made.base.oracle()(IDS).logits).abs().max() > 0.05
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    again, stored = (load_file(f / WEIGHTS) for f in (saved(model, tmp_path / "a", made.base.path), made.path))
    # PEFT stores the base's matrix beside its adapter.
    assert again.keys() == {key for key in stored if ".base_layer." not in key}
    assert all(torch.equal(tensor, stored[key]) for key, tensor in again.items())
    off_is_base(model, made.base.path)
    torch.testing.assert_close(read(made.base.path, tmp_path / "a")(IDS), expected, rtol=0, atol=1e-4)
    plain = merge_adapter(model)
    assert not plain.spec.head.tied and not list(adapted_maps(plain))
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-4)
    oarsmith.save_model(plain, tmp_path / "merged")
    torch.testing.assert_close(Base(name, tmp_path / "merged").oracle()(IDS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("which", ["embedding", "head", "all"])
def test_gradients(adapted: Callable[..., Adapted], name: str, which: str) -> None:
    same_gradients(adapted(name, r=4, target_modules=targets(name, which)), "lora_")


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("ends", [("embed_tokens",), ("lm_head",), (*BOTH, "a projection")])
def test_peft_reads_ours(base: Callable[[str], Base], tmp_path: Path, name: str, ends: tuple[str, ...]) -> None:
    own = base(name)
    chosen = [PROJECTION[name] if end == "a projection" else end for end in ends]
    model = trained(under(own.path, **OURS, rslora=True, lora_target_modules=chosen))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder).eval()
    with torch.no_grad():
        expected = model(IDS)
        torch.testing.assert_close(oracle(IDS).logits, expected, rtol=0, atol=1e-4)
        assert (expected - own.oracle()(IDS).logits).abs().max() > 0.05
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {EMBEDDINGS[name] if end == "embed_tokens" else end for end in chosen}
    assert set(config["target_modules"]) == wanted and not config.get("rank_pattern")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_start(base: Callable[[str], Base], name: str) -> None:
    """It is the base, bit for bit; the adapter alone trains, and each of its tensors can leave the start."""
    model = under(base(name).path, **OURS, lora_target_modules=BOTH)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS), oarsmith.load_model(base(name).path, device="cpu")(IDS))
    found = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(found) == 4 and all(n.startswith("parts.0.maps.") for n in found)
    loss_of(model.train()(IDS), IDS).backward()
    moved = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"lora_embedding_A", "lora_B"}, "the others follow: their partners are zero now"


def head_loss(model: Decoder, ids_T: Tensor, z_loss: float) -> Tensor:
    hidden_TD = model.hidden(ids_T, Layout.documents([0, len(ids_T)], torch.arange(len(ids_T))))
    coef_N = torch.full((len(ids_T) - 1,), 0.25)
    return model.head_loss(hidden_TD[:-1], ids_T[1:], coef_N, z_loss=z_loss).loss


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_loss_without_logits(base: Callable[[str], Base], name: str, z_loss: float) -> None:
    """The same as from whole logits, and so are its gradients."""
    model = trained(under(base(name).path, **OURS, lora_target_modules=BOTH))
    ids_T = IDS[0]
    found = head_loss(model, ids_T, z_loss)
    logits_NV = model(ids_T[None])[0, :-1]
    lse_N = logits_NV.logsumexp(-1)
    nll_N = lse_N - logits_NV.gather(1, ids_T[1:, None])[:, 0]
    expected = 0.25 * (nll_N + z_loss * lse_N.square()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_log_probabilities_of_answers(base: Callable[[str], Base], name: str) -> None:
    """Those that preference losses take, and their gradients."""
    model = trained(under(base(name).path, **OURS, lora_target_modules=BOTH))
    ids_T = IDS[0]
    hidden_TD = model.hidden(ids_T, Layout.documents([0, len(ids_T)], torch.arange(len(ids_T))))
    inputs_ND, weight_VD = model.head_inputs(hidden_TD[:-1])
    found = kernels.token_logprobs(inputs_ND, weight_VD, ids_T[1:], precise=True)
    expected = model(ids_T[None])[0, :-1].log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(values.square().sum(), leaves) for values in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_and_served(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = base(name).path
    model = trained(under(path, **OURS, lora_target_modules=(*BOTH, "q_proj")))
    packed_as_alone(model)
    answers_as_forward(model)
    folder = saved(model, tmp_path / "a", path)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    engine = Engine(path, adapter=folder, device="cpu", dtype="fp32")
    assert engine.how.startswith("compiled step"), "merged"
    asked = [tokens(7, seed=3).tolist()]
    greedy = oarsmith.Sampling(max_new_tokens=6, ignore_eos=True)
    expected = Engine(model).generate(asked, greedy)[0].ids
    assert engine.generate(asked, greedy)[0].ids == expected
    with pytest.raises(ConfigError, match="cannot be chosen by single requests"):
        Engine(oarsmith.load_model(path, device="cpu"), adapters={"a": folder})


def test_dropout(base: Callable[[str], Base]) -> None:
    """On what the head's A reads; nothing is dropped of tokens."""
    model = trained(under(base("llama").path, **OURS, lora_dropout=0.5, lora_target_modules=BOTH)).train()
    hidden_ND = torch.randn(3, 24)
    with torch.no_grad():
        first, second = model.logits(hidden_ND), model.logits(hidden_ND)
        assert not torch.equal(first, second)
        draws = torch.stack([model.logits(hidden_ND) for _ in range(4000)])
        torch.testing.assert_close(draws.mean(0), model.eval().logits(hidden_ND), rtol=0, atol=0.2)
        (part,) = model.parts
        x_TE = torch.zeros(17, 24)
        assert torch.equal(part.train().looked_up(IDS[0], x_TE), part.looked_up(IDS[0], x_TE))


@pytest.mark.parametrize("method", ["pissa", "olora", "moslora", "lorapro", "adalora"])
def test_lora_s_relatives_on_the_head(base: Callable[[str], Base], tmp_path: Path, method: str) -> None:
    own = base("llama")
    rank = {"lora_rank": 3}
    model = trained(under(own.path, adapter_type=method, **rank, lora_target_modules=("lm_head", "q_proj")), std=0.1)
    folder = saved(model, tmp_path / "a", own.path)
    with torch.no_grad():
        expected = model(IDS)
        oracle = peft.PeftModel.from_pretrained(own.oracle(), folder).eval()
        torch.testing.assert_close(oracle(IDS).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(merge_adapter(read(own.path, folder))(IDS), expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"cannot change model\.embed_tokens: LoRA can"):
        under(own.path, adapter_type=method, **rank, lora_target_modules=("embed_tokens",))


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "oft", "ia3", "vera", "fourierft", "mora"])
@pytest.mark.parametrize("end", BOTH)
def test_methods_that_cannot(base: Callable[[str], Base], method: str, end: str) -> None:
    with pytest.raises(ConfigError, match=r"this method cannot change (lm_head|model\.embed_tokens)"):
        under(base("llama").path, adapter_type=method, lora_target_modules=(end,))


def test_rows_beside(base: Callable[[str], Base]) -> None:
    keys = {**OURS, "trainable_tokens": [1, 2]}
    for name, end in (("llama", "embed_tokens"), ("mistral", "lm_head")):
        with pytest.raises(ConfigError, match="single rows cannot train beside"):
            under(base(name).path, **keys, lora_target_modules=(end,))
    model = trained(under(base("llama").path, **keys, lora_target_modules=("lm_head",)))
    with torch.no_grad():
        expected = model(IDS)
        torch.testing.assert_close(merge_adapter(model)(IDS), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_tied_adapters(adapted: Callable[..., Adapted]) -> None:
    """PEFT's ``ensure_weight_tying``: the head's matrices are the embedding's, and its file has both."""
    made = adapted("mistral", r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    torch.testing.assert_close(read(made.base.path, made.path)(IDS), made.oracle(IDS).logits, rtol=0, atol=1e-4)


def test_a_family_that_always_ties(base: Callable[[str], Base], tmp_path: Path) -> None:
    """Its config cannot say that the head is its own."""
    model = merge_adapter(trained(under(base("mistral").path, **OURS, lora_target_modules=BOTH)))
    model.config["tie_word_embeddings"] = True
    with pytest.raises(ModelError, match="always share the embedding's"):
        oarsmith.save_model(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_paddle_has_no_such_thing(adapted: Callable[..., Adapted], tmp_path: Path, end: str) -> None:
    made = adapted("llama", r=4, target_modules=["q_proj", end])
    with pytest.raises(CheckpointError, match=rf"changes (model\.)?{end}, and PaddleNLP's LoRA sits on projections"):
        paddle_from_peft(made.path, tmp_path / "paddle", read_config(made.base.path), base=None, pickled=False)


def test_damaged(adapted: Callable[..., Adapted]) -> None:
    """Also where the file has a matrix of the base that is not the base's: PEFT would take that one."""
    made = adapted("llama", r=4, target_modules=["embed_tokens"])
    stored = load_file(made.path / WEIGHTS)
    copy, b = (next(key for key in stored if key.endswith(end)) for end in ("base_layer.weight", "lora_embedding_B"))
    assert set(adapter_tensors(read(made.base.path, made.path))) == set(stored) - {copy}
    save_file({**stored, b: stored[b][:5].clone()}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{b} has shape"):
        read(made.base.path, made.path)
    save_file({**stored, copy: stored[copy] + 1}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"has a model\.embed_tokens of its own, which is not the base's"):
        read(made.base.path, made.path)
