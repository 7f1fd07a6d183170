"""Vocabularies that differ, aligned token by token."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.errors import OarsmithError
from oarsmith.merge.recipe import read_recipe
from oarsmith.merge.run import Options, merge_models
from tiny import write_tiny_model

EMBEDDING = "model.embed_tokens.weight"


def with_tokens(source, folder, tokens):
    """A copy of a model whose tokenizer has more tokens, in rows at the end of its own embeddings."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    first = oarsmith.load_tokenizer(source).vocab_size
    for offset, token in enumerate(tokens):
        content["added_tokens"].append(
            {
                "id": first + offset,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    path.write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v + 0.01 for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = write_tiny_model(folder / "base")
    return base, with_tokens(base, folder / "a", ["<|a|>", "<|both|>"]), with_tokens(base, folder / "b", ["<|both|>"])


def merged(models, output, **tokenizer):
    entries = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models[1:]]
    values = {"merge_method": "linear", "models": entries, "tokenizer": {"source": "union", **tokenizer}}
    report = merge_models(read_recipe(values), output, Options(), progress=lambda *_: None)
    return report, load_file(output / "model.safetensors")[EMBEDDING]


def test_union(models, tmp_path):
    base, a, b = models
    report, found = merged(models, tmp_path / "out", pad_to_multiple_of=16)
    first = oarsmith.load_tokenizer(base).vocab_size
    ours = oarsmith.load_tokenizer(tmp_path / "out")
    assert ours.token_to_id("<|a|>") == first and ours.token_to_id("<|both|>") == first + 1
    assert len(found) % 16 == 0 and len(found) >= first + 2 and report.verified.known
    one, two = (load_file(folder / "model.safetensors")[EMBEDDING] for folder in (a, b))
    mean = (one[:first].double() + two[:first].double()) / 2
    torch.testing.assert_close(found[:first].double(), mean, atol=1e-6, rtol=0)
    # <|a|>: only one model has it. <|both|>: other rows of the two.
    torch.testing.assert_close(found[first], one[first])
    expected = (one[first + 1].double() + two[first].double()) / 2
    torch.testing.assert_close(found[first + 1].double(), expected, atol=1e-6, rtol=0)
    ids = ours.encode("a word<|both|>")
    assert ids[-1] == first + 1
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(found)


def test_tokens_that_others_brought_are_added(models, tmp_path):
    """The first model lacks a token: its tokenizer gets it."""
    _, a, b = models
    report, found = merged((None, b, a), tmp_path / "out")
    ours = oarsmith.load_tokenizer(tmp_path / "out")
    at = ours.token_to_id("<|a|>")
    assert at == ours.token_to_id("<|both|>") + 1 == len(found) - 1
    assert "added" in report.notes[0]
    assert ours.encode("x<|a|>")[-1] == at


def test_single_tokens(models, tmp_path):
    base, _, b = models
    tokens = {
        "<|a|>": {"source": {"kind": "zero"}, "force": True},
        "<|both|>": {"source": {"kind": "model_token", "model": str(b), "token_id": 5}, "force": True},
    }
    _, found = merged(models, tmp_path / "out", tokens=tokens)
    first = oarsmith.load_tokenizer(base).vocab_size
    assert not found[first].any()
    torch.testing.assert_close(found[first + 1], load_file(b / "model.safetensors")[EMBEDDING][5])


def test_models_that_only_lend_rows_are_in_the_lineage(models, tmp_path):
    base, a, b = models
    tokens = {"<|a|>": {"source": {"kind": "model_token", "model": str(base), "token_id": 5}, "force": True}}
    report, found = merged((None, b, a), tmp_path / "out", tokens=tokens)
    torch.testing.assert_close(found[-1], load_file(base / "model.safetensors")[EMBEDDING][5])
    lender = next(one for one in report.inputs if one.reference == str(base))
    assert lender.num_tensors == 2  # embedding and head


def test_base_and_path(models, tmp_path):
    base, a, b = models
    entries = [{"model": str(model), "parameters": {"weight": 1.0}} for model in (a, b)]
    values = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}
    for name, source in (("base", "base"), ("path", str(a))):
        recipe = read_recipe({**values, "tokenizer_source": source})
        merge_models(recipe, tmp_path / name, Options(), progress=lambda *_: None)
        size = oarsmith.load_tokenizer(base if name == "base" else a).vocab_size
        assert len(load_file(tmp_path / name / "model.safetensors")[EMBEDDING]) == size
    with pytest.raises(OarsmithError, match="neither union nor base"):
        recipe = read_recipe({**values, "tokenizer_source": str(tmp_path / "nowhere")})
        merge_models(recipe, tmp_path / "no", Options(), progress=lambda *_: None)
