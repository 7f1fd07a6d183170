"""Weights that other tools have quantized (tests/fixtures/quantized; each file says which), as those read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from oarsmith.checkpoint.quantized.base import CodedSource
from oarsmith.checkpoint.quantized.unpacked import unpacked
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.kernels.coded import E4M3, decode, decode_reference

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
# name: (code, group, zeros), or None where the codes are no matrix by themselves
KEPT: dict[str, tuple[str, int, bool] | None] = {
    "awq_asym": ("uint4", 64, True),
    "bnb_fp4": ("fp4", 32, False),
    "bnb_int8": ("int8", 96, False),
    "bnb_nf4_double": ("nf4", 64, False),
    "bnb_nf4_flat": None,
    "fp8_block": ("e4m3", 32, False),
    "fp8_dyn": ("e4m3", 128, False),
    "fp8_tensor": ("e4m3", 96, False),
    "gptq_sym": ("int4", 64, False),
    "w4a16_asym": ("uint4", 32, True),
    "w4a16_sym": ("int4", 64, False),
    "w8a16": ("int8", 96, False),
    "w8a16_asym": ("uint8", 48, True),
    "w8a8": ("int8", 128, False),
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny weights."""


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, the tensors of the files, and the weight they stand for (of one with 64 rows, every fourth)."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "source"}  # noqa: SIM118
        config = {"quantization_config": json.loads(file.metadata()["quantization_config"])}
    (expected,) = (key for key in tensors if key.startswith("expected."))
    return config, tensors, tensors.pop(expected)


def opened(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> TensorSource:
    save_file(tensors, folder / "model.safetensors")
    plain, source = unpacked(config, open_source(folder))
    assert plain == {key: value for key, value in config.items() if key != "quantization_config"}
    return source


def test_every_fixture_is_tested() -> None:
    assert {path.stem for path in FIXTURES.glob("*.safetensors")} == set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_values(name: str, tmp_path: Path) -> None:
    config, tensors, expected = load(name)
    with opened(config, tensors, tmp_path) as source:
        (weight,) = source.shapes
        found, coded = source.read(weight), source.coded(weight)
        assert source.num_bytes(weight) == found.nbytes and source.shapes[weight] == found.shape
    step = found.shape[0] // len(expected)
    kept = None if coded is None else (coded.code.name, coded.group, coded.zero_OG is not None)
    assert weight.endswith(".weight") and kept == KEPT[name]
    # Tools that compute in 16 bits round their products; a file's own scales are what they are.
    assert torch.equal(found[::step], expected.to(found.dtype))
    if coded is not None:
        for wide in (decode(coded, torch.float32), decode_reference(coded, torch.float32)):
            # bitsandbytes multiplies an int8 number by its scale and by 1/127 in turn.
            torch.testing.assert_close(wide[::step], expected, rtol=2e-7 if name == "bnb_int8" else 0, atol=0)


@pytest.mark.parametrize("name", [name for name in KEPT if not name.startswith("bnb")])
def test_the_same_weight_has_the_same_codes(name: str, tmp_path: Path) -> None:
    """And another one the nearest steps, at most half of one away unless it lies outside of all."""
    config, tensors, _ = load(name)
    with opened(config, tensors, tmp_path) as source:
        assert isinstance(source, CodedSource)
        ((file, weight),) = source.code_names().items()
        coded = source.coded(weight)
        assert coded is not None
        dense = decode(coded, torch.float32)
        again = source.recoded(weight, dense)
        assert again.dtype == tensors[file].dtype and torch.equal(
            again.view(torch.uint8), tensors[file].view(torch.uint8)
        )
        assert torch.equal(source.recoded(weight, source.read(weight).float()).float(), again.float())
        other = dense * 0.6 + 0.1 * dense.abs().mean() * torch.randn(
            dense.shape, generator=torch.Generator().manual_seed(0)
        )
        recoded = source.recoded(weight, other).contiguous()
    with opened(config, tensors | {file: recoded}, tmp_path) as source:
        found = source.coded(weight)
    assert found is not None
    error, group_I = (decode(found, torch.float32) - other).abs(), torch.arange(dense.shape[1]) // coded.group
    scale = coded.scale_OG.float().abs()[:, group_I]  # AutoRound has scales below 0
    if coded.code is E4M3:
        assert bool((error <= other.abs() / 16 + scale * 2**-10).all())
    else:
        near = error <= scale * 0.5001
        assert near.float().mean() > 0.95 and bool((near | (decode(found, torch.float32).abs() < other.abs())).all())


def test_16_bits_as_the_file_says(tmp_path: Path) -> None:
    """fp32 scales say nothing of the model; then config.json does."""
    config, tensors, expected = load("w4a16_asym")
    for said, dtype in (("float16", torch.float16), ("float32", torch.bfloat16), (None, torch.bfloat16)):
        with opened({**config, "torch_dtype": said}, tensors, tmp_path) as source:
            assert torch.equal(source.read("a.weight"), expected.to(dtype)) and source.stored_dtype() == dtype
    _, tensors, _ = load("gptq_sym")
    with opened({"quantization_config": {"quant_method": "gptq"}, "dtype": "bfloat16"}, tensors, tmp_path) as source:
        assert source.read("k_proj.weight").dtype == torch.float16  # as its scales


def test_what_concerns_activations_is_left_out(tmp_path: Path) -> None:
    config, tensors, _ = load("w8a8")
    extra = {f"k_proj.{name}": torch.ones(1) for name in ("input_scale", "input_zero_point", "k_scale", "v_scale")}
    with opened(config, tensors | extra, tmp_path) as source:
        assert list(source.shapes) == ["k_proj.weight"]


def test_auto_round(tmp_path: Path) -> None:
    """GPTQ without g_idx, or AWQ, under a name of its own."""
    for name, packing in (("gptq_sym", "auto_round:auto_gptq"), ("awq_asym", "auto_round:auto_awq")):
        config, tensors, expected = load(name)
        own = config["quantization_config"] | {"quant_method": "auto-round", "packing_format": packing}
        tensors.pop("k_proj.g_idx", None)
        with opened({"quantization_config": own}, tensors, tmp_path) as source:
            assert torch.equal(source.read("k_proj.weight")[::4], expected.half())
        with pytest.raises(CheckpointError, match="of the format 'auto_round:new' are not read"):
            opened({"quantization_config": own | {"packing_format": "auto_round:new"}}, tensors, tmp_path)


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "gptq_sym"), ("quant_config.json", "awq_asym")])
def test_a_config_beside_the_files(file: str, name: str, tmp_path: Path) -> None:
    """What AutoGPTQ and AutoAWQ wrote before config.json said it."""
    config, tensors, expected = load(name)
    own = {key: config["quantization_config"][key] for key in ("bits", "group_size")}
    (tmp_path / file).write_text(json.dumps(own))
    with opened({}, tensors, tmp_path) as source:
        assert torch.equal(source.read("k_proj.weight")[::4], expected.half())


