"""Forms of 4 and 8 bits a weight, decoded a part at a time and multiplied in x's dtype (``kernels/coded.py``).

Shapes: T tokens, I in features, O out features, G groups of a row, N nested blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.adapters.forms.form import Dense, Parts, WeightForm
from oarsmith.kernels import adam8bit
from oarsmith.kernels.coded import INT8, NF4, UINT4, Code, CodedWeight, coded_backward, coded_forward, decode
from oarsmith.kernels.encode import encode_blocks, encode_groups, encode_rows


class _Coded(ABC):
    """A form whose tensors are those of a coded weight, however they are kept."""

    @abstractmethod
    def coded(self, parts: Parts, in_features: int) -> CodedWeight:
        """The weight."""

    def dense(self, parts: Parts, in_features: int) -> Tensor:
        return decode(self.coded(parts, in_features), torch.float32)

    def rows(self, parts: Parts, start: int, stop: int, in_features: int) -> Parts:
        return tuple(part[start:stop] for part in parts)

    def forward(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        return coded_forward(x_TI, self.coded(parts, x_TI.shape[1]), bias_O)

    def backward(self, dy_TO: Tensor, parts: Parts, in_features: int) -> Tensor:
        return coded_backward(dy_TO, self.coded(parts, in_features))

    def low_rank_forward(
        self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor
    ) -> tuple[Tensor, Tensor]:
        xa_TR = x_TI @ a_RI.t()
        return self.forward(x_TI, parts, bias_O).addmm_(xa_TR, b_OR.t()), xa_TR

    def low_rank_backward(self, dy_TO: Tensor, parts: Parts, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        dxa_TR = dy_TO @ b_OR
        return self.backward(dy_TO, parts, a_RI.shape[1]).addmm_(dxa_TR, a_RI), dxa_TR


@dataclass(frozen=True, kw_only=True)
class Blocks(_Coded):
    """4-bit numbers, each block of a row divided by its largest magnitude (QLoRA, Dettmers et al. 2023, section 3).

    Codes, their order in a byte and their values are bitsandbytes', and so are the scales' codes.

    Attributes:
        code: NF4 or FP4.
        nested: double quantization: how many of the fp32 scales, less the mean of all, share an fp32 scale of their own
            and are kept in 8 bits. None: scales are fp32.
    """

    code: Code = NF4
    block: int = 64
    nested: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return ("weight", "absmax") if self.nested is None else ("weight", "absmax", "nested_absmax", "nested_offset")

    def keep(self, weight_OI: Tensor) -> Parts:
        codes, absmax_OG = encode_blocks(weight_OI, self.code, self.block)
        if self.nested is None:
            return codes, absmax_OG
        offset = absmax_OG.mean()
        indices_OG, nested_N = adam8bit.quantize(absmax_OG - offset, signed=True, block=self.nested)
        return codes, indices_OG, nested_N, offset

    def coded(self, parts: Parts, in_features: int) -> CodedWeight:
        codes, absmax = parts[0], self._absmax(parts)
        return CodedWeight(code=self.code, group=self.block, in_features=in_features, codes_OB=codes, scale_OG=absmax)

    def rows(self, parts: Parts, start: int, stop: int, in_features: int) -> Parts:
        """Nested blocks run over rows: some rows have plain scales, and nothing nested."""
        codes, absmax_OG = parts[0], self._absmax(parts)
        nothing = absmax_OG.new_empty(0)
        return codes[start:stop], absmax_OG[start:stop], *[nothing] * (len(self.names) - 2)

    def _absmax(self, parts: Parts) -> Tensor:
        if self.nested is None or parts[1].dtype != torch.uint8:
            return parts[1]
        _, indices_OG, nested_N, offset = parts
        return adam8bit.dequantize(indices_OG, nested_N, signed=True, block=self.nested) + offset


@dataclass(frozen=True, kw_only=True)
class Groups(_Coded):
    """4-bit steps between the least and the largest number of a group: an asymmetric grid has less error."""

    group: int = 64
    names = ("weight", "scale", "zero")

    def keep(self, weight_OI: Tensor) -> Parts:
        return encode_groups(weight_OI, self.group)

    def coded(self, parts: Parts, in_features: int) -> CodedWeight:
        codes, scale, zero = parts
        return CodedWeight(
            code=UINT4, group=self.group, in_features=in_features, codes_OB=codes, scale_OG=scale, zero_OG=zero
        )


@dataclass(frozen=True, kw_only=True)
class Rows(_Coded):
    """8 bits with a scale a row."""

    names = ("weight", "scale")

    def keep(self, weight_OI: Tensor) -> Parts:
        return encode_rows(weight_OI)

    def coded(self, parts: Parts, in_features: int) -> CodedWeight:
        codes = parts[0].view(torch.uint8)
        return CodedWeight(
            code=INT8, group=in_features, in_features=in_features, codes_OB=codes, scale_OG=parts[1][:, None]
        )


@dataclass(frozen=True, kw_only=True)
class Stored(_Coded):
    """The codes of a quantized checkpoint, bit for bit.

    Attributes:
        zeros: there are some.
    """

    code: Code
    group: int
    zeros: bool

    @classmethod
    def form_of(cls, weight: CodedWeight) -> Stored:
        return cls(code=weight.code, group=weight.group, zeros=weight.zero_OG is not None)

    @property
    def names(self) -> tuple[str, ...]:
        return ("weight", "scale", "zero") if self.zeros else ("weight", "scale")

    def keep(self, weight_OI: Tensor) -> Parts:
        raise NotImplementedError("codes are taken, not made")

    def parts_of(self, weight: CodedWeight) -> Parts:
        """The tensors of a weight of this form."""
        zeros = () if weight.zero_OG is None else (weight.zero_OG,)
        return weight.codes_OB, weight.scale_OG, *zeros

    def coded(self, parts: Parts, in_features: int) -> CodedWeight:
        return CodedWeight(
            code=self.code,
            group=self.group,
            in_features=in_features,
            codes_OB=parts[0],
            scale_OG=parts[1],
            zero_OG=parts[2] if self.zeros else None,
        )


AS_STORED: WeightForm = Dense()
"""What a quantized checkpoint holds: `Stored`, each map in its own way, or plain where the file is plain."""
