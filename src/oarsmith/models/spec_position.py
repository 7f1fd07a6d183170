"""How positions enter a model, as data: rotary embeddings with their scaling rules, and ALiBi.

Learned positions belong to the embedding (``EmbeddingSpec``), not to a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base that grows with the sequence once it is longer than ``original_length``."""

    factor: float
    original_length: int


@dataclass(frozen=True, kw_only=True)
class SteppedScaling:
    """Qwen-1's NTK: the base grows in steps with the length of the *prompt* and stays while the answer is decoded.

    alpha = 2^ceil(log2(length / original_length) + 1) - 1, at least 1; base * alpha^(d / (d - 2)). Not in training.
    """

    original_length: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): interpolation by parts and a factor on the attention logits through cos and sin."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class LongScaling:
    """LongRoPE (Ding et al. 2024): a divisor for each frequency, one list up to ``original_length``, one beyond.

    Which list holds follows the current length of the document. ``attention_factor`` holds with both.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | SteppedScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of the first ``dim`` entries of each head (Su et al. 2021).

    ``pairs``: entry i turns with i + dim / 2 (``half``), or 2i with 2i + 1 (``adjacent``). ``fp16_frequencies``: they
    are rounded to half precision before use, as in the code the model was trained with (ChatGLM-6B).
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    pairs: Literal["half", "adjacent"] = "half"
    fp16_frequencies: bool = False


@dataclass(frozen=True, kw_only=True)
class TwoRowRope:
    """Each half of a head has its own rotation: by the token's position, and by its place in the generated block.

    GLM (Du et al. 2022), section 2.3. ``rope.dim`` is half the head; :class:`PrefixLM` says what the two rows are.
    """

    rope: Rope


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """A penalty on attention scores that grows with distance: slope * (key - query) (Press et al. 2022).

    Args:
        slopes: one for each head.
        bf16: slope * position is rounded to bfloat16, as in the code the model was trained with (Falcon).
        scale: factor on the penalty after rounding (Falcon scales the scores with the penalty in them).
    """

    slopes: tuple[float, ...]
    bf16: bool = False
    scale: float = 1.0


Position = Rope | TwoRowRope | Alibi


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), ... for n heads; between powers of two every second slope of the next power fills up."""
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return tuple(slopes)
