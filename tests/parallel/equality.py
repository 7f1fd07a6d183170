"""Steps of several processes beside those of one: loss, gradients, norm and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from math import nan as NAN
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from made_answers import random_answers, relabelled
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.data.answers import make_answer_batch
from oarsmith.data.batch import Batch
from oarsmith.losses.kto import KtoLoss
from oarsmith.losses.preference.objective import PreferenceLoss
from oarsmith.losses.reward import RewardLoss
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec import PrefixLM
from oarsmith.parallel.mesh import Degrees, make_mesh
from oarsmith.parallel.ranks import MeshRanks
from oarsmith.parallel.shard import shard
from oarsmith.training.objective import Objective
from oarsmith.training.optimizers.adamw import AdamW, AdamWSettings
from oarsmith.training.ranks import ALONE, Ranks
from oarsmith.training.step import run_step
from oarsmith.training.update_hooks import UpdateHooks
from tiny import CONFIGS, batches_of, random_samples, tiny_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "families"
STEPS = 3


def model_of(name: str, lora_rank: int | None, objective: str) -> Decoder:
    """A tiny model of the tests, or a fixture's, in fp32."""
    if objective == "reward":
        model = tiny_decoder(name, architectures=["LlamaForSequenceClassification"], num_labels=1)
    elif name in CONFIGS:
        model = tiny_decoder(name, lora_rank=lora_rank)
    else:
        model = load_decoder(FIXTURES / name, dtype=torch.float32)
    if lora_rank is not None:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in path)
    return model.train()


# Beside the token loss: sums over pairs, an order of a step's pairs, a border that follows steps, a step's mean.
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "sft": TokenCrossEntropy,
    "dpo": PreferenceLoss,
    "aot": lambda: PreferenceLoss(terms=(("aot", 1.0),)),
    "bco": lambda: PreferenceLoss(terms=(("bco_pair", 1.0),)),
    "kto": KtoLoss,
    "reward": RewardLoss,
}
_LABELS = [(1.0, NAN), (0.0, NAN), (NAN, 1.0), (1.0, NAN), (NAN, 0.0), (0.0, NAN), (1.0, NAN), (NAN, 1.0), (0.0, NAN)]


def answers_for(step: int, objective: str) -> list[Batch]:
    """Five micro-batches of judged answers."""
    rows = random_answers(9, seed=step)
    if objective == "kto":
        rows = relabelled(rows, _LABELS)
    return [make_answer_batch(rows[start : start + 2]) for start in range(0, len(rows), 2)]


def batches_for(model: Decoder, step: int) -> list[Batch]:
    """Five micro-batches of unlike sizes and weights, more than any axis divides evenly."""
    rule = model.spec.visibility
    lengths = [9, 14, 3, 21, 6, 11, 2, 17, 8]
    if isinstance(rule, PrefixLM):
        lengths = [length + 4 for length in lengths]
    samples = random_samples(lengths, seed=step, vocab_size=min(model.spec.vocab_size, 300))
    if isinstance(rule, PrefixLM):
        for sample in samples:
            sample.ids[2], sample.ids[3], sample.weights[:4] = rule.mask_ids[0], rule.start_id, 0
    return batches_of(samples, 2)


class FirstGradients(UpdateHooks):
    """Keeps the gradients of the first update."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def adjusted(self, grads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.grads:
            self.grads = {name: grad.clone() for name, grad in grads.items()}
        return grads


def steps(
    model: Decoder, ranks: Ranks, *, clip: float, objective: str
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of some updates, and the first gradients of the whole step, by name."""
    trained = [(name, ranks.local(p)) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(trained, AdamWSettings(weight_decay=0.1))  # type: ignore[arg-type]
    first, numbers, loss = FirstGradients(), [], OBJECTIVES[objective]()
    for step in range(STEPS):
        torch.manual_seed(step)
        batches = batches_for(model, step) if objective == "sft" else answers_for(step, objective)
        result = run_step(model, loss, batches, optimizer, lr=1e-3, max_grad_norm=clip, ranks=ranks, hooks=first)
        numbers.append((result.total / result.count, result.grad_norm))
    return numbers, first.grads


def compare(cases: Sequence[dict[str, Any]]) -> None:
    """Every case in turn, in the ranks that are running: a model, degrees and a stage.

    Tolerances: sums of fp32 products in another order. After an update AdamW divides by the root of the second moment,
    so a gradient near zero moves its weight by up to lr either way.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for case in cases:
        name, stage, rank = case["model"], case["stage"], case.get("lora_rank")
        reference = model_of(name, rank, case["objective"])
        expected, grads = steps(reference, ALONE, clip=0.5, objective=case["objective"])
        mesh = make_mesh(Degrees(**case["degrees"]), "cpu")
        model = model_of(name, rank, case["objective"])
        if stage != "none":
            shard(model, mesh, stage)
        ranks = MeshRanks.of(mesh, model, stage)
        found, own = steps(model, ranks, clip=0.5, objective=case["objective"])
        for (loss, norm), (loss_0, norm_0) in zip(found, expected, strict=True):
            assert abs(loss - loss_0) < 1e-5, (case, loss, loss_0)
            assert abs(norm - norm_0) < 1e-5 * max(1.0, norm_0), (case, norm, norm_0)
        whole = ranks.whole(own)
        twin = ranks.whole_model(model)
        if ranks.is_main:
            assert twin is not None
            assert whole.keys() == grads.keys()
            for key, grad in grads.items():
                scale = max(1.0, float(grad.abs().max()))
                assert float((whole[key] - grad).abs().max()) < 1e-5 * scale, (case, key)
            after = dict(twin.named_parameters())
            for key, parameter in reference.named_parameters():
                if parameter.requires_grad:
                    assert float((after[key] - parameter).abs().max()) < 1e-4, (case, key)
            print("equal", case, flush=True)
    dist.barrier()  # the first rank has the store that others may still need
    dist.destroy_process_group()


def reshard(layouts: Sequence[dict[str, Any]]) -> None:
    """Weights and states that lay in one layout lie in every other, bit for bit, and come back."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    generator = torch.Generator().manual_seed(5)
    whole = {
        f"{name}/exp_avg": torch.empty(p.shape).normal_(generator=generator)
        for name, p in tiny_decoder("qwen2").named_parameters()
    }
    for layout in layouts:
        mesh, model = make_mesh(Degrees(**layout["degrees"]), "cpu"), tiny_decoder("qwen2")
        if layout["stage"] != "none":
            shard(model, mesh, layout["stage"])
        ranks = MeshRanks.of(mesh, model, layout["stage"])
        own = ranks.own(whole)
        elements = sum(tensor.numel() for tensor in own.values())
        if layout["stage"] != "none":
            assert elements < 0.8 * sum(tensor.numel() for tensor in whole.values()), (layout, elements)
        again, twin = ranks.whole(own), ranks.whole_model(model)
        if ranks.is_main:
            assert twin is not None and again.keys() == whole.keys()
            assert all(torch.equal(again[name], tensor) for name, tensor in whole.items()), layout
            plain = dict(tiny_decoder("qwen2").named_parameters())
            assert all(torch.equal(p, plain[name]) for name, p in twin.named_parameters()), layout
            print("equal", layout, flush=True)
    dist.barrier()  # the first rank has the store that others may still need
    dist.destroy_process_group()
