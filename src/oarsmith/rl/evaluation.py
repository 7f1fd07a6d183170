"""What answers to held-out prompts are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oarsmith.rl.collect import score_groups
from oarsmith.rl.completion import Scorer
from oarsmith.rl.prompts import Asked
from oarsmith.rl.rollout import Sampler
from oarsmith.training.seeds import keyed_seed


def evaluate_policy(
    sampler: Sampler, scorer: Scorer | None, prompts: Sequence[Asked], *, samples: int, seed: int, passing: float
) -> dict[str, float]:
    """As a record of the log: reward, share of answers that pass and length, of ``samples`` drawn answers to each
    prompt and of the greedy one. Every evaluation draws under the same seed."""
    sampler.policy.refresh()
    found: dict[str, float] = {}
    for name, greedy in (("", False), ("greedy_", True)):
        groups = sampler.sample(prompts, 1 if greedy else samples, keyed_seed(seed, "evaluation", 0), greedy=greedy)
        total = score_groups(scorer, prompts, groups, 0).total
        rewards = np.array([value for value in total if value is not None], dtype=np.float64)
        found[f"eval_{name}reward"] = float(rewards.mean()) if len(rewards) else 0.0
        found[f"eval_{name}pass_rate"] = float((rewards >= passing).mean()) if len(rewards) else 0.0
        found[f"eval_{name}length"] = float(np.mean([written.num_own for group in groups for written in group]))
    return found
