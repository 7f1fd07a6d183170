"""All GGUF families, and which of them a file or a config.json belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from oarsmith.checkpoint.gguf import (
    arch_gemma,
    arch_glm,
    arch_gpt,
    arch_llama,
    arch_mla,
    arch_moe,
)
from oarsmith.checkpoint.gguf.family import Config, Family
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.errors import CheckpointError

# Where several families share an architecture, the one that looks for a sign comes before the one that takes the rest.
FAMILIES: tuple[Family, ...] = (
    *arch_moe.FAMILIES,
    *arch_llama.FAMILIES,
    *arch_gemma.FAMILIES,
    *arch_glm.FAMILIES,
    *arch_gpt.FAMILIES,
    *arch_mla.FAMILIES,
)
_UNKNOWN: Mapping[str, str] = {
    "opt": "llama.cpp has no architecture for OPT",
    "yuan": "llama.cpp has no architecture for Yuan 2 (localized filtering attention)",
    "yuan2": "llama.cpp has no architecture for Yuan 2 (localized filtering attention)",
}


def family_of_file(metadata: Metadata) -> Family:
    """The family of a GGUF file.

    Raises:
        CheckpointError: an architecture without a table here.
    """
    found = [family for family in FAMILIES if family.arch == metadata.architecture]
    for family in found:
        if family.matches(metadata):
            return family
    known = dict.fromkeys(family.arch for family in FAMILIES)
    raise CheckpointError(
        f"unknown GGUF architecture {metadata.architecture!r}; known are {', '.join(known)}",
        where=str(metadata.file.path),
        fix="convert from the model's Hugging Face directory instead",
    )


def family_of_config(config: Config) -> Family:
    """The family that writes a model directory.

    Raises:
        CheckpointError: a model type that llama.cpp does not know, or no table for it here.
    """
    model_type = str(config.get("model_type", ""))
    what = _UNKNOWN.get(model_type)
    if model_type == "chatglm" and (config.get("position_encoding_2d", False) or "inner_hidden_size" in config.values):
        what = "llama.cpp has no architecture for ChatGLM-6B (two-row positions); it knows ChatGLM2 and 3"
    if what is None:
        for family in FAMILIES:
            if family.model_type == model_type:
                return family
        what = f"no GGUF table for the model type {model_type!r}"
    known = sorted(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"{what}; GGUF is written for {', '.join(known)}",
        where=f"{config.where}: model_type",
        fix="keep this model in the Hugging Face layout",
    )
