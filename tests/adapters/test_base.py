"""An adapter tells which base it was trained on, and lies on no other one unless somebody insists."""

import json

import pytest
import torch

import oarsmith
from oarsmith import Engine, Sampling, cli
from oarsmith.adapters.linear import adapted_modules
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.errors import CheckpointError, ConfigError
from random_adapter import make_adapter
from tiny import write_rows, write_tiny_model


@pytest.fixture
def trained(tmp_path):
    """A base, an adapter trained on it by the command, and another base of the same shape."""
    base, other = (write_tiny_model(tmp_path / str(seed), seed=seed) for seed in range(2))
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    words = ["sft", str(base), str(rows), "--output_dir", str(tmp_path / "run"), "--lora", "--max_steps", "1"]
    assert cli.main([*words, "--lora_rank", "2", "--max_length", "64", "--device", "cpu"]) == 0
    return base, tmp_path / "run" / "adapter", other


def test_another_base_is_refused(trained, tmp_path, capsys):
    base, adapter, other = trained
    oarsmith.load_model(base, adapter=adapter)
    for load in (
        lambda: oarsmith.load_model(other, adapter=adapter),
        lambda: Engine(other, adapter=adapter),
        lambda: Engine(other, adapters={"a": adapter}),
    ):
        with pytest.raises(CheckpointError, match="trained on another model"):
            load()
    oarsmith.load_model(other, adapter=adapter, any_base=True)
    Engine(other, adapters={"a": adapter}, any_base=True).add_adapter("b", adapter)
    words = ["merge-adapter", str(adapter), str(tmp_path / "merged"), "--model_name_or_path", str(other)]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    assert "trained on another model" in capsys.readouterr().err
    assert cli.main([*words, "--any_base"]) == 0
    # PEFT's own adapters do not tell.
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert fingerprint(base) not in json.dumps(config)


def test_several_act_as_one(chain_model, tmp_path):
    """The sum of what each adds, by its weight: as one LoRA of all ranks."""
    base = chain_model("one two three")
    first, second = (make_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b")))
    engine = Engine(base, adapters={"both": [(first, 0.75), (second, -0.5)], "first": first})
    model = oarsmith.load_model(base, dtype="fp32", device="cpu")
    with torch.no_grad():
        for weight, path in ((0.75, first), (-0.5, second)):
            adapted = oarsmith.load_model(base, dtype="fp32", device="cpu", adapter=path)
            for name, module in adapted_modules(adapted):
                model.get_submodule(name).weight.add_(weight * (module.merged()[0] - module.weight))
    prompts, sampling = [[5, 6, 7], [9, 4]], Sampling(max_new_tokens=6, logprobs=0)
    found = engine.generate(prompts, sampling, adapter="both")
    expected = Engine(model).generate(prompts, sampling)
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids
        assert [c.logprob for c in one.logprobs] == pytest.approx([c.logprob for c in other.logprobs], abs=1e-4)
    with pytest.raises(ConfigError, match="no adapter"):
        engine.add_adapter("none", [])
