"""From configuration keys to what is done to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from oarsmith.config.quantize import QuantizeConfig
from oarsmith.quantize.activations import Method
from oarsmith.quantize.autoround import AutoRound
from oarsmith.quantize.awq import AWQ
from oarsmith.quantize.choose import SCHEMES
from oarsmith.quantize.gptq import GPTQ
from oarsmith.quantize.model import Recipe
from oarsmith.quantize.prepare import Preparation
from oarsmith.quantize.rounding import Method as RoundingMethod
from oarsmith.quantize.rounding import Rounding
from oarsmith.quantize.scheme import Scheme
from oarsmith.quantize.search import Search
from oarsmith.quantize.smooth import Piecewise


def recipe_of(config: QuantizeConfig, scheme: Scheme, folder: Path | None) -> Recipe:
    """What is done to the model, with what is not given chosen for the scheme."""
    cache_method: Method = "avg" if config.cachekv_quant_method.startswith("avg") else "abs_max"
    return Recipe(
        scheme=scheme,
        rounding=_rounding(config),
        act_method=config.act_quant_method,
        cache_method=cache_method,
        preparation=_preparation(config),
        rotate=config.seed if config.rotate else None,
        folder=folder,
    )


# AWQ rounds to nearest; what it is lies in the factors.
_METHODS: dict[str, RoundingMethod] = {
    "rtn": "rtn",
    "awq": "rtn",
    "gptq": "gptq",
    "gptaq": "gptaq",
    "hqq": "hqq",
    "autoround": "autoround",
}


def _rounding(config: QuantizeConfig) -> Rounding:
    algorithm = config.chosen_algorithm
    method = _METHODS[algorithm]
    kind = config.scale_search
    if kind == "auto":
        plain = SCHEMES[config.scheme][:2] in ((8, "int"), (4, "nf4"))
        kind = "range" if plain or config.calibration is None else "weighted"
    search = None if kind == "range" else Search()
    own = GPTQ(
        damping=config.damp_percent,
        order="none" if not config.act_order else "columns" if config.static_groups else "groups",
        static=config.static_groups,
        search=search,
        alpha=config.gptaq_alpha,
    )
    return Rounding(
        method=method,
        search=search,
        weighted=kind == "weighted",
        clip=AWQ() if config.auto_clip else None,
        gptq=own,
        autoround=AutoRound(steps=config.autoround_steps, seed=config.seed),
    )


def _preparation(config: QuantizeConfig) -> Preparation:
    factors: Literal["none", "smoothquant", "piecewise", "awq"]
    if config.chosen_algorithm == "awq":
        factors = "awq"
    elif config.smooth == "auto":
        factors = "piecewise" if config.calibration is not None and SCHEMES[config.scheme][2] == "int" else "none"
    else:
        factors = config.smooth
    return Preparation(
        factors=factors,
        everywhere=factors in ("awq", "piecewise") if config.smooth_all_linears is None else config.smooth_all_linears,
        shift=config.shift,
        alpha=config.smooth_alpha,
        piecewise=Piecewise(
            pieces=config.smooth_k_piece,
            per_token=config.act_quant == "dynamic",
            search_pieces=config.smooth_search_piece,
            alpha=(config.search_alpha_min, config.search_alpha_max),
            scale=(config.search_scale_min, config.search_scale_max),
        ),
    )
