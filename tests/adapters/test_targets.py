"""Which projections a target list selects: PEFT's rules, with an error for what selects nothing."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest

from oarsmith.adapters.targets import match_targets, target_places
from oarsmith.checkpoint.config_file import read_config
from oarsmith.errors import ConfigError
from oarsmith.models import families
from oarsmith.models.names import Place, whole

from .conftest import Base


def places_of(base: Base) -> dict[str, Place]:
    family, spec = families.build_spec(read_config(base.path))
    return target_places(family.names(spec))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ("q_proj",)),
        ("llama", ("v_proj", "q_proj")),
        ("llama", ("0.self_attn.q_proj", "model.layers.1.mlp.up_proj")),
        ("llama", r".*\.(q|k)_proj"),
        ("llama", r"model\.layers\.1\.mlp\..*_proj"),
        ("gpt2", "all-linear"),
        ("gpt2", ("c_proj",)),
        ("gpt2", ("mlp.c_proj", "c_attn")),
        ("llama", ("embed_tokens", "lm_head", "q_proj")),
        ("llama", r".*(q_proj|lm_head)"),
        ("gpt2", ("wte", "lm_head")),
    ],
)
def test_as_peft_selects(base: Callable[[str], Base], name: str, targets: str | tuple[str, ...]) -> None:
    made = base(name)
    chosen = match_targets(places_of(made), targets)
    wanted = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=wanted, fan_in_fan_out=name == "gpt2")
    theirs = peft.get_peft_model(made.oracle(), config).base_model.targeted_module_names
    assert sorted(chosen) == sorted(theirs)
    assert chosen == [module for module in places_of(made) if module in chosen], "in the model's order"


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (("q_proj", "query"), "query selects no projection"),
        (("proj",), "proj selects no projection"),
        ((), "an empty list selects no projection"),
        ("q_pro.", "q_pro. selects no projection"),  # a string is a pattern for the whole name
        ("query", "query selects no projection"),
        ("(", "not a regular expression"),
    ],
)
def test_refused(base: Callable[[str], Base], targets: str | tuple[str, ...], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        match_targets(places_of(base("llama")), targets)
    assert part in str(caught.value) and str(caught.value).startswith("lora_target_modules: ")
    if targets != "(":
        assert "q_proj, up_proj, v_proj" in str(caught.value), "what there is"


def test_a_single_word_is_a_name() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]
    places = {name: Place(f"{name}.weight", "layers.0.attention.qkv.weight", whole) for name in names}
    assert match_targets(places, "q_proj") == match_targets(places, ("q_proj",)) == [names[0], names[2]]


@pytest.mark.parametrize(
    ("model_type", "names"),
    [("bloom", ["transformer.word_embeddings", "lm_head"]), ("gpt2", ["transformer.wte", "lm_head"])],
)
def test_the_ends_have_one_name_for_all(base: Callable[[str], Base], model_type: str, names: list[str]) -> None:
    places = places_of(base(model_type))
    assert match_targets(places, ("embed_tokens", "lm_head")) == names
    assert not set(names) & set(match_targets(places, "all-linear"))
