"""Parts of ``oarsmith quickstart`` that need no real model. The whole of it is ``make quickstart``."""

import json

import pytest

from oarsmith import cli, demo
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.config.tools import QuickstartConfig
from oarsmith.jobs.console import make_console
from oarsmith.jobs.quickstart import Examination, examine, show, training_words
from oarsmith.loading import load_model
from oarsmith.text import load_tokenizer
from tiny import write_tiny_model

ITEMS = demo.load_heldout()


def result(num_right, perplexity, answer="because [b]so[/b] [/it] is"):
    right = [number < num_right for number in range(len(ITEMS))]
    return Examination([answer] * len(ITEMS), right, perplexity)


@pytest.mark.parametrize(
    ("num_right", "perplexity", "good"),
    [
        (len(ITEMS), 20.0, True),
        (-(-len(ITEMS) * 9 // 10), 20.6, True),
        (len(ITEMS) // 2, 20.0, False),
        (len(ITEMS), 20.7, False),
    ],
)
def test_the_promise_is_measured(tmp_path, capsys, num_right, perplexity, good):
    """At least 9 of 10 right, and perplexity on unrelated text at most 3 % worse."""
    assert show(result(1, 20.0), result(num_right, perplexity), tmp_path, make_console()) is good
    out = capsys.readouterr().out
    assert f"right answers: 1 -> {num_right} of {len(ITEMS)}" in out
    assert ("below what this demo promises" in out) is not good
    assert "[/it]" in out, "an answer is text, not markup"
    saved = json.loads((tmp_path / "answers.json").read_text())
    assert saved["after"] == {"right": num_right, "total": len(ITEMS), "perplexity": perplexity}
    assert len(saved["rows"]) == len(ITEMS)


def test_the_recipe_is_a_valid_configuration(tmp_path):
    words = training_words(tmp_path / "base", tmp_path / "run", QuickstartConfig(seed=3))
    config = load_config(SftConfig, None, words).config
    assert config.lora
    assert config.seed == 3
    assert config.dataset_name_or_path == str(demo.train_path())


def test_examine(tmp_path, few_threads, capsys):
    """Questions and perplexity with a model that knows nothing."""
    path = write_tiny_model(tmp_path / "model")
    found = examine(load_model(path), load_tokenizer(path), make_console())
    assert len(found.answers) == len(found.right) == len(ITEMS)
    assert not any(found.right)
    assert found.perplexity > 500
    assert f"right: 0 of {len(ITEMS)}" in capsys.readouterr().out


def test_a_run_that_is_there_is_not_replaced(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert cli.main(["quickstart", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "exists already" in message
    assert "--overwrite_output_dir" in message
