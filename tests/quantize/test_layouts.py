"""Every family through every layout that can hold it: what our readers find in the files is what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.quantized.stored import read_scheme
from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.tensors import FLOATS
from oarsmith.errors import OarsmithError
from oarsmith.kernels.coded import decode
from oarsmith.models.linear import Linear
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.layouts.base import open_layout
from oarsmith.quantize.layouts.choose import layout_of
from oarsmith.quantize.layouts.contents import FileMap, contents_of
from oarsmith.quantize.scheme import MapScheme, Scheme
from quantized_models import INPUT_SCALE, load, round_to, scheme_that_fits, write_quantized


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny weights."""


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    return {row: Bench(row, ROWS[row], tmp_path_factory.mktemp("bench")) for row in ROWS}


@dataclass(frozen=True)
class Case:
    layout: str
    scheme: MapScheme
    fits: Callable[[FileMap], bool]
    cache: CacheScheme | None = None


def groups_of_4(one: FileMap) -> bool:
    return one.in_features % 4 == 0


def words(one: FileMap) -> bool:
    return one.in_features % 8 == 0 and one.out_features % 8 == 0


def words_of_3_bits(one: FileMap) -> bool:
    return one.in_features % 32 == 0 and one.out_features % 32 == 0


def always(one: FileMap) -> bool:
    return True


E4M3 = Grid(code="e4m3", bits=8, group=None)
INT8 = Grid(bits=8, group=None, symmetric=True)
BLOCKS = Grid(code="e4m3", bits=8, rows=16, group=8)
DYNAMIC = Activations()
CASES = {
    "ct-w4-sym": Case("compressed-tensors", MapScheme(weights=Grid(bits=4, group=4, symmetric=True)), groups_of_4),
    "ct-w4-asym": Case("compressed-tensors", MapScheme(weights=Grid(bits=4, group=4)), groups_of_4),
    "ct-w8": Case("compressed-tensors", MapScheme(weights=INT8), always),
    "ct-w2-asym": Case("compressed-tensors", MapScheme(weights=Grid(bits=2, group=4)), groups_of_4),
    "ct-w8a8": Case("compressed-tensors", MapScheme(weights=INT8, activations=DYNAMIC), always),
    "ct-w8a8-asym-static": Case(
        "compressed-tensors",
        MapScheme(weights=Grid(bits=8, group=None), activations=Activations(static=True)),
        always,
        CacheScheme(per_head=True),
    ),
    "ct-fp8": Case("compressed-tensors", MapScheme(weights=E4M3, activations=Activations(code="e4m3")), always),
    "ct-fp8-static": Case(
        "compressed-tensors",
        MapScheme(
            weights=Grid(code="e4m3", bits=8, group=None, rows=None), activations=Activations(code="e4m3", static=True)
        ),
        always,
        CacheScheme(code="e4m3", per_head=False),
    ),
    "ct-fp8-block": Case(
        "compressed-tensors", MapScheme(weights=BLOCKS, activations=Activations(code="e4m3", group=8)), always
    ),
    "gptq-sym": Case("gptq", MapScheme(weights=Grid(bits=4, group=4, symmetric=True)), words),
    "gptq-asym": Case("gptq", MapScheme(weights=Grid(bits=4, group=4)), words),
    "gptq-8": Case("gptq", MapScheme(weights=INT8), words),
    "gptq_v2-3": Case("gptq_v2", MapScheme(weights=Grid(bits=3, group=8)), words_of_3_bits),
    "gptq_v2-2": Case("gptq_v2", MapScheme(weights=Grid(bits=2, group=4, symmetric=True)), words_of_3_bits),
    "awq": Case("awq", MapScheme(weights=Grid(bits=4, group=4)), words),
    "fp8": Case("fp8", MapScheme(weights=BLOCKS, activations=Activations(code="e4m3", group=8)), always),
    "paddle": Case("paddle", MapScheme(weights=INT8), always),
    "paddle-static": Case(
        "paddle", MapScheme(weights=INT8, activations=Activations(static=True)), always, CacheScheme(per_head=True)
    ),
    "paddle-fp8": Case(
        "paddle",
        MapScheme(
            weights=Grid(code="e4m3", bits=8, group=None, rows=None), activations=Activations(code="e4m3", static=True)
        ),
        always,
    ),
}
TRANSPOSED, STACKED = {"gpt2"}, {"gpt_oss"}
# Plain, stacked and transposed maps, a head of unit rows and maps in one tensor go through everything.
ALL_CASES = ("llama", "qwen3_moe", "gpt2", "baichuan2 13B")
FOR_ALL = ("ct-w4-asym", "ct-w8a8-asym-static", "ct-fp8-block", "gptq-asym", "awq", "paddle-static")
PAIRS = [(row, name) for row in ROWS for name in (CASES if row in ALL_CASES else FOR_ALL)]


