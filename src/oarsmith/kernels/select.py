"""Which implementation of the fast operations runs: the compiled kernels or their PyTorch twins."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from oarsmith.compiling import BuildError
from oarsmith.errors import ConfigError
from oarsmith.kernels.build import load_library

Backend = Literal["auto", "native", "torch"]

_log = logging.getLogger(__name__)
_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}
_SIGNATURES = {
    "rms_forward": "pppplllfi",
    "rms_backward": "pppppplllii",
    "rope": "ppppllllllfi",
    "gated_forward": "pplli",
    "gated_backward": "ppplli",
    "softmax": "pplllllllfiplfpl",
    "softmax_backward": "ppppllff",
    "cross_entropy": "pppppplliff",
    "adamw_split": "ppppplffffffff",
    "adam8bit": "ppppppplppppppffffffff",
    "subtract": "ppplf",
    "quantize_rows": "pppplll",
    "dequantize_rows": "ppppplll",
    "decode4": "pppppllllll",
    "decode8": "pppppllllll",
    "encode4": "ppppplll",
}
# In bf16 only, and only on CPUs that multiply pairs of bf16.
_DOCUMENT_ATTENTION = {
    "document_attention": "ppppp" + "plplllllf",
    "document_attention_backward": "ppppppppp" + "plplllllf",
}
# In bf16 only, and only with AMX.
_TILE_PRODUCTS = {
    "low_rank_product": "pppppppp" + "lllll",
    "int8_product": "ppppppppp" + "llllll",
    "thin_product": "pppp" + "lll",
}


class Library:
    """The compiled kernels with their argument types set; tensors are passed by address.

    Attributes:
        has_document_attention: whether this CPU has what that kernel is made of.
        has_tile_products: the same of the products with tiles.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            for suffix in _SUFFIX.values():
                self._functions[name, suffix] = self._bind(handle, f"{name}_{suffix}", signature)
        self._functions["adamw", "f32"] = self._bind(handle, "adamw_f32", "pppplffffffff")
        self._functions["shrink_losses", "f32"] = self._bind(handle, "shrink_losses_f32", "ppppppllllff")
        self._functions["fit_sums", "f32"] = self._bind(handle, "fit_sums_f32", "pppppplllff")
        self._functions["round_columns", "f32"] = self._bind(handle, "round_columns_f32", "pppppppppllff")
        self._functions["sum_of_squares", "bf16"] = self._bind(handle, "sum_of_squares_bf16", "plp")
        self.has_document_attention = bool(handle["document_attention_available"]())
        self.has_tile_products = bool(handle["tile_products_available"]())
        for name, signature in (_DOCUMENT_ATTENTION | _TILE_PRODUCTS).items():
            self._functions[name, "bf16"] = self._bind(handle, f"{name}_bf16", signature)

    @staticmethod
    def _bind(handle: ctypes.CDLL, name: str, signature: str) -> ctypes._NamedFuncPointer:
        try:
            function = handle[name]
        except AttributeError as error:
            raise BuildError(f"the compiled C++ kernels are damaged: {error}") from error
        function.argtypes = [_TYPES[letter] for letter in signature]
        function.restype = None
        return function

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | float | int | None) -> None:
        """Run a kernel for tensors of ``dtype``. Contiguity is the caller's duty."""
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        self._functions[name, _SUFFIX[dtype]](*values)


@dataclass
class _Choice:
    backend: Backend = "auto"
    library: Library | None = None
    tried: bool = False
    reason: str = ""


_choice = _Choice()


def native_for(*tensors: Tensor) -> Library | None:
    """The compiled kernels when they can work on these tensors (CPU, one dtype of fp32 or bf16), else None."""
    if _choice.backend == "torch" or torch.compiler.is_compiling():
        return None
    first = tensors[0]
    if first.dtype not in _SUFFIX or any(t.device.type != "cpu" or t.dtype != first.dtype for t in tensors):
        return None
    return library()


def triton_for(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernel's module when it can work on these tensors (GPU, one dtype, no gradients), else None."""
    if _choice.backend == "torch" or torch.compiler.is_compiling() or not _on_gpu(tensors[0]):
        return None
    dtype = tensors[0].dtype
    if dtype not in _GPU_DTYPES or any(not _on_gpu(t) or t.dtype != dtype for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return _triton_attention()


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@functools.cache
def _triton_attention() -> ModuleType | None:
    try:
        from oarsmith.kernels import triton_attention
    except ImportError as error:
        _log.warning("attention in plain PyTorch, not by the Triton kernel: %s", error)
        return None
    return triton_attention


def library() -> Library | None:
    """The compiled kernels, built on first use; None when they cannot be had and ``auto`` allows doing without."""
    if _choice.backend == "torch":
        return None
    if not _choice.tried:
        _choice.tried = True
        try:
            _choice.library = Library(load_library())
        except BuildError as error:
            _choice.reason = str(error)
    if _choice.library is None and _choice.backend == "native":
        raise ConfigError(_choice.reason, where="kernels=native", fix="install g++, or set kernels to auto or torch")
    return _choice.library


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Choose the implementation inside a ``with`` block."""
    before, _choice.backend = _choice.backend, backend
    try:
        library()
        yield
    finally:
        _choice.backend = before


def describe() -> str:
    """One line for the log: which implementation is in use, and why if it is not the fast one."""
    if _choice.backend == "torch":
        return "PyTorch operations (as chosen)"
    if library() is not None:
        return "compiled C++ kernels on the CPU"
    return f"PyTorch operations: {_choice.reason}"
