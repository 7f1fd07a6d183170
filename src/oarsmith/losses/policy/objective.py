"""The objective of ``oarsmith grpo``: a surrogate of each sampled token, a KL term and an entropy bonus.

Shapes: N tokens that the model wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.data.policy_batch import PolicyBatch
from oarsmith.losses.policy.divergence import Estimator, corrected_kl, estimate_kl, sampling_correction
from oarsmith.losses.policy.scoring import PolicyScores, score_policy
from oarsmith.losses.policy.surrogates import SURROGATES, Level, Surrogate, SurrogateOptions, log_ratios
from oarsmith.losses.policy.weights import weighted_sums
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Outcome


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """sum_t w_t (pg_coef l_t + kl_coef KL_t - entropy_coef H_t) / count over the whole step.

    Weights and count come with the batches (``weights.py``), and so does what the ratio is taken to: where ``old_N`` is
    nan the tokens are those of the policy that learns, and the ratio is 1.

    Args:
        surrogate: a name of ``SURROGATES``; ``level``: what a ratio is of.
        pg_coef, kl_coef, entropy_coef: 0 leaves a term out; a KL term needs ``reference_N``.
        corrected: the KL term is multiplied by the ratio, which makes it unbiased for tokens of an older policy.
        correction: how the sampler's log-probabilities are corrected for, a mode of ``sampling_correction``, or
        ``none``. temperature: that the answers were drawn at.
    """

    surrogate: str = "clipped"
    level: Level = "token"
    options: SurrogateOptions = field(default_factory=SurrogateOptions)
    pg_coef: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: Estimator = "k3"
    corrected: bool = False
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_cap: float = 2.0
    temperature: float = 1.0

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        assert isinstance(batch, PolicyBatch), type(batch)
        scores = score_policy(model, batch, temperature=self.temperature, entropies=self.entropy_coef != 0)
        total, sums = self.loss(scores, batch)
        return Outcome(loss=total * scale, total=float(total.detach()), count=batch.num_trained, sums=sums)

    def loss(self, scores: PolicyScores, batch: PolicyBatch) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum over the batch's tokens, and metrics as sums under the same weights."""
        logprobs_N = scores.logprobs_N
        on = logprobs_N.device
        weights_N, advantages_N = batch.token_weights_N.to(on), batch.advantages_N.to(on)
        given_N = batch.old_N.to(on)
        old_N = torch.where(given_N.isnan(), logprobs_N.detach(), given_N)
        ratio_N = log_ratios(logprobs_N, old_N, batch.sizes, self.level).exp()
        found = SURROGATES[self.surrogate](logprobs_N, ratio_N, advantages_N, self.options)
        loss_N = self.pg_coef * found.loss_N
        if self.correction != "none":
            loss_N = loss_N * sampling_correction(
                old_N, batch.sampled_N.to(on), batch.sizes, self.correction, self.correction_cap
            )
        kl_N: Tensor | None = None
        if not bool(batch.reference_N[:1].isnan()):
            kl_N = estimate_kl(logprobs_N, batch.reference_N.to(on), self.kl_estimator)
            if self.kl_coef != 0:
                loss_N = loss_N + self.kl_coef * (corrected_kl(kl_N, ratio_N) if self.corrected else kl_N)
        if scores.entropies_N is not None:
            loss_N = loss_N - self.entropy_coef * scores.entropies_N
        return (loss_N * weights_N).sum(), self._metrics(batch, scores, found, ratio_N, kl_N, weights_N)

    def _metrics(
        self,
        batch: PolicyBatch,
        scores: PolicyScores,
        found: Surrogate,
        ratio_N: Tensor,
        kl_N: Tensor | None,
        weights_N: Tensor,
    ) -> dict[str, float]:
        """``entropy``: measured, or without a bonus estimated by the mean of -log p of what was drawn. ``clip_share``:
        of tokens that were cut. ``mismatch``: mean size of what sampler and trainer differ by."""
        with torch.no_grad():
            logprobs_N = scores.logprobs_N.detach()
            entropy_N = -logprobs_N if scores.entropies_N is None else scores.entropies_N.detach()
            named = {
                "entropy": entropy_N,
                "clip_low": found.low_N,
                "clip_high": found.high_N,
                "ratio": ratio_N.detach(),
            }
            if kl_N is not None:
                named["kl"] = kl_N.detach()
            sampled_N = batch.sampled_N.to(logprobs_N.device)
            if bool(batch.old_N[:1].isnan()) and self.temperature == 1.0:
                named["mismatch"] = (logprobs_N - sampled_N).abs()
        sums = weighted_sums(named, weights_N, batch.num_trained)
        return sums | {name: value * batch.num_trained for name, value in batch.facts.items()}
