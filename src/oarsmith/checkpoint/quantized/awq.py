"""AWQ, version gemm: ``qweight`` [in, out / 8] int32 with 8 numbers a word along out, ``qzeros`` [G, out / 8] likewise,
``scales`` [G, out]. w = (number - zero) * scale; the numbers of a word are columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from torch import Tensor

from oarsmith.checkpoint.quantized.base import CodedSource, Config, Packed
from oarsmith.checkpoint.quantized.integers import (
    float_kind,
    group_size,
    integer_weight,
    numbers_on_grid,
    pack_words,
    stems,
    unpack_words,
)
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError

_BITS = 4
_A_WORD = 32 // _BITS
_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where columns 0, 1, ... lie in a word
_IN_WORD = [0, 2, 4, 6, 1, 3, 5, 7]  # which columns lie in it


class AwqSource(CodedSource):
    """``X.weight`` from ``X.qweight``, ``X.qzeros`` and ``X.scales``."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        bits = quantization.get("bits", quantization.get("w_bit", _BITS))
        version = quantization.get("version", "gemm")
        if bits != _BITS or str(version).lower() != "gemm":
            raise CheckpointError(
                f"AWQ with {bits} bits, version {version!r} is not read",
                where="config.json",
                fix="use a checkpoint with 4 bits, version gemm",
            )
        self._groups: dict[str, int] = {}
        for stem in stems(inner, ".qweight"):
            in_features, words = self._shape(f"{stem}.qweight", "I32", 2)
            groups, zero_words = self._shape(f"{stem}.qzeros", "I32", 2)
            scales = self._shape(f"{stem}.scales", ("F16", "BF16", "F32"), 2)
            out = words * _A_WORD
            group = group_size(in_features, groups, quantization.get("group_size", quantization.get("q_group_size")))
            if group is None or zero_words != words or scales != (groups, out):
                what = f"shape {(in_features, words)} does not fit zeros {(groups, zero_words)} and scales {scales}"
                raise self._misfit(f"{stem}.qweight", what)
            self._groups[f"{stem}.weight"] = group
            kind = float_kind(config, inner.dtypes[f"{stem}.scales"])
            parts = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales"))
            self._replace(f"{stem}.weight", (out, in_features), kind, *parts)

    def scale_name(self, name: str) -> str:
        return name.removesuffix("weight") + "scales"

    def packed(self, name: str) -> Packed:
        stem = name.removesuffix("weight")
        numbers_OI, zeros_OG = (_in_order(self._inner.read(stem + part)).t() for part in ("qweight", "qzeros"))
        scales_OG = self._inner.read(stem + "scales").t()
        return Packed(integer_weight(numbers_OI.contiguous(), scales_OG, zeros_OG, _BITS, self._groups[name]))

    def code_names(self) -> dict[str, str]:
        return {name.removesuffix("weight") + "qweight": name for name in self._groups}

    def recoded(self, name: str, weight_OI: Tensor) -> Tensor:
        return awq_words(numbers_on_grid(self._checked(name), weight_OI, _BITS).t())


def awq_words(numbers: Tensor) -> Tensor:
    """Numbers [.., O] as words [.., O / 8]."""
    return pack_words(numbers.unflatten(-1, (-1, _A_WORD))[..., _IN_WORD].flatten(-2), _BITS)


def _in_order(words: Tensor) -> Tensor:
    return unpack_words(words, _BITS).unflatten(-1, (-1, _A_WORD))[..., _ORDER].flatten(-2)
