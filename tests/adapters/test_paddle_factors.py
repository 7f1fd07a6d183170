"""LoKr, MoRA and VeRA between PaddleNLP's files and ours, beside PaddleNLP's formulas written out in fp64."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oarsmith
from oarsmith.adapters.change import Change
from oarsmith.adapters.lokr import Lokr
from oarsmith.adapters.mora import Mora
from oarsmith.adapters.paddle_layout import paddle_from_peft, peft_from_paddle
from oarsmith.adapters.targets import match_targets
from oarsmith.adapters.vera import Vera
from oarsmith.checkpoint.config_file import read_config
from oarsmith.errors import CheckpointError

from .beside_peft import fresh, randomised, refused, saved
from .conftest import Adapted, Base, tokens

MakeBase = Callable[[str], Base]
TARGETS = ("q_proj", "v_proj", "down_proj")


@torch.no_grad()
def logits(path: Path, base: Base) -> Tensor:
    return oarsmith.load_model(base.path, adapter=path, device="cpu")(tokens(2, 9))


def ours(base: Base, folder: Path, change: Change, targets: tuple[str, ...] = TARGETS) -> Path:
    def choose(modules: Collection[str]) -> Mapping[str, Change]:
        return dict.fromkeys(match_targets(modules, targets), change)

    return saved(randomised(fresh(base.path, choose), std=0.3), folder, base.path)


def state(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    (path,) = folder.glob("*.pdparams")
    with path.open("rb") as file:
        return {key: value for key, value in pickle.load(file).items() if isinstance(value, np.ndarray)}


def paddle_adapter(folder: Path, name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """As PaddleNLP would have saved it."""
    folder.mkdir()
    (folder / f"{name}_config.json").write_text(json.dumps(settings))
    with (folder / f"{name}_model_state.pdparams").open("wb") as file:
        pickle.dump({key: tensor.float().numpy() for key, tensor in tensors.items()}, file, protocol=4)
    return folder


def merged_logits(base: Base, updates: Mapping[str, Tensor]) -> Tensor:
    """Of the base with updates [in, out] by the layers' own names."""
    oracle = base.oracle()
    with torch.no_grad():
        for name, update in updates.items():
            oracle.get_submodule(name).weight.add_(update.t())
        found: Tensor = oracle(tokens(2, 9)).logits
    return found


@pytest.mark.parametrize(
    "change",
    [Lokr(rank=2, alpha=3.0), Lokr(rank=1, alpha=1.0, both=True, factor=4), Mora(rank=2), Vera(rank=6, key=3)],
    ids=["lokr", "lokr both", "mora", "vera"],
)
def test_there_and_back(base: MakeBase, tmp_path: Path, change: Change) -> None:
    made = base("llama")
    source, config = ours(made, tmp_path / "ours", change), read_config(made.path)
    count = paddle_from_peft(source, tmp_path / "paddle", config, base="b", pickled=True)
    peft_from_paddle(tmp_path / "paddle", tmp_path / "back", config, base=None)
    torch.testing.assert_close(logits(tmp_path / "back", made), logits(source, made), rtol=0, atol=1e-4)
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "back"))
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "b"
    if isinstance(change, Vera):
        # A, B, b and d of six projections; what comes back is LoRA.
        assert count == 24 and settings["peft_type"] == "LORA" and settings["r"] == 6
        return
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert count == len(before)


@pytest.mark.parametrize("both", [False, True])
def test_lokr_s_formula(base: MakeBase, tmp_path: Path, both: bool) -> None:
    """W [in, out] + alpha/dim (W1 kron W2)^T; PaddleNLP's parameters in the shapes of its layer."""
    made, generator = base("llama"), torch.Generator().manual_seed(1)
    # q_proj is 24 to 24: 4 x 6 by 4 x 6.
    shapes = {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (6, 1), "w2_b": (1, 6)} if both else {
        "w1": (4, 4), "w2_a": (6, 1), "w2_b": (1, 6)
    }  # fmt: skip
    own = {f"lokr_{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    folder = paddle_adapter(
        tmp_path / "paddle",
        "lokr",
        {"lokr_dim": 1, "lokr_alpha": 0.0, "factor": -1, "decompose_both": both, "base_model_name_or_path": "x"},
        {f"llama.layers.1.self_attn.q_proj.{key}": tensor for key, tensor in own.items()},
    )
    peft_from_paddle(folder, tmp_path / "ours", read_config(made.path), base=None)
    w1 = own["lokr_w1_a"] @ own["lokr_w1_b"] if both else own["lokr_w1"]
    update = torch.kron(w1, own["lokr_w2_a"] @ own["lokr_w2_b"]).t()
    expected = merged_logits(made, {"model.layers.1.self_attn.q_proj": update})
    torch.testing.assert_close(logits(tmp_path / "ours", made), expected, rtol=0, atol=1e-4)