Lie = tuple[str, str, dict[str, tuple[int, ...] | torch.dtype | None], str]
SCALE, PACKED, WORDS = "a.weight_scale", "a.weight_packed", "k_proj.qweight"
ABSMAX, STATE = "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"
LIES: list[Lie] = [
    ("gptq_sym", "rows", {WORDS: (8, 64)}, "k_proj.qweight: 64 inputs do not fit 2|g_idx|do not fit"),
    ("gptq_sym", "zeros", {"k_proj.qzeros": (2, 7)}, "qweight: 16 rows of words do not fit 7 words of zeros"),
    ("gptq_sym", "no zeros", {"k_proj.qzeros": None}, "qzeros: the tensor is missing"),
    ("gptq_sym", "scales", {"k_proj.scales": (2, 63)}, "do not fit"),
    ("gptq_sym", "groups", {"k_proj.scales": (3, 64), "k_proj.qzeros": (3, 8)}, "128 inputs do not fit 3 groups"),
    ("gptq_sym", "g_idx", {"k_proj.g_idx": (127,)}, "do not fit"),
    ("gptq_sym", "kind", {WORDS: torch.int64}, r"I64 of shape \(16, 64\) is not I32 with 2 axes"),
    ("awq_asym", "zeros", {"k_proj.qzeros": (2, 7)}, "does not fit zeros"),
    ("awq_asym", "scales", {"k_proj.scales": (64, 2)}, "does not fit zeros"),
    ("w4a16_asym", "words", {PACKED: (16, 11)}, "11 words are not 96 numbers of 2, 4 or 8 bits"),
    ("w4a16_asym", "shape", {"a.weight_shape": None}, "weight_shape: the tensor is missing"),
    ("w4a16_asym", "axes", {"a.weight_shape": (3,)}, "is not the shape of 16 packed rows"),
    ("w4a16_asym", "scales", {SCALE: (16, 5)}, "do not fit a weight of shape"),
    ("w4a16_asym", "zeros", {"a.weight_zero_point": (3, 3)}, "zeros of shape"),
    ("w4a16_asym", "kind", {PACKED: torch.uint8}, "U8 of shape"),
    ("w8a8", "scales", {"k_proj.weight_scale": (63, 1)}, "do not fit a weight of shape"),
    ("fp8_block", "blocks", {SCALE: (2, 2)}, "do not fit a weight of shape"),
    ("fp8_block", "no weight", {"a.weight": None}, "a.weight: the tensor is missing"),
    ("bnb_nf4_double", "bytes", {"a.weight": (1000, 1)}, "the bytes do not fit a weight of shape"),
    ("bnb_nf4_double", "absmax", {ABSMAX: (31,)}, "there are 32 blocks"),
    ("bnb_nf4_double", "nested", {"a.weight.nested_absmax": (2,)}, "32 scales do not fit"),
    ("bnb_nf4_double", "nested map", {"a.weight.nested_quant_map": (255,)}, "not 256 values"),
    ("bnb_nf4_double", "map", {"a.weight.quant_map": (15,)}, "not 16 values"),
    ("bnb_nf4_double", "state", {STATE: (9,)}, "not JSON"),
    ("bnb_int8", "scales", {"a.SCB": (15,)}, "no scale for each of 16 rows"),
]


