"""Recipes are read strictly, and parameters by their precedence."""

import pytest

from oarsmith.errors import ConfigError
from oarsmith.merge.parameters import Gradient, look_up, read_setting, value_of
from oarsmith.merge.recipe import read_recipe, recipe_values


def recipe(**changes):
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **changes}


def test_gradients():
    setting = read_setting([0, 1, 0.5], "x")
    assert [value_of(setting, "w", place) for place in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert value_of(Gradient((True, False)), "w", 0.4) is True


def test_filters():
    setting = read_setting([{"filter": "mlp", "value": [0, 1]}, {"filter": "q_proj", "value": 3}], "x")
    assert value_of(setting, "layers.0.mlp.up", 0.5) == 0.5
    assert value_of(setting, "layers.0.q_proj", 0.5) == 3
    assert value_of(setting, "norm", 0.5) is None
    assert look_up([{"w": setting}, {"w": 7}], "w", "norm", 0.5) == 7


def test_the_most_special_counts():
    assert look_up([{}, {"w": 1}, {"w": 2}], "w", "n", 0) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": None}, "exactly one"),
        ({"slices": [{"sources": []}]}, "exactly one"),
        ({"merge_method": None}, "how to merge"),
        ({"models": [{"modell": "a"}]}, "did you mean 'model'"),
        ({"models": [{"model": "a", "parameters": {"weight": [[1]]}}]}, "gradient"),
        ({"models": [{"model": "a", "parameters": {"weight": [{"filtr": "a"}]}}]}, "filtr"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]}, "range"),
        ({"models": None, "slices": [{"source": []}]}, "did you mean 'sources'"),
        ({"models": None, "modules": {"a": {"models": []}, "b": {}}}, "one module"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "same"),
        ({"tokenizer": {"source": "union", "pad_to_multiple_of": 0}}, "pad_to"),
        ({"parameters": {"t": float("nan")}}, "no number"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe(**changes))
    assert words in str(error.value)


def test_there_and_back():
    values = recipe(
        models=None,
        slices=[
            {
                "sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0.1, 0.9]}}],
                "base_model": "c",
                "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 2}]},
            }
        ],
        base_model="b",
        dtype="float32",
        tokenizer={"source": "union", "tokens": {"<x>": {"source": {"kind": "zero"}, "force": True}}},
    )
    read = read_recipe(values)
    assert read_recipe(recipe_values(read)) == read


def test_modules_and_objects():
    read = read_recipe(
        {
            "merge_method": "ties",
            "modules": {"text_decoder": {"models": [{"model": {"model": {"path": "a"}, "lora": "l"}}]}},
        }
    )
    assert read.models == ("a+l",)
