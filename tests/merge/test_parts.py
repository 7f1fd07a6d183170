"""Mixtures, adapters of merges, the search, and the command as a whole."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import oarsmith
from oarsmith import cli
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.errors import ConfigError
from oarsmith.merge.extract_lora import low_rank
from oarsmith.merge.recipe import read_recipe
from oarsmith.merge.search import knobs, search_evolution, search_grid, with_numbers
from tiny import tiny_decoder, write_rows, write_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_model(folder / f"m{seed}", seed=seed) for seed in range(3)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def write_recipe(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("gate", ["hidden", "cheap_embed", "random"])
def test_a_mixture(models, tmp_path, gate):
    experts = [
        {"source_model": str(models[index]), "positive_prompts": [f"text {index}", "more"], "negative_prompts": ["no"]}
        for index in (1, 2)
    ]
    values = {"base_model": str(models[0]), "gate_mode": gate, "experts": experts, "experts_per_token": 1}
    out = tmp_path / "out"
    assert cli.main(["merge", write_recipe(tmp_path / "r.yaml", values), str(out), "--n_process", "1"]) == 0
    config, found = json.loads((out / "config.json").read_text()), weights(out)
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 2
    base, second = weights(models[0]), weights(models[2])
    layer = "model.layers.1"
    assert torch.equal(found[f"{layer}.self_attn.q_proj.weight"], base[f"{layer}.self_attn.q_proj.weight"])
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = f"{layer}.block_sparse_moe.experts.1.{ours}.weight"
        assert torch.equal(found[name], second[f"{layer}.mlp.{theirs}.weight"])
    gate_ND = found[f"{layer}.block_sparse_moe.gate.weight"]
    if gate != "random":
        torch.testing.assert_close(gate_ND.norm(dim=-1), torch.ones(2))
    assert torch.isfinite(oarsmith.load_model(out)(torch.arange(6)[None])).all()


def test_a_mixture_with_a_template(models, tmp_path, capsys):
    experts = [{"source_model": str(models[0]), "positive_prompts": [text]} for text in ("a", "b")]
    values = {"base_model": str(models[0]), "experts": experts, "chat_template": "{{ messages[0].content }}!"}
    recipe, out = write_recipe(tmp_path / "r.yaml", values), tmp_path / "out"
    assert cli.main(["merge", recipe, str(out), "--probe", "false"]) == 0
    assert oarsmith.load_tokenizer(out).apply_chat_template([{"role": "user", "content": "hello"}]) == "hello!"
    assert yaml.safe_load((out / "merge_recipe.yaml").read_text())["chat_template"] == values["chat_template"]
    assert cli.main(["merge", recipe, str(tmp_path / "no"), "--lora_model_path", "x"]) == 2
    assert "made of experts alone" in capsys.readouterr().err


def test_experts_that_are_the_base_are_the_base(models, tmp_path):
    """With equal experts, whichever are chosen, the mixture answers as the dense model."""
    experts = [{"source_model": str(models[0]), "positive_prompts": [text]} for text in ("a", "b", "c")]
    values = {"base_model": str(models[0]), "experts": experts}
    out = tmp_path / "out"
    assert cli.main(["merge", write_recipe(tmp_path / "r.yaml", values), str(out)]) == 0
    ids = torch.arange(20)[None]
    expected = oarsmith.load_model(models[0])(ids)
    torch.testing.assert_close(oarsmith.load_model(out)(ids), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ([{"source_model": "x"}], "1 experts"),
        ([{"source_model": "x"}] * 2, "no positive_prompts"),
        ([{"source_model": "x", "positive_prompts": ["a"]}] * 2, "same prompts"),
        ([{"source": "x"}] * 2, "source"),
    ],
)
def test_experts_that_cannot_be(models, tmp_path, capsys, experts, words):
    values = {"base_model": str(models[0]), "experts": experts}
    assert cli.main(["merge", write_recipe(tmp_path / "r.yaml", values), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16)])
def test_low_rank_is_the_best_of_its_rank(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in (1, 5, 16):
        a, b = low_rank(delta, rank, 0.0)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        torch.testing.assert_close((b @ a).double(), best, atol=1e-5, rtol=0)
    assert low_rank(delta, 16, float(s[4] / s[0]) * 1.001)[0].shape[0] == 4


def test_an_adapter_of_a_fine_tuned_model(models, tmp_path):
    """What a LoRA of rank 3 made is found again by rank 3."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(tiny_decoder(lora_rank=3), adapter, base=str(models[0]))
    values = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": f"{models[0]}+{adapter}", "parameters": {"weight": 1.0}}],
    }
    out = tmp_path / "out"
    words = ["merge", write_recipe(tmp_path / "r.yaml", values), str(out), "--adapter_rank", "3"]
    assert cli.main(words) == 0
    ids = torch.arange(20)[None]
    expected = oarsmith.load_model(models[0], adapter=adapter)(ids)
    torch.testing.assert_close(oarsmith.load_model(models[0], adapter=out)(ids), expected, atol=2e-3, rtol=0)


