"""What ``config.json`` says of compressed-tensors files: groups of modules, and how each group's numbers are made.

Fields: QuantizationConfig, QuantizationScheme and QuantizationArgs of the package compressed-tensors 0.19.
"""

from __future__ import annotations

from typing import Any

from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.layouts.contents import Contents
from oarsmith.quantize.scheme import MapScheme

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_VERSION = "0.19.0"


def format_of(scheme: MapScheme) -> str:
    """How a map's weight is stored: int8 tensors belong to maps whose inputs are integers too."""
    assert scheme.weights is not None
    if scheme.weights.code == "e4m3":
        return FLOAT
    return INT if scheme.activations is not None and scheme.activations.code == "int" else PACKED


def quantization_config(contents: Contents) -> dict[str, Any]:
    """``quantization_config``. The group of most maps is that of all linear modules; the others name theirs.

    Readers look for a module's name before its class, so that the order of groups does not matter.
    """
    groups: dict[MapScheme, list[str]] = {}
    for one in contents.maps.values():
        groups.setdefault(one.scheme, []).append(one.stem)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    written = {
        f"group_{number}": _group(scheme, ["Linear"] if number == 0 else stems)
        for number, (scheme, stems) in enumerate(ordered)
    }
    formats = {group["format"] for group in written.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": written,
        "ignore": list(contents.kept),
        "kv_cache_scheme": None if contents.scheme.cache is None else _cache(contents.scheme.cache),
        "version": _VERSION,
    }


def _group(scheme: MapScheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.weights is not None
    return {
        "format": format_of(scheme),
        "targets": targets,
        "weights": _weights(scheme.weights),
        "input_activations": None if scheme.activations is None else _inputs(scheme.activations),
        "output_activations": None,
    }


def _weights(grid: Grid) -> dict[str, Any]:
    if grid.rows is None and grid.group is None:
        strategy = "tensor"
    elif grid.rows != 1:
        strategy = "block"
    else:
        strategy = "channel" if grid.group is None else "group"
    return _arguments(grid.code, grid.bits) | {
        "symmetric": grid.symmetric or grid.code == "e4m3",
        "strategy": strategy,
        "group_size": grid.group if strategy == "group" else None,
        "block_structure": [grid.rows, grid.group] if strategy == "block" else None,
        "dynamic": False,
        "actorder": None,
    }


def _inputs(activations: Activations) -> dict[str, Any]:
    strategy = "tensor" if activations.static else "token" if activations.group is None else "group"
    return _arguments(activations.code, 8) | {
        "symmetric": True,
        "strategy": strategy,
        "group_size": activations.group if strategy == "group" else None,
        "dynamic": not activations.static,
    }


def _cache(cache: CacheScheme) -> dict[str, Any]:
    return _arguments(cache.code, 8) | {
        "symmetric": True,
        "strategy": "attn_head" if cache.per_head else "tensor",
        "dynamic": False,
    }


def _arguments(code: str, bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float" if code == "e4m3" else "int"}