def test_what_is_written_of_lokr(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    made = adapted("llama", kind=peft.LoKrConfig, r=2, alpha=4, decompose_factor=3, target_modules=["v_proj"])
    paddle_from_peft(made.path, tmp_path / "paddle", read_config(made.base.path), base=None, pickled=False)
    config = json.loads((tmp_path / "paddle" / "lokr_config.json").read_text())
    assert {key: config[key] for key in ("lokr_dim", "lokr_alpha", "factor", "decompose_both", "scaling")} == {
        "lokr_dim": 2, "lokr_alpha": 4.0, "factor": 3, "decompose_both": False, "scaling": 2.0
    }  # fmt: skip
    assert config["target_modules"] == [".*v_proj.*"] and config["dtype"] == "float32"
    stored = load_file(made.path / "adapter_model.safetensors")
    found = state(tmp_path / "paddle")
    assert len(found) == len(stored)
    for key, tensor in stored.items():
        theirs = found[key.replace("base_model.model.model", "llama")]
        assert np.array_equal(theirs, tensor.numpy())


def test_mora_s_matrix_is_turned(base: MakeBase, tmp_path: Path) -> None:
    made = base("llama")
    source = ours(made, tmp_path / "ours", Mora(rank=2), ("o_proj",))
    paddle_from_peft(source, tmp_path / "paddle", read_config(made.path), base=None, pickled=True)
    config = json.loads((tmp_path / "paddle" / "lora_config.json").read_text())
    assert config["use_mora"] is True and config["r"] == 2
    stored, found = load_file(source / "adapter_model.safetensors"), state(tmp_path / "paddle")
    for key, tensor in stored.items():
        theirs = found[key.replace("base_model.model.model", "llama").replace("mora_M", "lora_A")]
        assert np.array_equal(theirs, tensor.t().numpy())


def singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


@pytest.mark.parametrize("held", ["B", "", "flipped"])
def test_vera_of_singular_vectors(base: MakeBase, tmp_path: Path, held: str) -> None:
    """The base's weight is W - A B there, and A is never in the file; signs are another library's."""
    made, generator, tensors, updates = base("llama"), torch.Generator().manual_seed(1), {}, {}
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        weight = made.oracle().get_submodule(f"model.{name}").weight.detach().t()
        a, start = singular(weight, 3)
        signs = torch.tensor([-1.0, 1.0, -1.0]) if held == "flipped" else torch.ones(3)
        a, start = a * signs, start * signs[:, None]
        b = start + 0.05 * torch.randn(start.shape, generator=generator) if held else start
        scale_d, scale_b = (1 + 0.3 * torch.randn(n, generator=generator) for n in (3, weight.shape[1]))
        updates[f"model.{name}"] = (a @ scale_d.diag().double() @ b @ scale_b.diag().double() - a @ start).float()
        tensors |= {f"llama.{name}.vera_d": scale_d, f"llama.{name}.vera_b": scale_b}
        tensors |= {f"llama.{name}.vera_B": b} if held else {}
    settings = {"r": 3, "vera_alpha": 3, "pissa_init": True, "base_model_name_or_path": str(made.path)}
    folder = paddle_adapter(tmp_path / "paddle", "vera", settings, tensors)
    config = read_config(made.path)
    peft_from_paddle(folder, tmp_path / "ours", config, base=None, weights=made.path)
    expected = merged_logits(made, updates)
    torch.testing.assert_close(logits(tmp_path / "ours", made), expected, rtol=0, atol=2e-4)
    message = refused(lambda: peft_from_paddle(folder, tmp_path / "no", config, base=None))
    assert "singular vectors of the base's weights, which are not there" in message


def test_vera_without_them(base: MakeBase, tmp_path: Path) -> None:
    made, generator = base("llama"), torch.Generator().manual_seed(1)
    name = "llama.layers.0.self_attn.k_proj"
    shapes = {"A": (24, 2), "B": (2, 12), "d": (2,), "b": (12,)}
    own = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    folder = paddle_adapter(
        tmp_path / "paddle", "vera", {"r": 2, "vera_alpha": 5}, {f"{name}.vera_{k}": t for k, t in own.items()}
    )
    peft_from_paddle(folder, tmp_path / "ours", read_config(made.path), base=str(made.path))
    update = 2.5 * own["A"] @ own["d"].diag() @ own["B"] @ own["b"].diag()
    expected = merged_logits(made, {"model.layers.0.self_attn.k_proj": update})
    torch.testing.assert_close(logits(tmp_path / "ours", made), expected, rtol=0, atol=1e-4)
    lone = {f"{name}.vera_{k}": own[k] for k in "dbB"}
    folder = paddle_adapter(tmp_path / "lone", "vera", {"r": 2, "vera_alpha": 5}, lone)
    message = refused(lambda: peft_from_paddle(folder, tmp_path / "no", read_config(made.path), base=None))
    assert f"tensor {name}.vera_A is missing, and without pissa_init it was drawn at random" in message


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_peft_s_vera_in_paddle(adapted: Callable[..., Adapted], tmp_path: Path, name: str, save: bool) -> None:
    """PaddleNLP's own formula on what is written; GPT-2's projection is three there."""
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "down_proj"]
    made = adapted(
        name, kind=peft.VeraConfig, r=5, target_modules=targets, save_projection=save, fan_in_fan_out=name == "gpt2"
    )
    config = read_config(made.base.path)
    paddle_from_peft(made.path, tmp_path / "paddle", config, base=None, pickled=True)
    found = {key: torch.from_numpy(value) for key, value in state(tmp_path / "paddle").items()}
    modules = sorted({key.rpartition(".")[0] for key in found})
    assert len(modules) == (8 if name == "gpt2" else 4)
    if name == "llama":
        updates = {}
        for module in modules:
            a, b, d, scale = (found[f"{module}.vera_{kind}"].double() for kind in "ABdb")
            updates[module.replace("llama", "model")] = (a @ d.diag() @ b @ scale.diag()).float()
        with torch.no_grad():
            expected = made.oracle(tokens(2, 9)).logits
        torch.testing.assert_close(merged_logits(made.base, updates), expected, rtol=0, atol=1e-4)
    peft_from_paddle(tmp_path / "paddle", tmp_path / "back", config, base=str(made.base.path))
    torch.testing.assert_close(logits(tmp_path / "back", made.base), logits(made.path, made.base), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("lokr", {"lokr_dim": 0}, "lokr_dim is 0"),
        ("lokr", {"factor": 1.5}, "factor 1.5"),
        ("lokr", {"lokr_alpha": "1"}, "lokr_alpha is '1'"),
        ("lokr", {"trainable_bias": "all"}, "LoKr with trainable_bias"),
        ("vera", {"r": True}, "r is True"),
        ("vera", {"vera_alpha": None}, "vera_alpha None"),
        ("vera", {"trainable_modules": ["x"]}, "VeRA with trainable_modules"),
        ("lokr", {"lokr_dim": 1}, "tensor llama.layers.0.self_attn.q_proj.lokr_w2_a is missing"),
        ("lora", {"r": 1, "use_mora": True}, "no place"),
        ("vera", {"r": 1}, "tensor llama.x has no place"),
    ],
)
def test_damaged_files(base: MakeBase, tmp_path: Path, name: str, settings: dict[str, Any], part: str) -> None:
    made = base("llama")
    tensors = {"llama.layers.0.self_attn.q_proj.lokr_w1": torch.zeros(4, 4), "llama.x": torch.zeros(2)}
    folder = paddle_adapter(
        tmp_path / "paddle", name, settings, tensors if name == "lokr" else {"llama.x": tensors["llama.x"]}
    )
    assert part in refused(lambda: peft_from_paddle(folder, tmp_path / "out", read_config(made.path), base=None))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_put_together(base: MakeBase, tmp_path: Path) -> None:
    """GPT-2's c_attn is three projections in PaddleNLP; ranks that differ have no place in its config."""
    made = base("gpt2")
    source, config = ours(made, tmp_path / "ours", Mora(rank=2), ("c_attn",)), read_config(made.path)
    with pytest.raises(CheckpointError, match="c_attn is several projections in PaddleNLP"):
        paddle_from_peft(source, tmp_path / "out", config, base=None, pickled=True)
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"c_attn": 3}}))
    with pytest.raises(CheckpointError, match="ranks or factors that differ"):
        paddle_from_peft(source, tmp_path / "out", config, base=None, pickled=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="adapters of type 'IA3' cannot be converted"):
        paddle_from_peft(source, tmp_path / "out", config, base=None, pickled=True)
