"""The name operators: every element of every parameter has one place, and files come back as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.hf import load_decoder, write_decoder
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

from .conftest import VARIANTS, Case, read_json, tokens

Make = Callable[[str], Case]
Contents = dict[str, tuple[str, list[int], bytes]]


def contents(directory: Path) -> Contents:
    """name -> (dtype, shape, bytes) of every tensor of a directory."""
    found: Contents = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                part, tensor = file.get_slice(name), file.get_tensor(name)
                found[name] = (
                    part.get_dtype(),
                    part.get_shape(),
                    tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_element_has_one_place(case: Make, name: str) -> None:
    config = read_json(case(name).path / "config.json")
    family, spec = families.build_spec(config)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Decoder(spec, config).named_parameters()}
    visits = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in shapes.items()}
    places = family.names(spec).places
    for place in places:
        place.view(visits[place.parameter]).add_(1)
    assert all(bool((count == 1).all()) for count in visits.values())
    assert len({place.file for place in places}) == len(places)
    assert {place.file for place in places} == set(contents(case(name).path))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_for_bit(case: Make, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = case(name).path
    if dtype != torch.float32:
        original = tmp_path / "original"
        shutil.copytree(case(name).path, original)
        # A router's correction is fp32 whatever the rest is, as in the released files.
        stored = {
            key: value if key.endswith("e_score_correction_bias") else value.to(dtype)
            for key, value in load_file(original / "model.safetensors").items()
        }
        save_file(stored, original / "model.safetensors", {"format": "pt"})
    model = load_decoder(original)
    assert next(model.parameters()).dtype == dtype
    (tmp_path / "out").mkdir()
    write_decoder(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(original)
    config = read_json(tmp_path / "out" / "config.json")
    assert config == {**read_json(original / "config.json"), "dtype": str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("name", ["llama_bias_tied", "gpt2_inverse", "qwen3"])
def test_round_trip_through_shards(case: Make, name: str, tmp_path: Path) -> None:
    """Also transformers reads what we sharded, and we what transformers sharded."""
    made = case(name)
    (tmp_path / "ours").mkdir()
    write_decoder(made.decoder(), tmp_path / "ours", max_shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    assert contents(tmp_path / "ours") == contents(made.path)
    made.oracle().save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 3
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = made.decoder()(ids)
        assert torch.equal(load_decoder(tmp_path / "ours")(ids), expected)
        assert torch.equal(load_decoder(tmp_path / "theirs")(ids), expected)
        theirs = Case(name, tmp_path / "ours").oracle()(ids).logits
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gpt2", "transformer."),
        ("llama_bias_tied", "model."),
        ("bloom", "transformer."),
        ("opt_350m", "model."),
        ("falcon_40b", "transformer."),
    ],
)
def test_files_without_the_prefix(case: Make, name: str, prefix: str, tmp_path: Path) -> None:
    """Saved from the model without its head; the names come back as they were."""
    made, bare = case(name), tmp_path / "bare"
    shutil.copytree(made.path, bare)
    stored = load_file(bare / "model.safetensors")
    save_file({key.removeprefix(prefix): value for key, value in stored.items()}, bare / "model.safetensors")
    model = load_decoder(bare)
    ids = tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids), made.decoder()(ids))
    (tmp_path / "out").mkdir()
    write_decoder(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bare)


def test_stored_buffers_and_a_repeated_head_are_no_surplus(case: Make, tmp_path: Path) -> None:
    extra = {
        "gpt2": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
            "transformer.h.2.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": None,
        },
        "llama_bias_tied": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": None},
        "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }
    for name, tensors in extra.items():
        folder = tmp_path / name
        shutil.copytree(case(name).path, folder)
        stored = load_file(folder / "model.safetensors")
        table = next(value for key, value in stored.items() if "embed_tokens" in key or "wte" in key)
        added = {key: table.clone() if value is None else value for key, value in tensors.items()}
        save_file({**stored, **added}, folder / "model.safetensors")
        model = load_decoder(folder)
        (tmp_path / f"{name}_out").mkdir()
        write_decoder(model, tmp_path / f"{name}_out")
        assert contents(tmp_path / f"{name}_out") == contents(case(name).path)


def test_buffers_of_a_file_without_the_prefix(case: Make, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(case("gpt2").path, folder)
    stored = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file({**stored, "h.1.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    load_decoder(folder)
