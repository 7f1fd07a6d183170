"""What other tools have written is written again bit for bit, and what a layout has no place for is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from oarsmith.checkpoint.quantized.stored import read_scheme
from oarsmith.checkpoint.quantized.unpacked import unpacked
from oarsmith.checkpoint.source import open_source
from oarsmith.errors import CheckpointError, ConfigError, ModelError
from oarsmith.kernels.coded import CodedWeight, unpack_pairs
from oarsmith.models.names import Place, whole
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid, Quantized, Steps, quantize
from oarsmith.quantize.layouts.awq import Awq
from oarsmith.quantize.layouts.base import Layout, open_layout
from oarsmith.quantize.layouts.choose import layout_of
from oarsmith.quantize.layouts.compressed import CompressedTensors
from oarsmith.quantize.layouts.contents import FileMap, contents_of
from oarsmith.quantize.layouts.gptq import Gptq
from oarsmith.quantize.layouts.pieces import block_scales
from oarsmith.quantize.scheme import MapScheme, Scheme
from quantized_models import FLOAT, write_quantized
from tiny import CONFIGS, tiny_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
INT, E4M3 = Activations(), Activations(code="e4m3")
SYM4, ASYM4 = Grid(bits=4, group=16, symmetric=True), Grid(bits=4, group=16)
INT8 = Grid(bits=8, group=None, symmetric=True)
BLOCKS = Grid(code="e4m3", bits=8, rows=16, group=16)
CASES: dict[str, tuple[Layout, MapScheme]] = {
    "awq_asym": (Awq(), MapScheme(weights=Grid(bits=4, group=64))),
    "fp8_block": (CompressedTensors(), MapScheme(weights=Grid(code="e4m3", bits=8, rows=8, group=32))),
    "fp8_dyn": (CompressedTensors(), MapScheme(weights=Grid(code="e4m3", bits=8, group=None), activations=E4M3)),
    "fp8_tensor": (CompressedTensors(), MapScheme(weights=Grid(code="e4m3", bits=8, rows=None, group=None))),
    "gptq_sym": (Gptq(plain_zeros=False), MapScheme(weights=Grid(bits=4, group=64, symmetric=True))),
    "w4a16_asym": (CompressedTensors(), MapScheme(weights=Grid(bits=4, group=32))),
    "w4a16_sym": (CompressedTensors(), MapScheme(weights=Grid(bits=4, group=64, symmetric=True))),
    "w8a16": (CompressedTensors(), MapScheme(weights=INT8)),
    "w8a16_asym": (CompressedTensors(), MapScheme(weights=Grid(bits=8, group=48))),
    "w8a8": (CompressedTensors(), MapScheme(weights=INT8, activations=INT)),
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny weights."""


def from_codes(coded: CodedWeight, grid: Grid) -> Quantized:
    """A file's weight as it was before it was packed."""
    numbers = unpack_pairs(coded.codes_OB) if coded.code.bits == 4 else coded.codes_OB
    if coded.code.name == "e4m3":
        numbers = numbers.view(torch.float8_e4m3fn)
    elif coded.code.name == "int8":
        numbers = numbers ^ 128
    zero = None if grid.symmetric or coded.zero_OG is None else coded.zero_OG.float()
    return Quantized(grid=grid, numbers_OI=numbers, steps=Steps(scale_OG=coded.scale_OG.float(), zero_OG=zero))


@pytest.mark.parametrize("name", CASES)
def test_as_other_tools_write_it(name: str, tmp_path: Path) -> None:
    layout, scheme = CASES[name]
    grid = scheme.weights
    assert grid is not None
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys() if not k.startswith(("expected", "source"))}  # noqa: SIM118
        config = {"quantization_config": json.loads(file.metadata()["quantization_config"])}
    save_file(tensors, tmp_path / "model.safetensors")
    with unpacked(config, open_source(tmp_path))[1] as source:
        (weight,) = source.shapes
        coded = source.coded(weight)
        assert coded is not None
        (out_features, in_features), quantized = source.shapes[weight], from_codes(coded, grid)
    one = file_map(weight, scheme, out_features, in_features)
    scale_dtype = next(tensor.dtype for key, tensor in tensors.items() if "scale" in key)
    found, infos = layout.tensors(one, quantized, None), layout.infos(one, scale_dtype)
    assert found.keys() == infos.keys() == tensors.keys()
    for key, expected in tensors.items():
        made = found[key].to(infos[key].dtype).reshape(infos[key].shape).contiguous()
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape), key
        assert torch.equal(made.view(torch.uint8), expected.contiguous().view(torch.uint8)), key


