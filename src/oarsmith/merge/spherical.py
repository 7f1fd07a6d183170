"""Merges on the sphere: slerp, nuslerp, multislerp, and the Karcher mean.

Their results lie in the span of the models' tensors, so inner products tell the factors (in float64), and one sum does
the rest: two passes, whatever the method.

Shapes: N models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.merge.job import TensorJob, by_block, combine, products


def slerp(job: TensorJob) -> Tensor:
    """From the first model (t = 0) to the other (t = 1) along the great circle (Shoemake 1985), the whole tensor as one
    vector; beyond ``dot_threshold`` along the straight line. With a base: of what the two add to it."""
    t, deltas = float(job.shared["t"]), job.base is not None
    eps, threshold = float(job.shared["normalize_eps"]), float(job.shared["dot_threshold"])
    gram_NN = products(job, deltas=deltas)
    norms = [math.sqrt(float(gram_NN[index, index])) for index in (0, 1)]
    cosine = float(gram_NN[0, 1])
    for norm in norms:  # a vector of no length stays as it is
        cosine = cosine / norm if norm > eps else cosine
    a, b = 1 - t, t
    if abs(cosine) <= threshold:
        angle = math.acos(max(-1.0, min(cosine, 1.0)))
        a, b = math.sin(a * angle) / math.sin(angle), math.sin(b * angle) / math.sin(angle)
    return combine(job, [a, b], 1 - a - b if deltas else 0.0)


def nuslerp(job: TensorJob) -> Tensor:
    """Slerp with t = w2 / (w1 + w2), of the tensors or, with a base, of what they add to it; of whole tensors, or with
    ``nuslerp_flatten: false`` of rows (``nuslerp_row_wise``: of columns, as mergekit has it)."""
    first, second = job.weights
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    deltas = job.base is not None
    if job.shared["nuslerp_flatten"] or len(job.shape) < 2:
        gram_NN = products(job, deltas=deltas)
        norms = gram_NN.diagonal().sqrt().clamp(min=1e-7)
        a, b = (float(one) for one in _arc(t, gram_NN[0, 1] / (norms[0] * norms[1])))
        return combine(job, [a, b], 1 - a - b if deltas else 0.0)
    if not job.shared["nuslerp_row_wise"]:
        return by_block(job, lambda part: _rows(job, part, t, -1), job.row)
    result = _rows(job, slice(0, job.numel), t, 0)
    return result.view(job.shape).to(job.dtype)


def _rows(job: TensorJob, part: slice, t: float, dim: int) -> Tensor:
    shape = (-1, *job.shape[1:]) if dim == 0 else (-1, job.row)
    pick = job.delta if job.base is not None else job.values
    x, y = (pick(index, part).view(shape) for index in (0, 1))
    norms = x.norm(dim=dim, keepdim=True).clamp(min=1e-7) * y.norm(dim=dim, keepdim=True).clamp(min=1e-7)
    a, b = _arc(t, ((x * y).sum(dim, keepdim=True) / norms).double())
    mixed = (a.float() * x + b.float() * y).view(-1)
    return mixed.add_(job.base_values(part)) if job.base is not None else mixed


def _arc(t: float, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the two ends at t of the way; those of the line where the ends coincide."""
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    near = sine.abs() < 1e-8
    safe = torch.where(near, torch.ones_like(sine), sine)
    a = torch.where(near, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / safe)
    b = torch.where(near, torch.full_like(sine, t), (t * angle).sin() / safe)
    return a, b


def multislerp(job: TensorJob) -> Tensor:
    """One step from the mean direction: the weighted mean of the directions' parts in its tangent space, put back on
    the sphere by the exponential map, with the mean of the lengths (mergekit's multislerp)."""
    count, eps, deltas = len(job.tensors), float(job.shared["eps"]), job.base is not None
    weights_N = torch.tensor(job.weights, dtype=torch.float64)
    if job.shared["normalize_weights"]:
        weights_N = weights_N / weights_N.sum()
    gram_NN = products(job, deltas=deltas)
    norms_N = gram_NN.diagonal().sqrt()
    lengths_N = norms_N + eps
    units_NN = gram_NN / (lengths_N[:, None] * lengths_N)  # inner products of the directions
    length = float((weights_N * norms_N).sum())
    mean_length = float((weights_N @ units_NN @ weights_N).clamp(min=0).sqrt())
    if mean_length < eps:
        raise ModelError(
            "the models' directions cancel each other, so they have no mean on the sphere",
            where=job.name,
            fix="change the weights, or use linear",
        )
    mean_N = weights_N / mean_length  # factors of directions
    dots_N = (units_NN @ mean_N).clamp(-1, 1)
    tangents_NN = torch.eye(count, dtype=torch.float64) - dots_N[:, None] * mean_N  # each a row of factors
    step_N = weights_N @ tangents_NN
    size = float((step_N @ units_NN @ step_N).clamp(min=0).sqrt()) + eps
    result_N = (mean_N * math.cos(size) + step_N * math.sin(size) / size) * length / lengths_N
    factors = result_N.tolist()
    return combine(job, factors, 1 - sum(factors) if deltas else 0.0)


def karcher(job: TensorJob) -> Tensor:
    """The point on the sphere with the least sum of squared distances (Karcher 1977), by steps along the
    mean of the logarithms, with equal weights and the mean of the lengths. Tensors of no length are left out."""
    gram_NN = products(job, deltas=False)
    norms_N = gram_NN.diagonal().sqrt()
    chosen = [index for index, norm in enumerate(norms_N.tolist()) if norm > 1e-12]
    if not chosen:
        return combine(job, [0.0] * len(job.tensors))
    lengths_M = norms_N[chosen]
    units_MM = gram_NN[chosen][:, chosen] / (lengths_M[:, None] * lengths_M)
    count = len(chosen)
    mean_M = torch.full((count,), 1 / count, dtype=torch.float64)
    size = float((mean_M @ units_MM @ mean_M).clamp(min=0).sqrt())
    mean_M = mean_M / size if size >= 1e-12 else torch.eye(count, dtype=torch.float64)[0]
    for _ in range(int(job.shared["max_iter"])):
        dots_M = (units_MM @ mean_M).clamp(-1, 1)
        angles_M = dots_M.acos()
        pull_M = torch.where(angles_M < 1e-8, torch.zeros_like(angles_M), angles_M / angles_M.sin()) / count
        step_M = pull_M - (pull_M * dots_M).sum() * mean_M
        size = float((step_M @ units_MM @ step_M).clamp(min=0).sqrt())
        if size < float(job.shared["tol"]):
            break
        mean_M = math.cos(size) * mean_M + math.sin(size) / size * step_M
        mean_M = mean_M / (mean_M @ units_MM @ mean_M).clamp(min=1e-24).sqrt()
    factors = [0.0] * len(job.tensors)
    for place, factor in zip(chosen, (mean_M / lengths_M * lengths_M.mean()).tolist(), strict=True):
        factors[place] = factor
    return combine(job, factors)
