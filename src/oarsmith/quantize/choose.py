"""From configuration keys to schemes and recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from oarsmith.config.adapter_lowbit import QatKeys
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.errors import ConfigError
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.activations import Method
from oarsmith.quantize.autoround import AutoRound
from oarsmith.quantize.awq import AWQ
from oarsmith.quantize.fake import FakeMap
from oarsmith.quantize.gptq import GPTQ
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.model import Recipe
from oarsmith.quantize.prepare import Preparation
from oarsmith.quantize.rounding import Method as RoundingMethod
from oarsmith.quantize.rounding import Rounding
from oarsmith.quantize.scheme import MapScheme, Scheme
from oarsmith.quantize.search import Search
from oarsmith.quantize.smooth import Piecewise

Scales = Literal["fp32", "bf16", "fp16"]
_GROUP = 64
_BLOCK = 128
_GGUF_GROUP = 32


def scheme_of(
    config: QuantizeConfig, scales: Scales, bits: dict[str, int] | None = None, *, gguf: bool = False
) -> Scheme:
    """What every map gets.

    Args:
        scales: what the layout stores scales as.
        bits: by patterns of maps, in place of the scheme's, where they have been searched.
        gguf: on the grids of GGUF's Q8_0 and Q4_0: symmetric, groups of 32.

    Raises:
        ConfigError: an override that is no scheme.
    """
    if gguf:
        config = _for_gguf(config)
    default = _map_scheme(config, config.scheme, scales)
    overrides: dict[str, MapScheme] = {}
    for pattern, name in config.overrides.items():
        if name == "none":
            overrides[pattern] = MapScheme(weights=None)
        elif name in SCHEMES:
            overrides[pattern] = _map_scheme(config, name, scales)
        else:
            known = ", ".join(("none", *SCHEMES))
            raise ConfigError(f"there is no scheme {name!r}", where=f"overrides: {pattern}", fix=f"use one of {known}")
    skipped = {f"*{part}*": MapScheme(weights=None) for part in config.skip_list_names}
    searched = {
        pattern: MapScheme(weights=_grid(config, count, scales), activations=default.activations)
        for pattern, count in (bits or {}).items()
    }
    return Scheme(name=config.scheme, default=default, overrides=skipped | overrides | searched, cache=_cache(config))


def _for_gguf(config: QuantizeConfig) -> QuantizeConfig:
    if config.scheme not in ("w8a16", "w4a16"):
        raise ConfigError(
            f"GGUF files have no place for scheme {config.scheme}",
            where="layout",
            fix="use w8a16 (Q8_0) or w4a16 (Q4_0)",
        )
    if config.group_size not in (None, _GGUF_GROUP) or config.symmetric is False:
        raise ConfigError(
            f"GGUF's Q8_0 and Q4_0 have symmetric groups of {_GGUF_GROUP}",
            where="group_size",
            fix="leave group_size and symmetric out",
        )
    return config.model_copy(update={"group_size": _GGUF_GROUP, "symmetric": True})


SCHEMES: dict[str, tuple[int, Literal["int", "e4m3", "nf4"], Literal["int", "e4m3"] | None]] = {
    "w8a16": (8, "int", None),
    "w4a16": (4, "int", None),
    "w3a16": (3, "int", None),
    "w2a16": (2, "int", None),
    "w8a8": (8, "int", "int"),
    "w8a8c8": (8, "int", "int"),
    "w4a8": (4, "int", "int"),
    "fp8": (8, "e4m3", "e4m3"),
    "fp8c8": (8, "e4m3", "e4m3"),
    "fp8_block": (8, "e4m3", "e4m3"),
    "nf4": (4, "nf4", None),
}
"""Bits and kind of weights, and kind of activations, by the scheme's name."""


def _map_scheme(config: QuantizeConfig, name: str, scales: Scales) -> MapScheme:
    bits, code, activations = SCHEMES[name]
    static, block = config.act_quant == "static", name == "fp8_block"
    how = None
    if activations is not None:
        how = Activations(code=activations, static=static, group=_BLOCK if block and not static else None)
    if code == "int":
        return MapScheme(weights=_grid(config, bits, scales), activations=how)
    if code == "nf4":
        grid = _grid(config, bits, scales)
        return MapScheme(weights=replace(grid, code=code, symmetric=True))
    # Static activations go with one scale for the weight: that is what readers multiply in one piece.
    rows = _BLOCK if block else None if static else 1
    grid = Grid(code="e4m3", bits=8, group=_BLOCK if block else None, rows=rows, symmetric=True, scales=scales)
    return MapScheme(weights=grid, activations=how)


def _grid(config: QuantizeConfig, bits: int, scales: Scales) -> Grid:
    group = config.group_size
    if group is None:
        group = -1 if bits == 8 else _GROUP
    symmetric = bits == 8 if config.symmetric is None else config.symmetric
    return Grid(bits=bits, group=None if group == -1 else group, symmetric=symmetric, scales=scales)


def fake_of(keys: QatKeys) -> FakeMap | None:
    """What ``qat`` asks for: the maps as `scheme_of` gives them, with scales in bf16."""
    if keys.qat == "none":
        return None
    values = {"model_name_or_path": "", "output_dir": "", "scheme": keys.qat, "group_size": keys.qat_group_size}
    config = QuantizeConfig.model_validate(values)
    return FakeMap(scheme=_map_scheme(config, keys.qat, "bf16"))


def _cache(config: QuantizeConfig) -> CacheScheme | None:
    if not config.scheme.endswith("c8"):
        return None
    code: Literal["int", "e4m3"] = "e4m3" if config.scheme.startswith("fp8") else "int"
    return CacheScheme(code=code, per_head=config.cachekv_quant_method.endswith("headwise"))


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