def file_map(name: str, scheme: MapScheme, out_features: int, in_features: int) -> FileMap:
    assert scheme.weights is not None
    return FileMap(
        stem=name.removesuffix(".weight"),
        tensor=name,
        place=Place(name, name, whole),
        grid=scheme.weights,
        scheme=scheme,
        out_features=out_features,
        in_features=in_features,
        stored="rows",
    )


def config_of(layout: str, scheme: Scheme, path: Path, family: str = "llama") -> dict[str, Any]:
    write_quantized(tiny_decoder(family), layout, scheme, path)
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def scheme_of(default: MapScheme, cache: CacheScheme | None = None, **overrides: MapScheme) -> Scheme:
    return Scheme(name="test", default=default, overrides={f"*.{k}": v for k, v in overrides.items()}, cache=cache)


def test_groups_of_several_kinds(tmp_path: Path) -> None:
    """The usual one is that of the class; others name their maps, and what stays in floats is ignored."""
    scheme = scheme_of(MapScheme(weights=SYM4), down_proj=MapScheme(weights=INT8, activations=INT), v_proj=FLOAT)
    said = config_of("compressed-tensors", scheme, tmp_path / "out")
    first, second = said["config_groups"]["group_0"], said["config_groups"]["group_1"]
    assert said["format"] == "mixed-precision" and said["kv_cache_scheme"] is None
    assert (first["format"], first["targets"]) == ("pack-quantized", ["Linear"])
    assert first["input_activations"] is None and first["weights"]["group_size"] == 16
    downs = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert (second["format"], second["targets"]) == ("int-quantized", downs)
    assert second["weights"]["strategy"] == "channel" and second["input_activations"]["strategy"] == "token"
    assert set(said["ignore"]) == {"lm_head", *(f"model.layers.{index}.self_attn.v_proj" for index in range(2))}
    assert dict(read_scheme(tmp_path / "out").activations) == dict.fromkeys(downs, INT)


def test_gptq_says_what_differs(tmp_path: Path) -> None:
    """GPTQModel: ``-:`` is what stays in floats, ``+:`` what has other numbers; patterns match from the start."""
    said = config_of(
        "gptq", scheme_of(MapScheme(weights=SYM4), down_proj=MapScheme(weights=INT8), v_proj=FLOAT), tmp_path / "out"
    )
    assert (said["bits"], said["group_size"], said["sym"], said["desc_act"]) == (4, 16, True, False)
    assert said["checkpoint_format"] == "gptq" and said["lm_head"] is False
    assert said["dynamic"] == {
        **{rf"-:^model\.layers\.{index}\.self_attn\.v_proj$": {} for index in range(2)},
        **{
            rf"+:^model\.layers\.{index}\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True}
            for index in range(2)
        },
    }
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == said


def test_tied_heads_are_ignored(tmp_path: Path) -> None:
    """Readers see a linear module where the files have no tensor."""
    for layout, key in (("compressed-tensors", "ignore"), ("awq", "modules_to_not_convert")):
        said = config_of(layout, scheme_of(MapScheme(weights=ASYM4)), tmp_path / layout, "qwen2")
        assert said[key] == ["lm_head"]


def test_native_fp8(tmp_path: Path) -> None:
    scheme = scheme_of(MapScheme(weights=BLOCKS, activations=replace(E4M3, group=16)))
    said = config_of("fp8", scheme, tmp_path / "out")
    assert said["weight_block_size"] == [16, 16] and said["activation_scheme"] == "dynamic"
    assert said["ignored_layers"] == said["modules_to_not_convert"] == ["lm_head"]


def test_zeros_of_0(tmp_path: Path) -> None:
    """Version 1 stores them less 1, taken from whole words; of 3 bits readers disagree on that."""
    weight = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) + 0.1  # all above 0: every zero is 0
    for bits in (2, 4, 8, 3):
        scheme = MapScheme(weights=Grid(bits=bits, group=16))
        assert scheme.weights is not None
        one, quantized = file_map("a.weight", scheme, 32, 32), quantize(weight, scheme.weights)
        assert quantized.steps.zero_OG is not None and bool((quantized.steps.zero_OG == 0).all())
        if bits == 3:
            with pytest.raises(ModelError, match="a zero of 0 in 3 bits"):
                Gptq(plain_zeros=False).tensors(one, quantized, None)
            continue
        words = Gptq(plain_zeros=False).tensors(one, quantized, None)["a.qzeros"]
        ones = sum(1 << place for place in range(0, 32, bits))
        assert words.dtype == torch.int32 and bool(((words.long() & 0xFFFFFFFF) == (1 << 32) - ones).all())


