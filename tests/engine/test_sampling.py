"""Values of a sampling are checked where it is made."""

import dataclasses

import pytest

import oarsmith
from oarsmith.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", ("a", "")),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be") as caught:
        oarsmith.Sampling(**{name: value})
    assert repr(value) in caught.value.what


def test_one_stop_text_is_not_taken_for_its_letters():
    assert oarsmith.Sampling(stop="END").stop == ("END",)
    assert oarsmith.Sampling(stop=["a", "b"], stop_ids=[3]) == oarsmith.Sampling(stop=("a", "b"), stop_ids=(3,))


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        oarsmith.Sampling().top_k = 3