@pytest.mark.parametrize(("row", "name"), PAIRS)
def test_there_and_back(row: str, name: str, benches: dict[str, Bench], tmp_path: Path) -> None:
    case, bench = CASES[name], benches[row]
    model = load(bench.path)
    scheme = scheme_that_fits(
        model, case.scheme, case.fits, Scheme(name=name, default=case.scheme, overrides={}, cache=case.cache)
    )
    try:
        written = write_quantized(model, case.layout, scheme, tmp_path / "out")
    except OarsmithError as error:
        check_refused(case, bench, error)
        assert not list(tmp_path.iterdir())
        return
    assert written.expected
    load(tmp_path / "out")
    check_cache(case, tmp_path / "out", written.contents.attentions, written.contents.num_scales)
    if read_config(tmp_path / "out")["model_type"] != bench.row.config["model_type"]:
        assert case.layout == "paddle"  # where some families are Llama's, with maps that Baichuan has in one tensor
        return
    plain, source = open_model(tmp_path / "out")
    assert "quantization_config" not in plain
    with source, open_model(bench.path)[1] as before:
        assert source.shapes == before.shapes
        for file, dense in written.expected.items():
            coded = source.coded(file)
            if coded is not None:
                assert torch.equal(decode(coded, torch.float32), dense), file
            assert torch.equal(source.read(file), dense.to(FLOATS[source.dtypes[file]])), file
        for file in before.shapes.keys() - written.expected.keys():
            if not (model.spec.head.normalized and case.layout == "paddle" and "lm_head" in file):
                assert torch.equal(source.read(file), before.read(file)), file
    said, wanted = read_scheme(tmp_path / "out"), case.scheme.activations
    assert dict(said.activations) == ({} if wanted is None else dict.fromkeys(written.contents.maps, wanted))
    if wanted is not None and wanted.static:
        assert said.input_scales.keys() == written.contents.maps.keys()
        assert all(torch.equal(scale, INPUT_SCALE[None]) for scale in said.input_scales.values())


def check_refused(case: Case, bench: Bench, error: OarsmithError) -> None:
    """For one of a few reasons, which are those of the family."""
    kind = str(bench.row.config["model_type"])
    if "transposed" in error.what or "of all experts" in error.what:
        assert error.fix is not None and "gguf" in error.fix
        assert kind in (STACKED if case.layout == "paddle" else TRANSPOSED | STACKED)
    elif error.what == "no map is quantized":
        assert case.fits is not always and int(bench.row.config["hidden_size"]) % 32
    else:
        assert case.layout == "paddle" and "PaddleNLP" in str(error), error


def check_cache(case: Case, path: Path, attentions: tuple[str, ...], counts: tuple[int, ...]) -> None:
    said = read_scheme(path)
    if case.cache is None:
        assert said.cache is None and not said.key_scales
        return
    assert said.cache is not None and said.cache.code == case.cache.code
    assert said.cache.per_head == case.cache.per_head or set(counts) == {1}
    assert said.key_scales.keys() == said.value_scales.keys() == set(attentions)
    for layer, (attention, count) in enumerate(zip(attentions, counts, strict=True)):
        scales = (torch.arange(count) + 1) / 128
        assert torch.equal(said.key_scales[attention], scales * (layer + 1))
        assert torch.equal(said.value_scales[attention], scales / 2)


@pytest.mark.parametrize("row", ROWS)
def test_the_whole_map_at_once(row: str, benches: dict[str, Bench], tmp_path: Path) -> None:
    """Fused and stacked maps of the decoder give the same files as their parts."""
    model = load(benches[row].path)
    wanted = MapScheme(weights=INT8, activations=DYNAMIC)
    scheme = scheme_that_fits(model, wanted, lambda one: one.stored == "rows")
    write_quantized(model, "compressed-tensors", scheme, tmp_path / "parts")
    contents = contents_of(model.config, scheme, torch.float32)
    layout = layout_of("compressed-tensors", contents)
    places = {place.parameter: place.file.removesuffix(".weight") for place in contents.places}
    with open_layout(layout, contents, tmp_path / "whole") as writer:
        done = set()
        for path, module in model.named_modules():
            one = contents.maps.get(places.get(f"{path}.weight", ""))
            if isinstance(module, Linear) and one is not None:
                weights = module.weight.detach()
                experts = [weights] if weights.dim() == 2 else list(weights)
                writer.weight(path, [round_to(weight, one, torch.float32) for weight in experts])
                done.add(f"{path}.weight")
        for name, parameter in model.named_parameters():
            if name not in done:
                writer.parameter(name, parameter)
    for path in sorted((tmp_path / "parts").iterdir()):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name
