"""Merges that choose number by number: arcee_fusion, ram and ramplus_tl."""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.merge.job import TensorJob, blocks, by_block
from oarsmith.merge.sparsify import Delta, cuts, number_of

_TINY = 1e-8


def arcee_fusion(job: TensorJob) -> Tensor:
    """The other model where the change matters: abs(x - base) times the KL divergence of the rows' softmaxes is at
    least median + 1.5 * (q3 - q1) of all (Arcee Fusion). Quantiles are exact, of the number below."""

    def importance(part: slice) -> Tensor:
        x_RC, base_RC = job.values(0, part).view(-1, job.row), job.base_values(part).view(-1, job.row)
        p_RC, q_RC = x_RC.softmax(-1).add_(_TINY), base_RC.softmax(-1).add_(_TINY)
        divergence_R = (p_RC * (p_RC / q_RC).log_()).sum(-1, keepdim=True)
        return ((x_RC - base_RC).abs_() * divergence_R).view(-1)

    # Rows matter: the search goes over whole rows, so importance is kept where it would be computed four times.
    found = torch.cat([importance(part) for part in blocks(job.numel, job.row)]) if job.numel else torch.empty(0)
    # abs: rounding can make a divergence of next to nothing negative, which belongs at the low end.
    found = found.clamp_(min=0)
    last = job.numel - 1
    ranks = [int(share * last) for share in (0.25, 0.5, 0.75)]
    whole = Delta(lambda part: found[part].clone(), job.numel, job.row, False, 0, job.name)
    low, middle, high = (number_of(cut.bits) for cut in cuts(whole, [job.numel - rank for rank in ranks]))
    threshold = middle + 1.5 * (high - low)

    def block(part: slice) -> Tensor:
        return job.base_values(part).addcmul_(job.delta(0, part), found[part] >= threshold)

    return by_block(job, block)


def ram(job: TensorJob) -> Tensor:
    """What one model alone has changed is added whole, what several have is averaged (Reinforced Agent Merging, 2026):
    for changes that are sparse, as those of reinforcement learning are."""
    return _ram(job, [1.0] * len(job.tensors))


def ramplus_tl(job: TensorJob) -> Tensor:
    """The same with unique changes scaled up by 1 + r * min(shared / unique, alpha), per model and tensor."""
    count = len(job.tensors)
    shared, unique = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    epsilon = float(job.shared["epsilon"])
    for part in blocks(job.numel):
        changed = torch.stack([job.delta(index, part).abs() > epsilon for index in range(count)])
        several = changed.sum(0) > 1
        shared += (changed & several).sum(1)
        unique += (changed & ~several).sum(1)
    share = (shared / unique.clamp(min=epsilon)).clamp(0, float(job.shared["alpha"]))
    return _ram(job, (1 + float(job.shared["r"]) * share).tolist())


def _ram(job: TensorJob, factors: list[float]) -> Tensor:
    epsilon = float(job.shared["epsilon"])

    def block(part: slice) -> Tensor:
        deltas = [job.delta(index, part) for index in range(len(job.tensors))]
        changed = [delta.abs() > epsilon for delta in deltas]
        count = torch.stack(changed).sum(0)
        several, divisor = count > 1, count.clamp(min=1).float()
        total = job.base_values(part)
        for delta, mask, factor in zip(deltas, changed, factors, strict=True):
            scale = torch.where(several, 1 / divisor, torch.full_like(divisor, factor))
            total.addcmul_(delta, scale.mul_(mask))
        return total

    return by_block(job, block)
