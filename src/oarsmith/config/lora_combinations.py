"""Keys of ``adapter_lora.py`` beside values with which they mean nothing, and methods that need more of a step."""

from __future__ import annotations

from typing import Any

from .adapter_lora import LORA_FAMILY, LoraFamilyKeys
from .adapter_virtual import UNMERGEABLE
from .adapters import AdapterKeys
from .impossible import Impossible
from .sft import SftConfig

# Key, or the beginning of keys -> the methods that use it.
_USED_BY = {
    "lora_plus_scale": LORA_FAMILY,
    "lora_start": frozenset({"lora"}),
    "pissa_": frozenset({"pissa"}),
    "loraga_": frozenset({"loraga"}),
    "adalora_": frozenset({"adalora"}),
}


def _in_vain(start: str, methods: frozenset[str]) -> Impossible[Any]:
    keys = [key for key in LoraFamilyKeys.model_fields if key.startswith(start)]
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} or {keys[-1]}"
    one = len(methods) == 1
    use = f"adapter_type {next(iter(methods))}" if one else "an adapter with LoRA's matrices"

    def given(c: AdapterKeys) -> bool:
        values, fields = dict(c), AdapterKeys.model_fields
        return c.adapter_type not in methods and any(values[key] != fields[key].default for key in keys)

    fix = f"add {use}, or remove it" if one else "choose adapter_type lora, or remove it"
    return Impossible(AdapterKeys, given, f"{listed} is given, but has no effect without {use}", fix)


LORA: tuple[Impossible[Any], ...] = (
    *(_in_vain(start, methods) for start, methods in _USED_BY.items()),
    Impossible(
        AdapterKeys,
        lambda c: c.qat != "none" and c.adapter_type in UNMERGEABLE,
        "qat computes what the merged and quantized map will be, and {adapter_type} cannot be merged",
        "choose another adapter_type, or set qat to none",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.qat != "none" and c.lora_dropout > 0,
        "qat computes what the merged map will be, which has no dropout",
        "set lora_dropout to 0",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.qat == "none" and c.qat_group_size is not None,
        "qat_group_size is given, but has no effect without qat",
        "add qat, or remove it",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.adapter_type == "adalora" and c.rslora,
        "rslora is given, but has no effect with adalora, whose scale is lora_alpha over its first rank",
        "remove it",
    ),
    Impossible(
        AdapterKeys,
        lambda c: c.adapter_type == "adalora" and c.adalora_init_rank is not None and c.adalora_init_rank < c.lora_rank,
        "adalora begins with rank {adalora_init_rank} and would end with more, lora_rank {lora_rank}",
        "raise adalora_init_rank",
    ),
    Impossible(
        SftConfig,
        lambda c: c.adapter_type in ("lorapro", "adalora") and c.optimizer_in_backward,
        "{adapter_type} looks at the gradients of all its matrices together, and optimizer_in_backward frees each at "
        "once",
        "remove optimizer_in_backward",
    ),
)
