"""The layouts by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from oarsmith.errors import ConfigError
from oarsmith.quantize.layouts.awq import Awq
from oarsmith.quantize.layouts.base import Layout
from oarsmith.quantize.layouts.bitsandbytes import BitsAndBytes
from oarsmith.quantize.layouts.compressed import CompressedTensors
from oarsmith.quantize.layouts.contents import Contents
from oarsmith.quantize.layouts.fp8 import NativeFp8
from oarsmith.quantize.layouts.gptq import Gptq
from oarsmith.quantize.layouts.paddle import Paddle

LAYOUTS: Mapping[str, Callable[[Contents], Layout]] = {
    "compressed-tensors": lambda contents: CompressedTensors(),
    "gptq": lambda contents: Gptq(plain_zeros=False),
    "gptq_v2": lambda contents: Gptq(plain_zeros=True),
    "awq": lambda contents: Awq(),
    "fp8": lambda contents: NativeFp8(),
    "paddle": Paddle,
    "bitsandbytes": BitsAndBytes,
}
"""Model directories; GGUF is a file of its own (`oarsmith.quantize.layouts.gguf.open_gguf`)."""


def layout_of(name: str, contents: Contents) -> Layout:
    """The layout of this name for a model, which it can hold.

    Raises:
        ConfigError: there is none of this name.
        OarsmithError: it cannot hold the model.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"unknown layout {name!r}", fix=f"use one of {', '.join(LAYOUTS)}, gguf")
    layout = LAYOUTS[name](contents)
    layout.check(contents)
    return layout
