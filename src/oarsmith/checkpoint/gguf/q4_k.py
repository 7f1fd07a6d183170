"""Q4_K: 256 weights in 8 runs of 32; w = d * scale * number - dmin * minimum, with scales and minima of 6 bits.

As quantize_row_q4_K_ref and, where columns have weights, quantize_row_q4_K_impl do it (ggml/src/ggml-quants.c of
llama.cpp, without fused multiply-add): the same sums in the same order, so that the bytes are the same. Arrays lie with
a run's numbers along the first axis: numpy then adds them one after another, as C does.

Shapes: K numbers of a run (32), R runs, J runs of a block (8), B blocks, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 256
_RUN = 32
_LARGEST = 15
_LARGEST_SCALE = 63
_EPSILON = np.float32(1e-15)


@dataclass(frozen=True)
class _Search:
    """Which ranges are tried: (first + step i + 15) / (max - min) for i from 0 to ``count``."""

    first: float
    step: float
    count: int


_PLAIN, _WEIGHTED = _Search(-1.0, 0.1, 20), _Search(-0.9, 0.05, 36)


def encode(rows_BI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Rows whose length is a multiple of 256 to bytes [rows, I / 256 * 144].

    Args:
        importance_I: how much an error in each column counts (the mean square of what the column is multiplied by).
    """
    num_rows, width = rows_BI.shape
    x_KR = np.ascontiguousarray(rows_BI.reshape(-1, _RUN).T, dtype=np.float32)
    with np.errstate(all="ignore"):  # what a division by 0 gives is never used
        if importance_I is None:
            weights_KR = np.sqrt(_sum(x_KR * x_KR) / np.float32(_RUN)) + np.abs(x_KR)
            scale_R, minimum_R, numbers_KR = _steps(x_KR, weights_KR, _PLAIN)
            scale_BJ, minimum_BJ = scale_R.reshape(-1, 8), minimum_R.reshape(-1, 8)
            d_B, scales_BJ = _on_largest(scale_BJ)
            dmin_B, minima_BJ = _on_largest(minimum_BJ)
        else:
            blocks_KB = np.ascontiguousarray(rows_BI.reshape(-1, BLOCK).T, dtype=np.float32)
            sigma2_B = np.float32(2) * _sum(blocks_KB * blocks_KB) / np.float32(BLOCK)
            columns_KR = np.tile(importance_I.astype(np.float32).reshape(-1, _RUN).T, (1, num_rows))
            weights_KR = columns_KR * np.sqrt(np.repeat(sigma2_B, 8) + x_KR * x_KR)
            scale_R, minimum_R, numbers_KR = _steps(x_KR, weights_KR, _WEIGHTED)
            sums_BJ = _sum(weights_KR).reshape(-1, 8)
            d_B, scales_BJ = _on_best(scale_R.reshape(-1, 8), sums_BJ)
            dmin_B, minima_BJ = _on_best(minimum_R.reshape(-1, 8), sums_BJ)
        half_d_B, half_dmin_B = d_B.astype(np.float16), dmin_B.astype(np.float16)
        step_R = (half_d_B.astype(np.float32)[:, None] * scales_BJ).reshape(-1)
        lowest_R = (half_dmin_B.astype(np.float32)[:, None] * minima_BJ).reshape(-1)
        again_KR = np.rint((x_KR + lowest_R) / step_R).clip(0, _LARGEST)
    numbers_KR = np.where(step_R == 0, numbers_KR, again_KR).astype(np.uint8)
    return _packed(half_d_B, half_dmin_B, scales_BJ, minima_BJ, numbers_KR).reshape(num_rows, width // BLOCK * 144)


def _sum(x_KR: Floats) -> Floats:
    """Over the first axis, in its order and in fp32."""
    total: Floats = np.add.reduce(x_KR, axis=0, dtype=np.float32)
    return total


def _steps(x_KR: Floats, weights_KR: Floats, search: _Search) -> tuple[Floats, Floats, Floats]:
    """Scales and minima [R] with the least weighted square error, and numbers [K, R] (make_qkx2_quants)."""
    low_R, high_R = np.minimum(x_KR.min(0), np.float32(0)), x_KR.max(0)
    constant_R = high_R <= low_R
    weight_R, weighted_R = _sum(weights_KR), _sum(weights_KR * x_KR)
    scale_R: Floats = np.reciprocal(np.float32(_LARGEST) / (high_R - low_R))
    numbers_KR = np.rint(np.float32(_LARGEST) / (high_R - low_R) * (x_KR - low_R)).clip(0, _LARGEST)
    best_R, minimum_R = _error(x_KR, weights_KR, numbers_KR, scale_R, low_R), low_R.copy()
    for index in range(search.count + 1):
        wanted = np.float32(search.first) + np.float32(search.step) * np.float32(index) + np.float32(_LARGEST)
        tried_KR = np.rint(wanted / (high_R - minimum_R) * (x_KR - minimum_R)).clip(0, _LARGEST)
        product_KR = weights_KR * tried_KR
        sum_R, squares_R, mixed_R = _sum(product_KR), _sum(product_KR * tried_KR), _sum(product_KR * x_KR)
        determinant_R = weight_R * squares_R - sum_R * sum_R
        new_scale_R: Floats = np.divide(weight_R * mixed_R - weighted_R * sum_R, determinant_R)
        new_low_R: Floats = np.divide(squares_R * weighted_R - sum_R * mixed_R, determinant_R)
        above_R = new_low_R > 0
        new_low_R = np.minimum(new_low_R, np.float32(0))
        new_scale_R = np.where(above_R, mixed_R / squares_R, new_scale_R)
        error_R = _error(x_KR, weights_KR, tried_KR, new_scale_R, new_low_R)
        better_R = (determinant_R > 0) & (error_R < best_R)
        best_R = np.where(better_R, error_R, best_R)
        scale_R = np.where(better_R, new_scale_R, scale_R)
        minimum_R = np.where(better_R, new_low_R, minimum_R)
        numbers_KR = np.where(better_R, tried_KR, numbers_KR)
    zero = np.float32(0)
    return (
        np.where(constant_R, zero, scale_R),
        -np.where(constant_R, low_R, minimum_R),
        np.where(constant_R, zero, numbers_KR),
    )


def _error(x_KR: Floats, weights_KR: Floats, numbers_KR: Floats, scale_R: Floats, low_R: Floats) -> Floats:
    difference_KR = scale_R * numbers_KR + low_R - x_KR
    return _sum(weights_KR * (difference_KR * difference_KR))


def _on_largest(values_BJ: Floats) -> tuple[Floats, Floats]:
    """A block's scale and its numbers of 6 bits, where the largest value lies on 63."""
    largest_B = values_BJ.max(-1)
    largest_B = np.where(largest_B > 0, largest_B, np.float32(0))  # no -0
    inverse_B = np.where(largest_B > 0, np.float32(_LARGEST_SCALE) / largest_B, np.float32(0))
    numbers_BJ = np.rint(inverse_B[:, None] * values_BJ).clip(0, _LARGEST_SCALE)
    return largest_B / np.float32(_LARGEST_SCALE), numbers_BJ


def _on_best(values_BJ: Floats, weights_BJ: Floats) -> tuple[Floats, Floats]:
    """The same with the least weighted square error (make_qp_quants)."""
    x_JB, w_JB = np.ascontiguousarray(values_BJ.T), np.ascontiguousarray(weights_BJ.T)
    largest_B, most = x_JB.max(0).clip(0), np.float32(_LARGEST_SCALE)
    inverse_B = most / largest_B
    difference_JB = x_JB - np.float32(1) / inverse_B * np.rint(inverse_B * x_JB)
    best_B = _sum(w_JB * difference_JB * difference_JB)
    for index in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried_B = (np.float32(0.1) * np.float32(index) + most) / largest_B
        difference_JB = x_JB - np.float32(1) / tried_B * np.minimum(np.rint(tried_B * x_JB), most)
        error_B = _sum(w_JB * difference_JB * difference_JB)
        better_B = error_B < best_B
        best_B, inverse_B = np.where(better_B, error_B, best_B), np.where(better_B, tried_B, inverse_B)
    numbers_JB = np.minimum(np.rint(inverse_B * x_JB), most)
    mixed_B, squares_B = _sum(w_JB * x_JB * numbers_JB), _sum(w_JB * numbers_JB * numbers_JB)
    for _ in range(5):
        for run in range(len(x_JB)):
            x_B, w_B, old_B = x_JB[run], w_JB[run], numbers_JB[run]
            rest_B, rest_squares_B = mixed_B - w_B * x_B * old_B, squares_B - w_B * old_B * old_B
            new_B = np.minimum(np.rint(x_B * rest_squares_B / rest_B), most)
            new_mixed_B, new_squares_B = rest_B + w_B * x_B * new_B, rest_squares_B + w_B * new_B * new_B
            gains_B = new_mixed_B * new_mixed_B * squares_B > mixed_B * mixed_B * new_squares_B
            moved_B = (rest_B > 0) & (rest_squares_B > 0) & (new_B != old_B) & gains_B
            numbers_JB[run] = np.where(moved_B, new_B, old_B)
            mixed_B = np.where(moved_B, new_mixed_B, mixed_B)
            squares_B = np.where(moved_B, new_squares_B, squares_B)
    empty_B = largest_B < _EPSILON
    scale_B = np.where(empty_B | (squares_B <= 0), np.float32(0), mixed_B / squares_B)
    return scale_B, np.where(empty_B, np.float32(0), numbers_JB).T


def _packed(
    d_B: NDArray[np.float16], dmin_B: NDArray[np.float16], scales_BJ: Floats, minima_BJ: Floats, numbers_KR: Floats
) -> Bytes:
    scales, minima = scales_BJ.astype(np.uint8), minima_BJ.astype(np.uint8)
    six_bits = np.concatenate(
        [
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            minima[:, :4] | minima[:, 4:] >> 4 << 6,
            scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    pairs = numbers_KR.T.reshape(-1, 4, 2, _RUN)
    numbers = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(d_B), -1)
    halves = [part[:, None].view(np.uint8) for part in (d_B, dmin_B)]
    return np.concatenate([*halves, six_bits, numbers], axis=1)
