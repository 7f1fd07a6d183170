"""Models under made-up changes that have every hook: starts, merges, files, and requests that choose them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oarsmith
from oarsmith.adapters import methods
from oarsmith.adapters.bank import AdapterBank
from oarsmith.adapters.change import Change
from oarsmith.adapters.forms import INT8_ROWS, WeightForm
from oarsmith.adapters.linear import adapted_modules, attach, disabled
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.methods import Method
from oarsmith.adapters.peft_layout import adapter_tensors, write_adapter
from oarsmith.adapters.targets import adapt_rewrite, kept_as, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import ExpertLinear, Linear
from random_adapter import randomise

from .conftest import tokens
from .made_changes import AFTER, LORA, MADE, Alone, Made
from .relatives import SOME

MakeBase = Callable[[str], Path]


def adapted(
    base: Path, targets: str | tuple[str, ...], change: Change = MADE, *, seed: int = 1, form: WeightForm | None = None
) -> Decoder:
    """A fresh adapter, or with a seed one that changes what the model says."""
    rewrite = adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, targets), change))
    model = load_decoder(base, rewrite=rewrite if form is None else kept_as(form, rewrite)).eval()
    attach(model, seed)
    if seed:
        randomise(model, 0.15, seed, ("up", "lora_B", "delta"))
        with torch.no_grad():
            for key, tensor in adapter_tensors(model).items():
                if key.endswith(("length", "share", "turn")):
                    tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    return model(tokens(2, 9))


@pytest.mark.parametrize("name", SOME)
def test_a_model_s_start_merge_and_base(base_of: MakeBase, name: str) -> None:
    base, targets = base_of(name), SOME[name]
    plain = logits(load_decoder(base))
    fresh = adapted(base, targets, seed=0)
    torch.testing.assert_close(logits(fresh), plain, rtol=0, atol=1e-4)
    trains = {n.rsplit(".", 1)[-1] for n, p in fresh.named_parameters() if p.requires_grad}
    assert trains == set(MADE.keys) - MADE.frozen, "not the base, and not what a method keeps"
    model = adapted(base, targets)
    found = logits(model)
    assert (found - plain).abs().max() > 0.05
    with disabled(model):
        assert torch.equal(logits(model), plain)
        with disabled(model):
            pass
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), found)
    merged = merge_adapter(model)
    assert merged is model and not list(adapted_modules(merged))
    assert {type(m) for m in merged.modules() if isinstance(m, Linear)} <= {Linear, ExpertLinear}
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=1e-4)


def test_the_start_over_8_bits(base_of: MakeBase) -> None:
    """Lengths are those of the weight as it is kept."""
    base, rewrite = base_of("llama"), kept_as(INT8_ROWS, lambda family, spec: spec)
    fresh = adapted(base, SOME["llama"], AFTER, seed=0, form=INT8_ROWS)
    torch.testing.assert_close(logits(fresh), logits(load_decoder(base, rewrite=rewrite)), rtol=0, atol=1e-4)


def test_what_cannot_be_merged(base_of: MakeBase) -> None:
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_adapter(adapted(base_of("llama"), "q_proj", Alone(factor=1.0)))


@pytest.fixture
def made_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up methods are known."""

    def entry(kind: type[Made]) -> Method:
        return Method(
            name=kind.peft_type.lower(),
            make=lambda keys: kind(factor=1.0),
            peft_type=kind.peft_type,
            change=kind,
            read=lambda config, module, shapes: kind(factor=config.number("factor", 1.0)),
        )

    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, entry(Made), entry(Alone)))


def save(model: Decoder, folder: Path) -> Path:
    folder.mkdir()
    write_adapter(model, folder, base="base")
    return folder