def test_adapters_become_an_adapter(models, tmp_path):
    folders = []
    for seed in (5, 6):
        folders.append(tmp_path / f"adapter{seed}")
        folders[-1].mkdir()
        write_adapter(tiny_decoder(seed=seed, lora_rank=2), folders[-1], base=str(models[0]))
    values = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": f"{models[0]}+{one}", "parameters": {"weight": 0.5}} for one in folders],
    }
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert cli.main(["merge", recipe, str(tmp_path / "adapter"), "--adapter_rank", "4"]) == 0
    assert cli.main(["merge", recipe, str(tmp_path / "whole")]) == 0
    ids = torch.arange(20)[None]
    found = oarsmith.load_model(models[0], adapter=tmp_path / "adapter")(ids)
    torch.testing.assert_close(found, oarsmith.load_model(tmp_path / "whole")(ids), atol=2e-3, rtol=0)


def test_the_strategy_finds_a_minimum():
    wanted = (0.9, 0.2, 0.55)
    trials = search_evolution(
        lambda x: sum((3**i) * (a - b) ** 2 for i, (a, b) in enumerate(zip(x, wanted, strict=True))), 3, 0, 1, 200, 0
    )
    best = min(trials, key=lambda trial: trial.loss)
    assert len(trials) == 200 and best.numbers == pytest.approx(wanted, abs=0.02)
    at_the_edge = search_evolution(lambda x: x[0] + x[1], 2, -1, 1, 120, 0)
    assert min(trial.loss for trial in at_the_edge) < -1.9


def test_the_grid():
    trials = search_grid(lambda x: abs(x[0] - 0.5) + x[1], 2, 0, 1, 3, 9)
    assert [trial.numbers for trial in trials[:4]] == [(0, 0), (0, 0.5), (0, 1), (0.5, 0)]
    with pytest.raises(ConfigError, match="27 combinations"):
        search_grid(lambda x: 0, 3, 0, 1, 3, 9)


