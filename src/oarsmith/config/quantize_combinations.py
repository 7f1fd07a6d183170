"""Keys of ``oarsmith quantize`` beside values with which they mean nothing or cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .impossible import Impossible
from .quantize import QuantizeConfig

_WEIGHT_ONLY = frozenset({"w8a16", "w4a16", "w3a16", "w2a16"})


# Keys, or the beginnings of keys -> whether they have an effect, and what they need.
_USED: dict[str, tuple[Callable[[QuantizeConfig], bool], str]] = {
    "damp_percent": (lambda c: c.chosen_algorithm in ("gptq", "gptaq"), "algorithm gptq or gptaq"),
    "act_order": (lambda c: c.chosen_algorithm in ("gptq", "gptaq"), "algorithm gptq or gptaq"),
    "static_groups": (lambda c: c.chosen_algorithm in ("gptq", "gptaq"), "algorithm gptq or gptaq"),
    "gptaq_alpha": (lambda c: c.chosen_algorithm == "gptaq", "algorithm gptaq"),
    "autoround_steps": (lambda c: c.chosen_algorithm == "autoround", "algorithm autoround"),
    "auto_clip": (lambda c: c.chosen_algorithm in ("awq", "rtn"), "algorithm awq or rtn"),
    "smooth_alpha": (lambda c: c.smooth == "smoothquant", "smooth smoothquant"),
    "smooth_k_piece": (lambda c: c.smooth in ("auto", "piecewise"), "smooth piecewise"),
    "smooth_search_piece": (lambda c: c.smooth in ("auto", "piecewise"), "smooth piecewise"),
    "search_": (lambda c: c.smooth in ("auto", "piecewise"), "smooth piecewise"),
    "scale_search": (
        lambda c: c.chosen_algorithm not in ("hqq", "autoround") and not c.auto_clip,
        "an algorithm that searches scales: rtn, gptq, gptaq or awq, and no auto_clip",
    ),
    "group_size": (lambda c: not c.scheme.startswith("fp"), "a scheme of integers or nf4"),
    "symmetric": (lambda c: not c.scheme.startswith("fp"), "a scheme of integers"),
    "act_quant_method": (lambda c: c.act_quant == "static", "act_quant static"),
    "on_over_budget": (lambda c: c.kl_budget is not None, "kl_budget"),
    "act_quant": (lambda c: c.scheme not in _WEIGHT_ONLY, "a scheme that rounds activations"),
    "cachekv_quant_method": (lambda c: c.scheme.endswith("c8"), "a scheme with c8"),
}


def _in_vain(start: str, used: Callable[[QuantizeConfig], bool], need: str) -> Impossible[Any]:
    fields = QuantizeConfig.model_fields
    keys = [key for key in fields if (key.startswith(start) if start.endswith("_") else key == start)]

    def given(c: QuantizeConfig) -> bool:
        values = dict(c)
        return not used(c) and any(values[key] != fields[key].default for key in keys)

    return Impossible(QuantizeConfig, given, f"{keys[0]} is given, but has no effect without {need}", "remove it")


QUANTIZE: tuple[Impossible[Any], ...] = (
    *(_in_vain(start, used, need) for start, (used, need) in _USED.items()),
    Impossible(
        QuantizeConfig,
        lambda c: c.device == "cuda",
        "models are quantized on the CPU in this version",
        "leave device out",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.algorithm == "awq" and c.smooth in ("smoothquant", "piecewise"),
        "awq finds factors of its own, and smooth {smooth} asks for others",
        "give only one of them",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.algorithm == "hqq" and (c.symmetric is True or c.scheme[:2] in ("w8", "fp")),
        "hqq fits zeros, which symmetric grids have none of",
        "choose fewer than 8 bits without symmetric, or another algorithm",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: (
            c.scheme == "nf4" and (c.chosen_algorithm not in ("rtn", "awq") or c.auto_clip or c.budget is not None)
        ),
        "nf4 has a table of numbers and a scale for each block, to which weights are rounded as they are",
        "choose algorithm rtn or awq, without auto_clip and budget",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.scheme == "nf4" and (c.scale_search not in ("auto", "range") or c.symmetric is False),
        "nf4's scales are the largest magnitudes of its blocks",
        "leave scale_search and symmetric out",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.algorithm == "autoround" and c.scheme.startswith("fp"),
        "autoround learns whole numbers, and {scheme} has none",
        "choose another algorithm",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.search_alpha_min > c.search_alpha_max or c.search_scale_min > c.search_scale_max,
        "the least value of a search is above its largest",
        "exchange them",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.budget is not None and (c.kl_budget is not None or c.scheme.startswith("fp")),
        "budget chooses the bits of integers and is a limit of its own",
        "leave out kl_budget, and choose a scheme of integers",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: (
            c.budget is not None and (c.layout in ("gguf", "awq", "fp8", "paddle") or c.output_dir.endswith(".gguf"))
        ),
        "this layout has a place for one number of bits only, and budget chooses several",
        "use compressed-tensors or gptq_v2",
    ),
    Impossible(
        QuantizeConfig,
        lambda c: c.kl_budget is not None and c.calibration is None and c.proof_text is None,
        "kl_budget cannot be checked without a text",
        "add proof_text",
    ),
)
