"""Values of a sampling are checked where it is made."""

import dataclasses

import pytest

import oarsmith
from oarsmith.errors import ConfigError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", (0, 2.5, True, "3")),
        ("min_new_tokens", (-1, 0.5)),
        ("temperature", (-0.1, NAN, INF, "hot", None)),
        ("top_k", (-1, 1.0)),
        ("top_p", (0.0, 1.5, NAN)),
        ("min_p", (-0.1, 1.1)),
        ("typical_p", (0, 1.01)),
        ("repetition_penalty", (0.0, -1, INF)),
        ("presence_penalty", (-2.1, 2.1)),
        ("frequency_penalty", (-2.1, NAN)),
        ("stop", (("a", ""), (3,))),
        ("stop_ids", ((-1,), ("a",))),
        ("bad_words", (("",), ((),), ((-3,),))),
        ("ignore_eos", (1,)),
        ("skip_special_tokens", (1,)),
        ("seed", (1.5, "x")),
        ("n", (0,)),
        ("best_of", (0,)),
        ("logprobs", (-1, True)),
        ("prompt_logprobs", (-1,)),
        ("json_schema", ("{", "3", "true", 7, False, "[" * 100_000)),
        ("json_object", (1,)),
        ("regex", ("",)),
        ("grammar", ("",)),
        ("choices", (("a", ""),)),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"{name} must be") as caught:
            oarsmith.Sampling(**{name: value})
        assert repr(value)[:200] in caught.value.what and len(caught.value.what) < 300


@pytest.mark.parametrize("value", [3, {"a": 1}, {-1: 1.0}, {3: 101}, {3: NAN}, {3: None}])
def test_a_bias_out_of_range_is_named(value):
    with pytest.raises(ConfigError, match="logit_bias must be token ids with a number from -100 to 100"):
        oarsmith.Sampling(logit_bias=value)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is more than max_new_tokens 8"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, "best_of 2 is less than n 3"),
        ({"n": 2}, "n is 2 and the answers are greedy"),
        ({"best_of": 2}, "best_of is 2 and the answers are greedy"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices are given"),
        ({"json_object": True, "ignore_eos": True}, "json_object with ignore_eos"),
        ({"stop": 3}, "stop is 3"),
    ],
)
def test_values_that_exclude_each_other(values, what):
    with pytest.raises(ConfigError) as caught:
        oarsmith.Sampling(**values)
    assert what in caught.value.what and caught.value.fix


def test_one_text_is_not_taken_for_its_letters():
    assert oarsmith.Sampling(stop="END").stop == ("END",)
    assert oarsmith.Sampling(bad_words="no", choices="yes").bad_words == ("no",)
    assert oarsmith.Sampling(stop=["a", "b"], stop_ids=[3]) == oarsmith.Sampling(stop=("a", "b"), stop_ids=(3,))
    assert oarsmith.Sampling(bad_words=["no", [3, 4]]).bad_words == ("no", (3, 4))


def test_a_bias_has_whole_numbers_for_keys():
    assert dict(oarsmith.Sampling(logit_bias={"7": 2}).logit_bias) == {7: 2.0}


def test_derived_values():
    assert oarsmith.Sampling().greedy and oarsmith.Sampling(temperature=1e-6).greedy
    assert not oarsmith.Sampling(temperature=1e-5).greedy
    assert oarsmith.Sampling(temperature=1.0, n=2).num_samples == 2
    assert oarsmith.Sampling(temperature=1.0, n=2, best_of=5).num_samples == 5
    assert oarsmith.Sampling().constraints == ()
    assert oarsmith.Sampling(json_schema={}).constraints == ("json_schema",)
    assert oarsmith.Sampling(json_object=True).constraints == ("json_object",)
    assert oarsmith.Sampling(choices=["a"]).constraints == ("choices",)


def test_it_cannot_be_changed():
    sampling = oarsmith.Sampling(logit_bias={3: 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 3
    with pytest.raises(TypeError):
        sampling.logit_bias[3] = 2.0
