"""transformers with compressed-tensors, where that is installed, reads the weights that we wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oarsmith.models.rounding import Activations
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.scheme import MapScheme, Scheme
from quantized_models import write_quantized
from tiny import tiny_decoder

INT8 = Grid(bits=8, group=None, symmetric=True)
E4M3 = Activations(code="e4m3")
SCHEMES = {
    "W4A16": MapScheme(weights=Grid(bits=4, group=16, symmetric=True)),
    "W4A16 with zeros": MapScheme(weights=Grid(bits=4, group=16)),
    "W8A16": MapScheme(weights=INT8),
    "W8A8": MapScheme(weights=INT8, activations=Activations()),
    "FP8": MapScheme(weights=Grid(code="e4m3", bits=8, group=None), activations=E4M3),
    "FP8 blocks": MapScheme(
        weights=Grid(code="e4m3", bits=8, rows=16, group=16), activations=Activations(code="e4m3", group=16)
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    scheme = Scheme(name=name, default=SCHEMES[name], overrides={})
    written = write_quantized(tiny_decoder("llama"), "compressed-tensors", scheme, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = dict(model.named_parameters())
    for file, dense in written.expected.items():
        # It multiplies in another order.
        torch.testing.assert_close(found[file].detach(), dense, rtol=3e-7, atol=0)
