"""The value types of keys: every spelling people use, and nothing else."""

import pytest
from pydantic import ValidationError

from oarsmith.config.base import Bool, Float, Int, JobConfig, NamesOrPattern, Strings, value_choices, value_types
from oarsmith.config.sft import SftConfig


class Sample(JobConfig):
    switch: Bool = False
    count: Int = 1
    limit: Int | None = None
    rate: Float = 0.5
    texts: Strings = ()
    names: NamesOrPattern = "all-linear"


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true", "True", "yes", "on"])
def test_true_spellings(value):
    assert Sample(switch=value).switch is True


@pytest.mark.parametrize("value", [False, 0, "0", "false", "No", "off"])
def test_false_spellings(value):
    assert Sample(switch=value).switch is False


@pytest.mark.parametrize("value", [2, "maybe", "", [], -1])
def test_not_a_switch(value):
    with pytest.raises(ValidationError):
        Sample(switch=value)


@pytest.mark.parametrize(("value", "count"), [(3, 3), (3.0, 3), ("3", 3), ("3.0", 3), ("1e3", 1000), ("1_000", 1000)])
def test_whole_numbers(value, count):
    config = Sample(count=value, limit=value)
    assert config.count == config.limit == count
    assert type(config.count) is int


@pytest.mark.parametrize("value", [3.5, "3.5", True, "three", "nan", "inf", None, [3]])
def test_not_a_whole_number(value):
    with pytest.raises(ValidationError):
        Sample(count=value)


@pytest.mark.parametrize(("value", "rate"), [(1, 1.0), (1e-5, 1e-5), ("1e-5", 1e-5), (" 2 ", 2.0)])
def test_numbers(value, rate):
    assert Sample(rate=value).rate == rate


@pytest.mark.parametrize("value", [True, "fast", "nan", float("inf"), None])
def test_not_a_number(value):
    with pytest.raises(ValidationError):
        Sample(rate=value)


def test_lists_of_texts():
    assert Sample(texts=["a,b", "c"]).texts == ("a,b", "c")
    assert Sample(texts="a,b").texts == ("a,b",), "a stop text may hold a comma"
    assert Sample(texts='["a", "b"]').texts == ("a", "b")
    with pytest.raises(ValidationError, match="JSON list"):
        Sample(texts='["a"')
    with pytest.raises(ValidationError):
        Sample(texts=[1])


def test_names_or_pattern():
    assert Sample(names="q_proj,v_proj").names == ("q_proj", "v_proj")
    assert Sample(names=["q_proj"]).names == ("q_proj",)
    assert Sample(names=r".*\.(q|v)_proj").names == r".*\.(q|v)_proj"
    assert Sample(names=r"a{1,2}").names == r"a{1,2}", "a comma inside a pattern does not split it"


def test_frozen_and_strict():
    config = Sample()
    with pytest.raises(ValidationError, match="frozen"):
        config.count = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        Sample(unknown=1)


def test_types_and_choices_of_keys():
    assert value_types(SftConfig, "do_eval") == {bool}
    assert value_types(SftConfig, "save_total_limit") == {int}
    assert value_types(SftConfig, "lora_target_modules") == {tuple, str}
    assert value_choices(SftConfig, "evaluation_strategy") == ("no", "steps", "epoch")
    assert value_choices(SftConfig, "output_dir") == ()
