"""GGUF from what is told to a writer: numbers on its own grids come back, and columns that count more err less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.source import open_model
from oarsmith.errors import ModelError
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.layouts.contents import contents_of
from oarsmith.quantize.layouts.gguf import open_gguf
from oarsmith.quantize.scheme import MapScheme, Scheme
from quantized_models import FLOAT, fill
from tiny import TOKENIZER, tiny_decoder

Q4_0 = Grid(bits=4, group=32, symmetric=True)


def scheme_of(default: MapScheme) -> Scheme:
    return Scheme(name="test", default=default, overrides={})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_numbers_on_its_grid_come_back(family: str, tmp_path: Path) -> None:
    """Q4_0 is a symmetric grid of 32 columns with fp16 scales whose extreme lies on the lowest number."""
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    model = tiny_decoder(family, **sizes)
    contents = contents_of(model.config, scheme_of(MapScheme(weights=Q4_0)), torch.float32)
    opened = open_gguf(contents, tmp_path / "m.gguf", type="q4_0", with_tokenizer=False)
    written = fill(model, contents, opened, torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert len(written.expected) == len(contents.maps) > 0
    name = "transformer.h.0.mlp.c_proj.weight" if family == "gpt2" else "model.layers.0.mlp.down_proj.weight"
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata["general.name"] == "m"
    stored, expected = file.tensors["blk.0.ffn_down.weight"], written.expected[name]
    assert stored.type is GGMLQuantizationType.Q4_0
    assert torch.equal(file.read(stored, torch.float32), expected.t() if family == "gpt2" else expected)


def test_importance(tmp_path: Path) -> None:
    """Of a map's inputs, by the name of its tensor."""
    model = tiny_decoder("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    contents = contents_of(model.config, scheme_of(FLOAT), torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    weights_I = torch.where(torch.arange(256) % 8 == 0, 100.0, 1.0)
    errors = []
    for important in (False, True):
        file = tmp_path / f"{important}.gguf"
        with open_gguf(contents, file, type="q4_k") as writer:
            for path in TOKENIZER.glob("tokenizer*"):
                (writer.folder / path.name).write_bytes(path.read_bytes())
            for key, parameter in model.named_parameters():
                writer.parameter(key, parameter)
            if important:
                writer.importance[name] = weights_I
        assert writer.report is not None and writer.report.tensor_types["Q4_K"] == 8
        convert_gguf(file, tmp_path / f"{important}", "fp32")
        with open_model(tmp_path / f"{important}")[1] as source:
            found = source.read(name)
        original = dict(model.named_parameters())["layers.0.ffn.down.weight"].detach()
        errors.append(float(((found - original) ** 2 * weights_I).sum()))
    assert 0 < errors[1] < 0.9 * errors[0]


def test_what_has_no_place(tmp_path: Path) -> None:
    scheme = scheme_of(MapScheme(weights=Q4_0, activations=Activations()))
    model = tiny_decoder("llama")
    for wrong in (scheme, replace(scheme_of(FLOAT), cache=CacheScheme())):
        contents = contents_of(model.config, wrong, torch.float32)
        with (
            pytest.raises(ModelError, match="no place for how inputs and caches are rounded"),
            open_gguf(contents, tmp_path / "m.gguf", type="q4_0"),
        ):
            pass
    assert not list(tmp_path.iterdir())
