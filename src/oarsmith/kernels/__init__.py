"""Fast operations, each with a plain PyTorch twin: C++ on the CPU where a compiler is at hand, PyTorch elsewhere."""

from oarsmith.kernels.activation import activation, gated_activation
from oarsmith.kernels.adam8bit import Moments8bit, adam8bit_step
from oarsmith.kernels.adamw import AdamWRule, adamw_step
from oarsmith.kernels.attention import Scores, SpanBounds, attention, gather
from oarsmith.kernels.cross_entropy import HeadResult, head_loss, token_logprobs, token_logprobs_squares
from oarsmith.kernels.linear import linear
from oarsmith.kernels.norm import rms_norm
from oarsmith.kernels.rope import rope
from oarsmith.kernels.row_attention import row_attention
from oarsmith.kernels.rows import rows_to_add
from oarsmith.kernels.select import describe, using
from oarsmith.kernels.sum_of_squares import sum_of_squares

__all__ = [
    "AdamWRule",
    "HeadResult",
    "Moments8bit",
    "Scores",
    "SpanBounds",
    "activation",
    "adam8bit_step",
    "adamw_step",
    "attention",
    "describe",
    "gated_activation",
    "gather",
    "head_loss",
    "linear",
    "rms_norm",
    "rope",
    "row_attention",
    "rows_to_add",
    "sum_of_squares",
    "token_logprobs",
    "token_logprobs_squares",
    "using",
]
