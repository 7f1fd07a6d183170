"""The compiled library with its argument types set."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from oarsmith.native.library import load
from oarsmith.native.structs import SIZES

_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "-": None}
# Result, then arguments.
_SIGNATURES = {
    "native_block_bytes": "l il",
    "native_pack": "- iipplllpi",
    "native_pack_codes": "- ipppplllpi",
    "native_struct_sizes": "- p",
    "native_step_new": "p p",
    "native_step_free": "- p",
    "native_step_run": "i ppp",
    "native_step_logits": "i plpp",
    "native_step_sample": "i plp",
    "native_step_copy_page": "- pll",
    "native_step_copy_states": "- pll",
}


@cache
def bindings() -> ctypes.CDLL:
    """The library for this CPU.

    Raises:
        BuildError: it cannot be had.
        OarsmithError: ``$OARSMITH_ISA`` names one that this CPU cannot run.
    """
    library = load()
    for name, signature in _SIGNATURES.items():
        result, arguments = signature.split()
        function = library[name]
        function.restype = _TYPES[result]
        function.argtypes = [_TYPES[letter] for letter in arguments]
        setattr(library, name, function)
    sizes = (ctypes.c_int64 * len(SIZES))()
    library.native_struct_sizes(sizes)
    assert tuple(sizes) == SIZES, (tuple(sizes), SIZES)
    return library
