"""The families: each a short file that turns a ``config.json`` into a spec and names its tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families import (
    baichuan,
    bloom,
    chatglm,
    chatglm2,
    cohere,
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    internlm2,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    scoring,
    smollm3,
    starcoder2,
    yuan,
)
from oarsmith.models.families.base import Family
from oarsmith.models.families.scoring import has_new_head, scoring_config
from oarsmith.models.spec import DecoderSpec

__all__ = ["Family", "build_spec", "find", "has_new_head", "known", "scoring_config", "text_config"]

_FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    gpt_oss.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
    smollm3.FAMILY,
    starcoder2.FAMILY,
    cohere.FAMILY,
    glm.FAMILY,
    glm.GLM4,
    qwen.FAMILY,
    baichuan.FAMILY,
    chatglm.FAMILY,
    chatglm2.FAMILY,
    internlm2.FAMILY,
    yuan.FAMILY,
    bloom.FAMILY,
    opt.FAMILY,
    falcon.FAMILY,
    falcon.FAMILY_40B,
)


def known() -> tuple[Family, ...]:
    """All families this version knows."""
    return _FAMILIES


def find(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``, by ``model_type``, else by ``architectures``.

    Raises:
        ModelError: nothing matches; names the known ones. ``auto_map`` is never followed: no code comes from a model.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    for family in _FAMILIES:
        if model_type in family.model_types and family.matches(config):
            return family
    for family in _FAMILIES:
        if model_type is None and set(architectures) & set(family.architectures) and family.matches(config):
            return family
    names = list(dict.fromkeys(name for family in _FAMILIES for name in family.model_types))
    near = difflib.get_close_matches(str(model_type), names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ModelError(
        f"unknown architecture: model_type {model_type!r}, architectures {architectures!r}",
        where="config.json",
        fix=f"{hint}known model types: {', '.join(names)} (see `oarsmith models`)",
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model inside an image and text model's; any other config as it is."""
    inner = config.get("text_config")
    for family in _FAMILIES:
        if config.get("model_type") in family.inside and isinstance(inner, Mapping):
            own = {"model_type": family.model_types[0], "architectures": list(family.architectures[:1])}
            shared = (
                *("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "transformers_version"),
                "quantization_config",
            )
            return {**inner, **{key: config[key] for key in shared if config.get(key) is not None}, **own}
    return dict(config)


def build_spec(config: Mapping[str, Any]) -> tuple[Family, DecoderSpec]:
    """The family and the decoder spec of a config; of a scoring model's, with the head that scores.

    Raises:
        ModelError: no known family, or values that no model of it has.
    """
    family, num_scores = find(config), scoring.num_scores(config)
    spec = family.build(config)
    return family, spec if num_scores is None else scoring.with_scores(spec, num_scores)
