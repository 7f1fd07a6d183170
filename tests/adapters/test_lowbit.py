"""Adapters over weights of 4 and 8 bits: beside the same adapters over the floats that the codes stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oarsmith.adapters.change import Change
from oarsmith.adapters.forms import AS_STORED, DENSE, INT8_ROWS, Blocks, Groups, Rows, WeightForm, product
from oarsmith.adapters.forms.chosen import chosen_form
from oarsmith.adapters.linear import Adapt, AdaptedLinear, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite, kept_as
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.adapter_lowbit import LowBitKeys
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError
from oarsmith.kernels.coded import FP4, NF4
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec_parts import LinearSpec, Segment

from .conftest import Base, randomise, tokens

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
FORMS: dict[str, WeightForm] = {
    "nf4": Blocks(block=16),
    "nf4-double": Blocks(block=16, nested=8),
    "fp4": Blocks(code=FP4, block=64, nested=256),
    "int4": Groups(group=16),
    "int8": Rows(),
}
SPEC = LinearSpec(
    in_features=40,  # no multiple of a block
    segments=(Segment(name="q", size=24), Segment(name="k", size=13), Segment(name="v", size=20)),
    bias=True,
)
LORA = Adapt(changes=(("v", Lora(rank=2, alpha=1.0)), ("q", Lora(rank=3, alpha=-6.0))))
# A dropout too small to strike takes the path of dropout.
DROPOUT = Adapt(changes=tuple((name, replace(change, dropout=1e-9)) for name, change in LORA.changes))
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def pair(form: WeightForm, adapt: Adapt, spec: LinearSpec = SPEC, dtype: torch.dtype = torch.float32) -> list[Any]:
    """A map in a form, and one in floats that has the same values."""
    small, plain = replace(adapt, form=form).build(spec), adapt.build(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        assert small.bias is not None
        small.weight.data, small.bias.data = small.weight.to(dtype), small.bias.to(dtype)
    before = small.weight.detach().float()
    small.weight_filled()
    state = small.state_dict() | {"weight": dense(small)}
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name in plain.state_dict()})
    plain.weight.data, plain.bias.data = plain.weight.to(dtype), small.bias.data.clone()  # type: ignore[union-attr]
    plain.weight_filled()
    error = (dense(small) - before).norm() / before.norm()
    assert error < (0.01 if isinstance(form, Rows) else 0.15)
    for module in (small, plain):
        module.weight.requires_grad_(False)
        module.bias.requires_grad_(False)  # type: ignore[union-attr]
    return [small, plain]


def dense(module: AdaptedLinear) -> Tensor:
    """The floats that a weight stands for."""
    found = [module.form.dense(parts, module.spec.in_features) for parts in module.parts()]
    return found[0] if module.spec.experts is None else torch.stack(found)


def results(module: AdaptedLinear, x: Tensor, *arguments: Any) -> list[Tensor]:
    out = module.train()(x, *arguments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@each_form
@pytest.mark.parametrize("adapt", [Adapt(), LORA, DROPOUT], ids=["plain", "lora", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(form: WeightForm, adapt: Adapt, dtype: torch.dtype) -> None:
    small, plain = pair(form, adapt, dtype=dtype)
    limit = 1e-5 if dtype == torch.float32 else 2**-6
    for shape in ((1, 40), (2, 3, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        found, expected = results(small, x), results(plain, x)
        assert len(found) == (6 if adapt.changes else 2)
        for have, want in zip(found, expected, strict=True):
            assert have.dtype == want.dtype and have.shape == want.shape
            assert (have - want).norm() <= limit * want.norm()


@each_form
@pytest.mark.parametrize("adapt", [Adapt(), LORA, DROPOUT], ids=["plain", "lora", "dropout"])
def test_experts(form: WeightForm, adapt: Adapt) -> None:
    small, plain = pair(form, adapt, replace(SPEC, experts=3))
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for have, want in zip(results(small, x, [4, 0, 5]), results(plain, x, [4, 0, 5]), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


@each_form
def test_rows_and_merging(form: WeightForm) -> None:
    """Some rows are kept as they are among all of them, and what is merged is the weight as it is kept."""
    small, plain = pair(form, LORA)
    (parts,), whole = small.parts(), dense(small)
    own = form.rows(parts, 24, 37, 40)
    assert len(own) == len(form.names) and torch.equal(form.dense(own, 40), whole[24:37])
    assert torch.equal(form.dense(form.rows(own, 2, 5, 40), 40), whole[26:29])
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(product(x, own, None, form), product(x, parts, None, form)[:, 24:37])
    torch.testing.assert_close(small.merged(), plain.merged(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "form"), [("bnb_nf4_double", Blocks(nested=256)), ("bnb_fp4", Blocks(code=FP4, block=32))]
)
def test_the_layout_of_bitsandbytes(name: str, form: Blocks) -> None:
    """Its codes of the same weight are ours, and its tensors are this form's: they stand for what it reads in them."""
    file = load_file(FIXTURES / f"{name}.safetensors")
    weight = file["source"].float()
    kept = dict(zip(form.names, form.keep(file["source"]), strict=True))
    codes = file["a.weight"].view(len(weight), -1)
    absmax = file["a.weight.absmax"].view(len(weight), -1)
    assert torch.equal(kept["weight"], codes)
    theirs = [codes, absmax]
    if form.nested is None:
        assert torch.equal(kept["absmax"], absmax)
    else:
        # It looks the nearest of 256 values up in a coarse table: next to a border it may take the other side.
        assert (kept["absmax"].int() - absmax.int()).abs().max() <= 1
        state = bytes(file["a.weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
        offset = torch.tensor(float(state.split('"nested_offset": ')[1].split("}")[0].split(",")[0]))
        assert torch.equal(kept["nested_absmax"], file["a.weight.nested_absmax"])
        torch.testing.assert_close(kept["nested_offset"], offset)
        theirs += [file["a.weight.nested_absmax"], offset]
    assert torch.equal(form.dense(tuple(theirs), weight.shape[1]), file["expected.a.weight"])


def in_layers(model: Decoder) -> Iterator[AdaptedLinear]:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            yield module


def lora_on(*endings: str) -> Callable[..., dict[str, Change]]:
    return lambda places: {name: Lora(rank=3, alpha=2.1) for name in places if name.endswith(endings)}


def adapted(path: Path, form: WeightForm, dtype: torch.dtype = torch.float32) -> Decoder:
    """Adapters on q, v, down and GPT-2's c_attn, so other maps have none; the same adapter every time."""
    rewrite = adapt_rewrite(lora_on("q_proj", "v_proj", "down_proj", "c_attn", "w2"))
    model = load_decoder(path, dtype=dtype, rewrite=kept_as(form, rewrite))
    attach(model, seed=1)
    randomise((p for p in model.parameters() if p.requires_grad), seed=2, std=0.05)
    return model


def in_floats(model: Decoder, path: Path) -> Decoder:
    """The same model with the floats that its weights stand for."""
    plain = adapted(path, DENSE, model.embedding.weight.dtype)
    for one, other in zip(in_layers(plain), in_layers(model), strict=True):
        with torch.no_grad():
            one.weight.copy_(dense(other))
    return plain


def loss_and_gradients(model: Decoder) -> tuple[Tensor, list[Tensor]]:
    ids = tokens(3, 11)
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    leaves = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@each_form
def test_a_model(base: Callable[[str], Base], family: str, form: WeightForm) -> None:
    """GPT-2's weights are transposed in the file."""
    path = base(family).path
    model = adapted(path, form)
    assert all(m.form is form for m in in_layers(model))
    expected_loss, expected = loss_and_gradients(in_floats(model, path))
    loss, found = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def num_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not t.is_meta)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Bytes of the model, and of the weight in floats, whenever one has been read."""
    seen: list[tuple[int, int]] = []
    models: list[Decoder] = []
    init, filled = Decoder.__init__, AdaptedLinear.weight_filled

    def remember(self: Decoder, *arguments: Any) -> None:
        init(self, *arguments)
        models.append(self)

    def look(self: AdaptedLinear) -> None:
        seen.append((num_bytes(models[-1]), self.weight.nbytes))
        filled(self)

    monkeypatch.setattr(Decoder, "__init__", remember)
    monkeypatch.setattr(AdaptedLinear, "weight_filled", look)
    yield seen


# Bits of a weight of a map with rows of 1,024 numbers, in blocks of 64.
BITS = {
    "nf4": (Blocks(), 4 + 32 / 64),
    "nf4-double": (Blocks(nested=256), 4 + 8 / 64 + 32 / (64 * 256)),
    "fp4-double": (Blocks(code=FP4, block=128, nested=256), 4 + 8 / 128 + 32 / (128 * 256)),
    "int4": (Groups(), 4 + 16 / 64 + 8 / 64),
    "int8": (Rows(), 8 + 32 / 1024),
    "a8w8": (INT8_ROWS, 8 + 32 / 1024),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose maps all have rows of 1,024 numbers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    path = tmp_path_factory.mktemp("wide")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize(("form", "bits"), BITS.values(), ids=BITS.keys())
def test_memory_is_what_the_arithmetic_says(
    wide: Path, form: WeightForm, bits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of parameters and buffers after loading; while loading, those and one weight in floats."""
    with watched(monkeypatch) as seen:
        model = load_decoder(wide, rewrite=kept_as(form, lambda family, spec: spec))
    maps = list(in_layers(model))
    numbers = sum(m.spec.in_features * m.spec.out_features for m in maps)
    assert numbers == 2 * 7 * 1024 * 1024 and len(seen) == len(maps)
    held = sum(map(num_bytes, maps))
    offsets = 4 * len(maps) if "nested_offset" in form.names else 0  # one for each map
    assert held == numbers * bits / 8 + offsets
    rest = num_bytes(model) - held
    assert rest == 2 * (2 * 16 * 1024 + 5 * 1024)  # embedding, head and norms in bf16
    for total, weight in seen:
        assert total <= held + rest + weight
    if form.names[-1] == "nested_offset" and isinstance(form, Blocks) and form.block == 64:
        assert math.isclose(bits, 4.127, abs_tol=1e-3) and held < 0.259 * 2 * numbers


def test_keys() -> None:
    def form(*words: str) -> WeightForm:
        resolved = load_config(SftConfig, None, ["m", "d", "--lora", *words])
        return chosen_form(resolved.config)

    assert form() is DENSE and chosen_form(LowBitKeys()) is DENSE
    assert form("--weight_quantize_algo", "a8w8linear") is INT8_ROWS
    assert form("--weight_quantize_algo", "as_stored") is AS_STORED
    assert form("--load_in_4bit") == Blocks(code=NF4, block=64, nested=None)
    assert form("--load_in_8bit") == Rows() == form("--quantization_bit", "8")
    assert form("--quantization_bit", "4", "--double_quantization") == Blocks(nested=256)
    assert form("--bnb_4bit_quant_type", "fp4", "--bnb_4bit_use_double_quant") == Blocks(code=FP4, nested=256)
    words = ["--weight_blocksize", "128", "--weight_double_quant", "--weight_double_quant_block_size", "64"]
    assert form("--weight_quantize_algo", "fp4", *words) == Blocks(code=FP4, block=128, nested=64)
    assert form("--weight_quantize_algo", "weight_only_int4", "--weight_blocksize", "32") == Groups(group=32)
    with pytest.raises(ConfigError, match="contradict"):
        form("--load_in_4bit", "--load_in_8bit")
    for bad in (["--weight_blocksize", "63"], ["--weight_blocksize", "0"], ["--weight_quantize_algo", "nf3"]):
        with pytest.raises(ConfigError):
            form("--load_in_4bit", *bad)