def test_numbers_reach_the_recipe():
    recipe = read_recipe(
        {"merge_method": "ties", "base_model": "c", "models": [{"model": name} for name in ("a", "b", "c")]}
    )
    chosen = knobs(recipe, ("weight", "lambda"), 2)
    assert [(one.model, one.group) for one in chosen] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), (None, 0), (None, 1)]
    made = with_numbers(recipe, chosen, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert made.slices[0].sources[1].parameters["weight"].anchors == (0.3, 0.4)
    assert made.parameters[0]["lambda"].anchors == (0.5, 0.6)
    with pytest.raises(ConfigError, match="no number 'wieght'"):
        knobs(recipe, ("wieght",), 1)


@pytest.mark.parametrize("kind", ["rows", "text", "pairs"])
def test_a_search(models, tmp_path, capsys, kind):
    """Half of a model and half of another: the file says which numbers are best, and they are what is written."""
    if kind == "rows":
        file = write_rows(tmp_path / "rows.jsonl", 6)
    elif kind == "text":
        file = tmp_path / "text.txt"
        file.write_text("The sea is wide, and the boat is small. " * 20)
    else:
        file = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": f"No {n} no."} for n in range(8)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"merge_method": "linear", "models": [{"model": str(model)} for model in models[:2]]}
    out = tmp_path / "out"
    words = ["merge", write_recipe(tmp_path / "r.yaml", values), str(out), "--evaluate", str(file)]
    words += ["--search", "grid", "--search_steps", "3", "--n_process", "1", "--probe", "false"]
    assert cli.main([*words, "--search_range", "0.1,1"]) == 0
    shown = capsys.readouterr().out
    assert "best of 9 merges" in shown and "merged" in shown.splitlines()[-2]
    written = yaml.safe_load((out / "merge_recipe.yaml").read_text())
    again = tmp_path / "again"
    assert cli.main(["merge", str(out / "merge_recipe.yaml"), str(again), "--probe", "false"]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert {entry["parameters"]["weight"] for entry in written["models"]} <= {0.1, 0.55, 1.0}
    assert "## Evaluated" in (out / "README.md").read_text()


def test_paddlenlps_command_line(models, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["merge", "--merge_method", "ties", "--model_path_list", str(models[1]), str(models[2])]
    words += ["--weight_list", "0.6", "0.4", "--base_model_path", str(models[0]), "--output_path", str(out)]
    words += ["--reserve_p", "0.5", "--ties_elect_type", "count", "--tensor_type", "np", "--split_pieces", "8"]
    assert cli.main(words) == 0
    base, one, two = (weights(model) for model in models)
    name = "model.layers.0.mlp.down_proj.weight"
    kept = []
    for tensors, weight in ((one, 0.6), (two, 0.4)):
        delta = (tensors[name] - base[name]).double()
        mask = delta.abs() >= torch.quantile(delta.abs(), 0.5)
        kept.append(delta * mask * delta.abs().sum() / (delta * mask).abs().sum() * weight)
    stacked = torch.stack(kept)
    agrees = stacked.sign() == torch.where(stacked.sign().sum(0) >= 0, 1.0, -1.0)
    divisor = (agrees * torch.tensor([0.6, 0.4]).double()[:, None, None]).sum(0)
    expected = base[name].double() + (stacked * agrees).sum(0) / divisor.clamp(min=1e-12)
    torch.testing.assert_close(weights(out)[name].double(), expected, atol=1e-6, rtol=0)
    assert "split_pieces" in capsys.readouterr().err
    lineage = json.loads((out / "merge_lineage.json").read_text())
    assert [len(one["sha256"]) for one in lineage["inputs"]] == [64] * 3


def test_flags_and_parameters_without_an_effect_are_told(models, tmp_path, capsys):
    paths = ["--model_path_list", *map(str, models[:2]), "--probe", "false"]
    assert cli.main(["merge", *paths, "--output_path", str(tmp_path / "one")]) == 0
    assert "without an effect" not in capsys.readouterr().out  # nobody gave any
    words = [*paths, "--reserve_p", "0.5", "--normalize", "false", "--ties_elect_type", "count"]
    assert cli.main(["merge", *words, "--output_path", str(tmp_path / "two")]) == 0
    assert "linear has no reserve_p, ties_elect_type: without an effect" in capsys.readouterr().out
    entry = {"model": str(models[1]), "parameters": {"weight": 1, "density": 0.5}}
    values = {"merge_method": "task_arithmetic", "base_model": str(models[0]), "models": [entry]}
    assert cli.main(["merge", write_recipe(tmp_path / "r.yaml", values), str(tmp_path / "three")]) == 0
    assert "task_arithmetic has no density: without an effect" in capsys.readouterr().out


def test_an_adapter_by_flags(models, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(tiny_decoder(lora_rank=3), adapter, base=str(models[0]))
    words = ["merge", "--base_model_path", str(models[0]), "--lora_model_path", str(adapter)]
    assert cli.main([*words, "--output_path", str(tmp_path / "out")]) == 0
    ids = torch.arange(20)[None]
    expected = oarsmith.load_model(models[0], adapter=adapter)(ids)
    torch.testing.assert_close(oarsmith.load_model(tmp_path / "out")(ids), expected, atol=1e-4, rtol=0)


def test_chat_templates(models, tmp_path):
    values = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models[:2]]}
    for name, template in (("auto", "auto"), ("text", "{{ messages[0].content }}!")):
        recipe = write_recipe(tmp_path / f"{name}.yaml", {**values, "chat_template": template})
        assert cli.main(["merge", recipe, str(tmp_path / name), "--probe", "false"]) == 0
    messages = [{"role": "user", "content": "hello"}]
    assert oarsmith.load_tokenizer(tmp_path / "text").apply_chat_template(messages) == "hello!"
    auto, first = (oarsmith.load_tokenizer(one).apply_chat_template(messages) for one in (tmp_path / "auto", models[0]))
    assert auto == first


def test_a_destination_that_is_an_input(models, tmp_path, capsys):
    values = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models[:2]]}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert cli.main(["merge", recipe, str(models[0]), "--overwrite"]) == 2
    assert "is read" in capsys.readouterr().err


def test_routers_are_the_states_of_prompts(models, tmp_path):
    """Of one prompt each: what the base brings into a layer at the prompt's last token, of length 1."""
    texts = ["some text", "another one"]
    experts = [
        {"source_model": str(model), "positive_prompts": [text]} for model, text in zip(models[1:], texts, strict=True)
    ]
    values = {"base_model": str(models[0]), "experts": experts}
    out = tmp_path / "out"
    assert cli.main(["merge", write_recipe(tmp_path / "r.yaml", values), str(out)]) == 0
    tokenizer, table = oarsmith.load_tokenizer(models[0]), weights(models[0])["model.embed_tokens.weight"]
    gate_ND = weights(out)["model.layers.0.block_sparse_moe.gate.weight"]
    for row_D, text in zip(gate_ND, texts, strict=True):
        state_D = table[tokenizer.encode(text)[-1]]  # into the first layer go embeddings
        torch.testing.assert_close(row_D, state_D / state_D.norm(), atol=1e-5, rtol=0)