@pytest.mark.usefixtures("made_method")
@pytest.mark.parametrize("name", SOME)
def test_files(base_of: MakeBase, name: str, tmp_path: Path) -> None:
    base, model = base_of(name), adapted(base_of(name), SOME[name])
    folder = save(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["factor"]) == ("MADE", 0.5)
    stored = load_file(folder / "adapter_model.safetensors")
    assert {key.split("made_")[1] for key in stored} == {"turn", "up.weight", "down.weight", "length", "share"}
    assert all(tensor.shape[0] == 1 for key, tensor in stored.items() if key.endswith("turn"))
    again = oarsmith.load_model(base, adapter=folder, device="cpu")
    assert torch.equal(logits(again), logits(model))
    lost = sorted(stored)[0]
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        oarsmith.load_model(base, adapter=folder, device="cpu")
    save_file({**stored, lost: torch.zeros(7)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {lost} has shape \(7,\)"):
        oarsmith.load_model(base, adapter=folder, device="cpu")


PROMPTS = [[5, 17, 8, 3], [9], list(range(20, 31))]
GREEDY = Sampling(max_new_tokens=8, logprobs=1)


def same(found: list[Completion], expected: list[Completion]) -> None:
    for answer, other in zip(found, expected, strict=True):
        assert answer.ids == other.ids
        assert [x.logprob for x in answer.logprobs] == pytest.approx([x.logprob for x in other.logprobs], abs=1e-4)


@pytest.mark.usefixtures("made_method")
@pytest.mark.parametrize("name", SOME)
def test_requests_choose_it_beside_lora(base_of: MakeBase, name: str, tmp_path: Path) -> None:
    """In the same steps: two of a made-up method, LoRA, and none; each answers as alone."""
    base = base_of(name)
    paths = {
        "made": save(adapted(base, SOME[name]), tmp_path / "made"),
        "all": save(adapted(base, "all-linear", replace(MADE, factor=2.0), seed=2), tmp_path / "all"),
        "lora": save(adapted(base, SOME[name], LORA, seed=3), tmp_path / "lora"),
    }
    alone = {key: Engine(oarsmith.load_model(base, adapter=path, device="cpu")) for key, path in paths.items()}
    expected: dict[str | None, list[Completion]] = {
        key: engine.generate(PROMPTS, GREEDY) for key, engine in alone.items()
    }
    model = oarsmith.load_model(base, device="cpu")
    expected[None] = Engine(model).generate(PROMPTS, GREEDY)
    assert len({tuple(answer.logprobs[0].logprob for answer in answers) for answers in expected.values()}) == 4
    engine, wanted, found = Engine(model, adapters=paths), {}, {}
    for index, prompt in enumerate(PROMPTS):
        for key in expected:
            wanted[engine.add(prompt, GREEDY, adapter=key)] = expected[key][index]
    while engine.busy:
        found |= {output.id: output.completion for output in engine.step() if output.completion is not None}
    same([found[id] for id in wanted], list(wanted.values()))


@pytest.mark.usefixtures("made_method")
def test_rows_of_one_call(base_of: MakeBase, tmp_path: Path) -> None:
    """Rows before, between and after those with an adapter are the base's, bit for bit."""
    base = base_of("llama")
    bank, x = AdapterBank(load_decoder(base)), torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    models = {"made": adapted(base, "q_proj"), "lora": adapted(base, ("q_proj", "v_proj"), LORA)}
    for key, model in models.items():
        bank.add(key, [(save(model, tmp_path / key), 1.0)])
    with torch.no_grad(), bank.rows([("made", 1, 3), ("lora", 4, 8)]):
        found = bank.decoder.layers[0].attention.qkv(x)
        plain, made, lora = (m.layers[0].attention.qkv(x) for m in (load_decoder(base), *models.values()))
    for rows, expected in ((slice(1, 3), made), (slice(4, 8), lora)):
        torch.testing.assert_close(found[rows], expected[rows], rtol=1e-5, atol=1e-5)
        assert (expected[rows] - plain[rows]).abs().max() > 0.01
    others = [0, 3, 8]
    assert torch.equal(found[others], plain[others])
    assert torch.equal(found[1:3, 24:], plain[1:3, 24:]), "k and v under the one that sits on q"


@pytest.mark.usefixtures("made_method")
@pytest.mark.parametrize("name", SOME)
def test_over_a_base_with_an_adapter_of_its_own(base_of: MakeBase, name: str, tmp_path: Path) -> None:
    """It changes the adapted base, as it would the merged one."""
    base = base_of(name)
    under = adapted(base, "all-linear", LORA, seed=3)
    over = save(adapted(base, SOME[name]), tmp_path / "over")
    found = Engine(under, adapters={"over": over}).generate(PROMPTS, GREEDY, adapter="over")
    oarsmith.save_model(merge_adapter(adapted(base, "all-linear", LORA, seed=3)), tmp_path / "merged")
    merged = Engine(oarsmith.load_model(tmp_path / "merged", adapter=over, device="cpu"))
    same(found, merged.generate(PROMPTS, GREEDY))


@pytest.mark.usefixtures("made_method")
def test_over_8_bits(base_of: MakeBase, tmp_path: Path) -> None:
    base = base_of("llama")
    model = load_decoder(base, rewrite=kept_as(INT8_ROWS, lambda family, spec: spec)).eval()
    alone = adapted(base, SOME["llama"], form=INT8_ROWS)
    bank, x = AdapterBank(model), torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    bank.add("over", [(save(alone, tmp_path / "over"), 1.0)])
    with torch.no_grad(), bank.rows([("over", 0, None)]):
        found = bank.decoder.layers[1].attention.qkv(x)
        expected, plain = (m.layers[1].attention.qkv(x) for m in (alone, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 0.05


@pytest.mark.usefixtures("made_method")
def test_over_one_that_cannot_be_merged(base_of: MakeBase, tmp_path: Path) -> None:
    """One that looks at W is refused there; one that only adds is not."""
    base = base_of("llama")
    bank = AdapterBank(adapted(base, "q_proj", Alone(factor=1.0)))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.qkv has an adapter that cannot be merged"):
        bank.add("made", [(save(adapted(base, "q_proj"), tmp_path / "made"), 1.0)])
    assert bank.names == []
    bank.add("elsewhere", [(save(adapted(base, "down_proj"), tmp_path / "elsewhere"), 1.0)])
    bank.add("lora", [(save(adapted(base, "q_proj", LORA), tmp_path / "lora"), 1.0)])
    assert bank.names == ["elsewhere", "lora"]
