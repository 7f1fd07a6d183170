"""GPTQ: ``qweight`` [in / n, out] int32 with n numbers a word along in, ``qzeros`` [G, out / n] along out, ``scales``
[G, out] and ``g_idx`` [in], the group of each input. w = (number - zero) * scale.

``checkpoint_format`` gptq stores zero - 1, gptq_v2 the zero itself. AutoRound's files are the same without ``g_idx``.
"""

from __future__ import annotations

import torch
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

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": False, "gptq_v2": True}


class GptqSource(CodedSource):
    """``X.weight`` from ``X.qweight``, ``X.qzeros``, ``X.scales`` and ``X.g_idx``."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        layout = "marlin" if quantization.get("is_marlin_format") else quantization.get("checkpoint_format", "gptq")
        if layout not in _FORMATS:
            raise CheckpointError(
                f"checkpoint_format {layout!r} is not read",
                where="config.json",
                fix=f"write the model as one of {', '.join(_FORMATS)}",
            )
        self._plain_zeros = _FORMATS[layout]
        self._sizes: dict[str, tuple[int, int]] = {}
        for stem in stems(inner, ".qweight"):
            rows, out = self._shape(f"{stem}.qweight", "I32", 2)
            groups, words = self._shape(f"{stem}.qzeros", "I32", 2)
            scales = self._shape(f"{stem}.scales", ("F16", "BF16", "F32"), 2)
            bits = 32 * words // out if out else 0
            split = 32 % bits and (rows % bits or words % bits) if bits in _BITS else True
            if split or bits * out != 32 * words or scales != (groups, out):
                raise self._misfit(f"{stem}.qweight", f"{rows} rows of words do not fit {words} words of zeros")
            in_features = 32 * rows // bits
            group = group_size(in_features, groups, quantization.get("group_size"))
            own = (f"{stem}.g_idx",) if f"{stem}.g_idx" in inner.shapes else ()
            if group is None or (own and self._shape(own[0], ("I32", "I64"), 1) != (in_features,)):
                raise self._misfit(f"{stem}.qweight", f"{in_features} inputs do not fit {groups} groups")
            self._sizes[f"{stem}.weight"] = (bits, group)
            parts = (f"{stem}.qweight", f"{stem}.qzeros", f"{stem}.scales", *own)
            kind = float_kind(config, inner.dtypes[f"{stem}.scales"])
            self._replace(f"{stem}.weight", (out, in_features), kind, *parts)

    def scale_name(self, name: str) -> str:
        return name.removesuffix("weight") + "scales"

    def packed(self, name: str) -> Packed:
        stem, (bits, group) = name.removesuffix("weight"), self._sizes[name]
        numbers_OI = unpack_words(self._inner.read(f"{stem}qweight").t().contiguous(), bits)
        zeros_OG = self._zeros(self._inner.read(f"{stem}qzeros"), bits).t()
        scales_OG = self._inner.read(f"{stem}scales").t().contiguous()
        columns = None
        if f"{stem}g_idx" in self._inner.shapes:
            numbers_OI, zeros_OG, scales_OG, columns, group = self._in_order(
                name, self._inner.read(f"{stem}g_idx").long(), numbers_OI, zeros_OG, scales_OG, group
            )
        return Packed(integer_weight(numbers_OI, scales_OG, zeros_OG, bits, group), columns)

    def code_names(self) -> dict[str, str]:
        return {name.removesuffix("weight") + "qweight": name for name in self._sizes}

    def recoded(self, name: str, weight_OI: Tensor) -> Tensor:
        bits = self._sizes[name][0]
        return pack_words(numbers_on_grid(self._checked(name), weight_OI, bits), bits).t().contiguous()

    def _zeros(self, words: Tensor, bits: int) -> Tensor:
        if self._plain_zeros:
            return unpack_words(words, bits)
        if 32 % bits:
            return (unpack_words(words, bits) + 1) & (1 << bits) - 1
        # Whole words had 1 taken from each number: what a zero of 0 borrowed from its neighbour comes back.
        ones = sum(1 << place for place in range(0, 32, bits))
        return unpack_words((words.long() + ones).to(torch.int32), bits)

    def _in_order(
        self, name: str, groups_I: Tensor, numbers_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor, group: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        """Columns sorted by group, where they are not (``desc_act``)."""
        if torch.equal(groups_I, torch.arange(len(groups_I)) // group):
            return numbers_OI, zeros_OG, scales_OG, None, group
        count = scales_OG.shape[1]
        if int(groups_I.min()) < 0 or int(groups_I.max()) >= count:
            raise self._misfit(name.removesuffix("weight") + "g_idx", f"a group is not one of 0 to {count - 1}")
        order = groups_I.argsort(stable=True)
        ordered = groups_I[order]
        if torch.equal(ordered, torch.arange(len(groups_I)) // group):
            return numbers_OI[:, order], zeros_OG, scales_OG, order.argsort(), group
        # Groups of unequal size: a scale for each column.
        return numbers_OI, zeros_OG[:, groups_I], scales_OG[:, groups_I], torch.arange(len(groups_I)), 1
