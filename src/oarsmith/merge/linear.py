"""Merges that are one sum: linear, passthrough, nearswap, model stock."""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.merge.job import TensorJob, by_block, combine, products


def linear(job: TensorJob) -> Tensor:
    """sum w_i x_i, divided by sum w_i with ``normalize`` (model soups, Wortsman et al. 2022).

    Raises:
        ModelError: the weights sum to zero and are to be normalized.
    """
    weights, total = job.weights, sum(job.weights)
    if job.shared["normalize"]:
        if abs(total) < 1e-12:
            raise ModelError(
                f"the weights {weights} sum to zero, so they cannot be normalized",
                where=job.name,
                fix="change the weights, or set normalize: false",
            )
        weights = [weight / total for weight in weights]
    return combine(job, weights)


def passthrough(job: TensorJob) -> Tensor:
    """The tensor as it is, times ``scale``: for stacking layers."""
    scale = float(job.own[0]["scale"])
    if scale == 1.0 and job.tensors[0].dtype == job.dtype:
        return job.tensors[0]
    return combine(job, [scale])


def nearswap(job: TensorJob) -> Tensor:
    """base + clamp(t / abs(x - base), 0, 1) (x - base): what is near is taken, what is far moves by t at most
    (alchemonaut's NearSwap)."""
    t = float(job.shared["t"])

    def block(part: slice) -> Tensor:
        delta = job.delta(0, part)
        share = (t / delta.abs()).nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0).clamp_(0, 1)
        return job.base_values(part).addcmul_(delta, share)

    return by_block(job, block)


def model_stock(job: TensorJob) -> Tensor:
    """t mean(x) + (1 - t) base with t = N c / (1 + (N - 1) c), c the mean cosine between deltas (Jang et al. 2024,
    eq. 5); ``filter_wise``: a t for each row."""
    count = len(job.tensors)
    if not job.shared["filter_wise"] or len(job.shape) < 2:
        gram_NN = products(job, deltas=True)
        norms_N = gram_NN.diagonal().sqrt()
        cosines_NN = gram_NN / (norms_N[:, None] * norms_N).clamp(min=1e-8)
        t = _stock(cosines_NN[None], count)
        return combine(job, [float(t) / count] * count, 1 - float(t))

    def block(part: slice) -> Tensor:
        base_RC = job.base_values(part).view(-1, job.row)
        deltas_NRC = torch.stack([job.delta(index, part).view(-1, job.row) for index in range(count)])
        units_RNC = (deltas_NRC / deltas_NRC.norm(dim=-1, keepdim=True).clamp(min=1e-8)).transpose(0, 1)
        t_R = _stock(units_RNC @ units_RNC.transpose(1, 2), count)
        return torch.addcmul(base_RC, t_R[:, None].to(base_RC), deltas_NRC.mean(0)).view(-1)

    return by_block(job, block, job.row)


def _stock(cosines: Tensor, count: int) -> Tensor:
    """t of each of some matrices [..., N, N] of cosines."""
    pairs = torch.triu_indices(count, count, 1)
    mean = cosines[..., pairs[0], pairs[1]].clamp(-1, 1).mean(-1)
    return count * mean / (1 + (count - 1) * mean)
