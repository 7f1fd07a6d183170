"""torch.compile on the parts of a model that see nothing but tensors: feed-forward parts and norms.

A whole block would be compiled anew for every pack: its spans are Python numbers, each of which becomes a guard. These
parts see [T, D] alone, so one graph each serves every layer and every pack. Attention keeps its kernel.
"""

from __future__ import annotations

import os
import shutil

import torch

from oarsmith.compiling import cache_directory
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.mlp import FeedForward, GatedFeedForward
from oarsmith.models.norm import LayerNorm, RMSNorm

# Graphs of one function before PyTorch gives up on it. Its 8 is too few for norms over tokens and over heads, with and
# without gradients, of one token, up to 4,096 and beyond (the CPU's code differs there); their number has this bound.
_MOST_GRAPHS = 32
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_model(model: Decoder) -> None:
    """Compile ``model`` in place; the code is made at the first steps and kept for later runs.

    It lies under the directory of the compiled kernels (``$OARSMITH_CACHE``), unless ``TORCHINDUCTOR_CACHE_DIR`` says
    otherwise. The norm after the blocks stays as it is: the number of tokens it sees may be 0 or 1.

    Raises:
        ConfigError: there is no C++ compiler to make code for this CPU.
    """
    if model.device.type == "cpu" and not has_compiler():
        raise ConfigError(
            "torch.compile needs a C++ compiler on the CPU, and there is none",
            where="torch_compile",
            fix="install g++, or set torch_compile to false",
        )
    choose_cache()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for block in model.blocks():
        for module in block.modules():
            if isinstance(module, (GatedFeedForward, FeedForward, RMSNorm, LayerNorm)):
                module.compile(dynamic=True)


def has_compiler() -> bool:
    """Whether PyTorch finds a C++ compiler."""
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


def choose_cache() -> None:
    """Say where compiled graphs are kept.

    PyTorch writes its own default, which a restart of the machine empties, into the variable when it first looks.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds to import, for runs that compile

    if os.environ.get(_CACHE) in (None, default_cache_dir()):
        os.environ[_CACHE] = str(cache_directory() / "inductor")