REFUSED: list[tuple[str, Scheme, str, str]] = [
    ("compressed-tensors", scheme_of(MapScheme(weights=Grid(bits=3, group=16))), "3 bits", "gptq"),
    ("compressed-tensors", scheme_of(MapScheme(weights=Grid(bits=4, group=20))), "groups of 20 do not", "divides"),
    ("compressed-tensors", scheme_of(MapScheme(weights=replace(INT8, rows=None))), "rows share scales", "own scales"),
    ("compressed-tensors", scheme_of(MapScheme(weights=replace(BLOCKS, rows=1))), "E4M3 scales that", "one of these"),
    ("gptq", scheme_of(MapScheme(weights=SYM4, activations=INT)), "how inputs are rounded", "compressed-tensors"),
    ("gptq", scheme_of(MapScheme(weights=BLOCKS)), "numbers in E4M3", "compressed-tensors"),
    ("gptq", scheme_of(MapScheme(weights=SYM4), CacheScheme()), "scales of keys and values", "compressed-tensors"),
    ("gptq_v2", scheme_of(MapScheme(weights=Grid(bits=3, group=16))), "in words of", "compressed-tensors"),
    ("awq", scheme_of(MapScheme(weights=INT8)), "8 bits", "gptq or compressed-tensors"),
    ("awq", scheme_of(MapScheme(weights=SYM4), down_proj=MapScheme(weights=ASYM4)), "maps of several kinds", "gptq"),
    ("fp8", scheme_of(MapScheme(weights=INT8)), "other numbers than E4M3 in blocks", "compressed-tensors"),
    ("fp8", scheme_of(MapScheme(weights=BLOCKS)), "inputs that are not rounded in runs", "compressed-tensors"),
    ("paddle", scheme_of(MapScheme(weights=SYM4)), "other numbers than 8 bits", "compressed-tensors"),
    ("paddle", scheme_of(MapScheme(weights=INT8, activations=INT)), "inputs without static", "compressed-tensors"),
    ("awq", scheme_of(FLOAT), "no map is quantized", "grid"),
]


@pytest.mark.parametrize(("layout", "scheme", "what", "fix"), REFUSED, ids=[f"{r[0]}: {r[2]}" for r in REFUSED])
def test_what_has_no_place(layout: str, scheme: Scheme, what: str, fix: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        layout_of(layout, contents_of(CONFIGS["llama"], scheme, torch.float32))
    assert caught.value.fix is not None and fix in caught.value.fix


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="unknown layout 'exl3'"):
        layout_of("exl3", contents_of(CONFIGS["llama"], scheme_of(FLOAT), torch.float32))


def test_blocks_that_cross_parts() -> None:
    """Rows of a fused weight, rounded together in blocks, whose parts begin within a block."""
    quantized = quantize(torch.randn(24, 32, generator=torch.Generator().manual_seed(0)), BLOCKS)
    assert block_scales(quantized, "a").shape == (2, 2)
    with pytest.raises(ModelError, match="rows that share a scale in the file"):
        block_scales(quantized.rows(slice(8, 24)), "a")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """A zero between numbers, a scale beyond fp16, a tensor that never comes."""
    contents = contents_of(CONFIGS["llama"], scheme_of(MapScheme(weights=ASYM4)), torch.float32)
    stem = next(iter(contents.maps))
    good = quantize(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)), ASYM4)
    assert good.steps.zero_OG is not None
    broken: list[tuple[Tensor, Tensor, type[Exception], str]] = [
        (good.steps.scale_OG, good.steps.zero_OG + 0.5, ModelError, "a zero is not one of the numbers 0 to 15"),
        (good.steps.scale_OG * 1e8, good.steps.zero_OG, CheckpointError, "not a finite float16"),
        (good.steps.scale_OG, good.steps.zero_OG, CheckpointError, "never written"),
    ]
    for scale, zero, error, what in broken:
        with pytest.raises(error, match=what), open_layout(Awq(), contents, tmp_path / "out") as writer:
            writer.map(stem, [replace(good, steps=Steps(scale_OG=scale, zero_OG=zero))])
        assert not list(tmp_path.iterdir())
