"""TRL's trainers reduced to their loss functions: log-probabilities in, loss and gradient out."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that they are experimental
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer


@dataclass
class Tokens:
    """Log-probabilities [2P, L] of tokens, chosen answers first, and which of them belong to answers."""

    logprobs: Tensor
    squares: Tensor
    mask: Tensor
    references: Tensor

    @property
    def masked(self) -> Tensor:
        return self.logprobs * self.mask


def accelerator() -> SimpleNamespace:
    def same(values: Any) -> Any:
        return values

    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def trainer(**settings: Any) -> Any:
    shared = {"model": SimpleNamespace(training=True), "accelerator": accelerator(), "aux_loss_enabled": False}
    counts = {"_total_train_tokens": 0, "_tp_size": 1, "_metrics": defaultdict(lambda: defaultdict(list))}
    return SimpleNamespace(**shared, **counts, precompute_ref_logps=True, **settings)


def outputs_of(tokens: Tokens) -> SimpleNamespace:
    zeros = torch.zeros_like(tokens.logprobs)
    return SimpleNamespace(
        log_probs=tokens.masked, log_sum_sq_probs=tokens.squares, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def dpo(tokens: Tokens, types: list[str], weights: list[float] | None = None, **settings: Any) -> tuple[Tensor, Any]:
    """The loss, and the trainer with its metrics."""
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    rest = {"ld_alpha": None, "use_weighting": False, "args": SimpleNamespace(discopop_tau=0.05)}
    this = trainer(loss_types=types, loss_weights=weights or [1.0] * len(types), **(defaults | rest | settings))
    chosen, rejected = tokens.references.chunk(2)
    mask = torch.nn.functional.pad(tokens.mask, (1, 0))  # the first token is the prompt's
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(this, lambda **_: outputs_of(tokens), inputs, return_outputs=False)
    return loss, this


def kto(logprobs: Tensor, references: Tensor, kl: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Any]:
    """The loss of single answers [O], with log-ratios of mismatched ones in ``kl``."""
    this = trainer(calculate_KL=settings["loss_type"] == "kto", _compute_kl_logps=lambda *_: kl, **settings)
    inputs = {
        "input_ids": torch.zeros(len(logprobs), 2, dtype=torch.long),
        "attention_mask": torch.ones(len(logprobs), 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * len(logprobs)),
        "label": labels.bool(),
        "ref_logps": references,
        "ref_KL_logps": torch.zeros_like(kl),
    }
    one = torch.ones(len(logprobs), 1)
    outputs = outputs_of(Tokens(logprobs[:, None], one, one, references))
    return KTOTrainer._compute_loss(this, lambda **_: outputs, inputs, return_outputs=False), this


def cpo(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
    this = SimpleNamespace(accelerator=accelerator(), alpha=0.0, **settings)
    return CPOTrainer.cpo_loss(this, chosen, rejected)[0].mean()


def odds_ratio(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The term that ORPO's loss subtracts from the NLL has the opposite sign."""
    this = SimpleNamespace(accelerator=accelerator(), beta=beta)
    return -ORPOTrainer.odds_ratio_loss(this, chosen, rejected)[0].mean()


def reward(chosen: Tensor, rejected: Tensor, margins: Tensor, center: float | None) -> Tensor:
    this = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    inputs = {"attention_mask": torch.ones(2 * len(chosen), 1), "margin": margins}
    model = type("M", (), {"__call__": lambda self, **_: outputs})()
    # The margin is the collator's, not the model's.
    return RewardTrainer.compute_loss(this, model, inputs)
