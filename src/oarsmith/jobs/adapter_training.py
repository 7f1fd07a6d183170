"""What some adapters need of a training run beside their forward and backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from rich.console import Console

from oarsmith.adapters.adalora import set_schedule
from oarsmith.adapters.adalora_ranks import RankAllocation, WithOrthogonality
from oarsmith.adapters.loraga import start_from_gradients
from oarsmith.adapters.lorapro import FullGradients
from oarsmith.config.adapters import AdapterKeys
from oarsmith.config.train import TrainConfig
from oarsmith.data.batch import Batch
from oarsmith.errors import TrainingError
from oarsmith.models.decoder import Decoder
from oarsmith.training.batches import BatchSource
from oarsmith.training.objective import Objective
from oarsmith.training.seeds import keyed_seed, seed_step
from oarsmith.training.update_hooks import UpdateHooks


def with_terms(config: AdapterKeys, objective: Objective) -> Objective:
    """An objective with what the adapter adds to the loss."""
    return WithOrthogonality(objective) if config.adapter_type == "adalora" else objective


def update_hooks(config: TrainConfig, model: Decoder, total: int) -> UpdateHooks:
    """What happens around the optimizer in a run of ``total`` updates.

    Raises:
        ConfigError: the run is too short for the method.
    """
    if isinstance(config, AdapterKeys):
        if config.adapter_type == "lorapro":
            return FullGradients(model)
        if config.adapter_type == "adalora":
            return RankAllocation(model, set_schedule(model, config, total))
    return UpdateHooks()


def rate_factors(config: TrainConfig, names: Iterable[str]) -> dict[str, float]:
    """What the learning rates of parameters are multiplied with: LoRA+ (Hayou et al. 2024) has B learn faster."""
    if not isinstance(config, AdapterKeys) or config.lora_plus_scale == 1:
        return {}
    return {name: config.lora_plus_scale for name in names if name.endswith(".lora_B")}


def prepare(config: TrainConfig, model: Decoder, objective: Objective, source: BatchSource, console: Console) -> None:
    """What comes before the first step of a run; a resumed one finds it in its checkpoint."""
    if not isinstance(config, AdapterKeys) or config.adapter_type != "loraga":
        return
    console.print(f"loraga: estimating gradients on the first {config.loraga_batches} batches")
    place = source.state()
    batches = list(itertools.islice(source, config.loraga_batches))
    source.load_state(place)
    count = sum(batch.num_trained for batch in batches)
    training = model.training

    def backward() -> None:
        # The scale does not matter to directions; fp16 needs one at which nothing overflows and little vanishes.
        scale = config.scale_loss if config.dtype == "fp16" else 1.0
        while not _finite_backward(config, model, objective, batches, scale / count):
            if scale <= 1:
                what = "the gradients that loraga starts from are not finite"
                raise TrainingError(what, fix="look for broken rows or weights, or train plain lora")
            scale /= 2

    start_from_gradients(model.train(), backward, keyed_seed(config.seed, "gradient", -1))
    model.train(training)


def _finite_backward(
    config: TrainConfig, model: Decoder, objective: Objective, batches: Sequence[Batch], scale: float
) -> bool:
    """Gradients of the batches together; False, and none, where they are not finite."""
    for index, batch in enumerate(batches):
        seed_step(config.seed, "gradient", index)
        objective(model, batch, scale).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    finite = all(bool(torch.isfinite(p.grad).all()) for p in trained if p.grad is not None)
    if not finite:
        for parameter in trained:
            parameter.grad = None
    return finite