@pytest.mark.parametrize(("name", "_", "lies", "message"), LIES, ids=[f"{lie[0]}-{lie[1]}" for lie in LIES])
def test_parts_that_do_not_fit(
    name: str, _: str, lies: dict[str, tuple[int, ...] | torch.dtype | None], message: str, tmp_path: Path
) -> None:
    """Found before a tensor is read."""
    config, tensors, _expected = load(name)
    for key, lie in lies.items():
        if lie is None:
            del tensors[key]
        elif isinstance(lie, torch.dtype):
            tensors[key] = tensors[key].to(lie)
        else:
            tensors[key] = torch.zeros(lie, dtype=tensors[key].dtype)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(config, tensors, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("gptq_sym", "k_proj.scales"),
        ("awq_asym", "k_proj.scales"),
        ("w4a16_sym", "k_proj.weight_scale"),
        ("w8a8", "k_proj.weight_scale"),
        ("fp8_tensor", SCALE),
        ("bnb_fp4", ABSMAX),
        ("bnb_int8", "a.SCB"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(name: str, scale: str, value: float, tmp_path: Path) -> None:
    config, tensors, _ = load(name)
    tensors[scale].view(-1)[-1] = value
    with opened(config, tensors, tmp_path) as source:
        for look in (source.read, source.coded):
            with pytest.raises(CheckpointError, match=f"{scale}: a scale is NaN or infinite"):
                look(next(iter(source.shapes)))


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """NaN in FP8, products beyond 16 bits, groups that do not exist."""
    config, tensors, _ = load("fp8_tensor")
    tensors["a.weight"].view(torch.uint8)[3, 4] = 255
    with opened(config, tensors, tmp_path) as source, pytest.raises(CheckpointError, match="a weight is NaN"):
        source.coded("a.weight")
    config, tensors, _ = load("gptq_sym")
    tensors["k_proj.scales"][0, 0] = 60_000
    with opened(config, tensors, tmp_path) as source, pytest.raises(CheckpointError, match="NaN or infinite"):
        source.read("k_proj.weight")
    for wrong in (2, -1):
        config, tensors, _ = load("gptq_sym")
        tensors["k_proj.g_idx"][5] = wrong
        with opened(config, tensors, tmp_path) as source, pytest.raises(CheckpointError, match="is not one of 0 to 1"):
            source.read("k_proj.weight")


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    config, tensors, _ = load("w4a16_sym")
    opened(config, tensors, tmp_path).close()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        open_source(tmp_path)


def test_twice(tmp_path: Path) -> None:
    config, tensors, _ = load("w4a16_sym")
    with pytest.raises(CheckpointError, match="there twice"):
        opened(config, tensors | {"k_proj.weight": torch.zeros(64, 128)}, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq_sym", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ("gptq_sym", {"is_marlin_format": True}, "checkpoint_format 'marlin' is not read"),
        ("awq_asym", {"version": "gemv"}, "AWQ with 4 bits, version 'gemv' is not read"),
        ("awq_asym", {"bits": 3}, "AWQ with 3 bits"),
        ("w4a16_sym", {"transform_config": {"config_groups": {"R1": {}}}}, "the weights are rotated"),
        ("w4a16_sym", {"quant_method": "exl3"}, "of the format 'exl3' are not read"),
    ],
)
def test_what_is_not_read(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, tensors, _ = load(name)
    with pytest.raises(CheckpointError, match=message):
        opened({"quantization_config": config["quantization_config"] | changes}, tensors, tmp_path)
