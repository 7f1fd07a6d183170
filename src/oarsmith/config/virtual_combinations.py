"""Keys of ``adapter_virtual.py`` beside values with which they mean nothing, and what some methods cannot be with."""

from __future__ import annotations

from typing import Any

from .adapter_virtual import PARTS, WITH_VIRTUAL, VirtualKeys
from .adapters import AdapterKeys
from .impossible import Impossible
from .sft import SftConfig

# Beginning of keys -> the methods that use them.
_USED_BY = {
    "num_prefix_tokens": frozenset({"prefix_tuning"}),
    "prefix_": frozenset({"prefix_tuning"}),
    "num_prompt_tokens": frozenset({"prompt_tuning", "p_tuning"}),
    "prompt_tuning_": frozenset({"prompt_tuning"}),
    "p_tuning_": frozenset({"p_tuning"}),
    "reft_": frozenset({"reft"}),
}
# Shared keys that say something of matrices beside projections.
_OF_PROJECTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "rslora")
# PEFT has biases beside these only.
_WITH_BIAS = frozenset({"lora", "dora", "pissa", "olora", "loraga", "lorapro", "moslora"})


def _given(c: AdapterKeys, name: str) -> bool:
    return bool(dict(c)[name] != AdapterKeys.model_fields[name].default)


def _in_vain(start: str, methods: frozenset[str]) -> Impossible[Any]:
    keys = [key for key in VirtualKeys.model_fields if key.startswith(start)]
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} or {keys[-1]}"
    use = f"adapter_type {' or '.join(sorted(methods))}"
    return Impossible(
        AdapterKeys,
        lambda c: c.adapter_type not in methods and any(_given(c, key) for key in keys),
        f"{listed} is given, but has no effect without {use}",
        f"add {use}, or remove it",
    )


def _useless(key: str, methods: frozenset[str]) -> Impossible[Any]:
    return Impossible(
        AdapterKeys,
        lambda c: c.adapter_type in methods and _given(c, key),
        f"{key} is given, but has no effect with adapter_type {{adapter_type}}",
        "remove it",
    )


def _of_lstm(c: AdapterKeys) -> bool:
    return c.p_tuning_encoder != "lstm" and (_given(c, "p_tuning_layers") or _given(c, "p_tuning_dropout"))


VIRTUAL: tuple[Impossible[Any], ...] = (
    *(_in_vain(start, methods) for start, methods in _USED_BY.items()),
    *(_useless(key, PARTS) for key in _OF_PROJECTIONS),
    _useless("lora_rank", PARTS - {"reft"}),
    Impossible(
        AdapterKeys,
        lambda c: c.prefix_projection_hidden_size is not None and not c.prefix_projection,
        "prefix_projection_hidden_size is given, but has no effect without prefix_projection",
        "add prefix_projection true, or remove it",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.prompt_tuning_init_text is not None and _given(c, "prompt_tuning_init"),
        "prompt_tuning_init and prompt_tuning_init_text both say what the vectors begin as",
        "keep one of them",
    ),
    Impossible(
        AdapterKeys,
        _of_lstm,
        "p_tuning_layers or p_tuning_dropout is given, but has no effect without p_tuning_encoder lstm",
        "add p_tuning_encoder lstm, or remove it",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.reft_intervention_type == "tiny" and (_given(c, "reft_act_fn") or c.reft_add_bias),
        "reft_act_fn or reft_add_bias is given, but has no effect with reft_intervention_type tiny",
        "remove it",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.adapter_type == "trainable_tokens" and not c.trainable_tokens,
        "adapter_type trainable_tokens trains rows of the embedding, but trainable_tokens names none",
        "give trainable_tokens",
    ),
    Impossible(
        AdapterKeys,
        lambda c: bool(c.trainable_tokens) and not c.has_adapter,
        "trainable_tokens is given, but has no effect without an adapter (all weights would be trained)",
        "add adapter_type trainable_tokens, or lora true",
    ),
    Impossible(
        AdapterKeys,
        lambda c: bool(c.trainable_tokens) and c.adapter_type in PARTS - {"trainable_tokens"},
        "trainable_tokens cannot be used beside adapter_type {adapter_type}",
        "use adapter_type trainable_tokens, or lora true",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.lora_bias != "none" and c.adapter_type not in _WITH_BIAS,
        "lora_bias trains biases beside LoRA, and adapter_type is {adapter_type}",
        "remove it, or set adapter_type to lora (beside it) or bitfit (alone)",
    ),
    Impossible(
        SftConfig,
        lambda c: c.use_ssa and c.adapter_type in WITH_VIRTUAL,
        "use_ssa lets tokens see their own group of a text only, and virtual tokens stand before the first",
        "set use_ssa to false, or adapter_type to lora",
    ),
)
