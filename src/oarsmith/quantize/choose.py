"""From configuration keys to schemes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from oarsmith.config.adapter_lowbit import QatKeys
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.errors import ConfigError
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.fake import FakeMap
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.scheme import MapScheme, Scheme

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
    asked = _Asked(
        scales=scales, group_size=config.group_size, symmetric=config.symmetric, static=config.act_quant == "static"
    )
    default = _map_scheme(config.scheme, asked)
    overrides: dict[str, MapScheme] = {}
    for pattern, name in config.overrides.items():
        if name == "none":
            overrides[pattern] = MapScheme(weights=None)
        elif name in SCHEMES:
            overrides[pattern] = _map_scheme(name, asked)
        else:
            known = ", ".join(("none", *SCHEMES))
            raise ConfigError(f"there is no scheme {name!r}", where=f"overrides: {pattern}", fix=f"use one of {known}")
    skipped = {f"*{part}*": MapScheme(weights=None) for part in config.skip_list_names}
    searched = {
        pattern: MapScheme(weights=_grid(count, asked), activations=default.activations)
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


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is said of all schemes alike."""

    scales: Scales
    group_size: int | None
    symmetric: bool | None = None
    static: bool = False


def _map_scheme(name: str, asked: _Asked) -> MapScheme:
    bits, code, activations = SCHEMES[name]
    scales, static, block = asked.scales, asked.static, name == "fp8_block"
    how = None
    if activations is not None:
        how = Activations(code=activations, static=static, group=_BLOCK if block and not static else None)
    if code == "int":
        return MapScheme(weights=_grid(bits, asked), activations=how)
    if code == "nf4":
        return MapScheme(weights=replace(_grid(bits, asked), code=code, symmetric=True))
    # Static activations go with one scale for the weight: that is what readers multiply in one piece.
    rows = _BLOCK if block else None if static else 1
    grid = Grid(code="e4m3", bits=8, group=_BLOCK if block else None, rows=rows, symmetric=True, scales=scales)
    return MapScheme(weights=grid, activations=how)


def _grid(bits: int, asked: _Asked) -> Grid:
    group = asked.group_size
    if group is None:
        group = -1 if bits == 8 else _GROUP
    symmetric = bits == 8 if asked.symmetric is None else asked.symmetric
    return Grid(bits=bits, group=None if group == -1 else group, symmetric=symmetric, scales=asked.scales)


def fake_of(keys: QatKeys) -> FakeMap | None:
    """What ``qat`` asks for: the maps as `scheme_of` gives them, with scales in bf16."""
    if keys.qat == "none":
        return None
    return FakeMap(scheme=_map_scheme(keys.qat, _Asked(scales="bf16", group_size=keys.qat_group_size)))


def _cache(config: QuantizeConfig) -> CacheScheme | None:
    if not config.scheme.endswith("c8"):
        return None
    code: Literal["int", "e4m3"] = "e4m3" if config.scheme.startswith("fp8") else "int"
    return CacheScheme(code=code, per_head=config.cachekv_quant_method.endswith("headwise"))
