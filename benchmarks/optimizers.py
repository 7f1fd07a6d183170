"""What the update rules cost: CPU time a step and bytes of state a parameter, beside PyTorch's own optimizers.

    python benchmarks/optimizers.py --layers 4

A Llama-like decoder of SmolLM2-135M's width in bf16, without its embedding (which is AdamW's everywhere); gradients
are random. Rules take turns on one thread, and the least CPU time of the rounds counts: a busy machine harms little.
PyTorch's optimizers have fp32 weights, which they need to keep updates that bf16 would lose. GaLore's new projections
(every 200 steps) are not in the figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.models.decoder import Decoder
from oarsmith.models.families import build_spec
from oarsmith.training.optimizer import (
    AdafactorSettings,
    Adam8bit,
    AdamMini,
    AdamW,
    AdamWSettings,
    ApolloSettings,
    GaLoreSettings,
    MuonSettings,
    Optimizer,
    adafactor,
    apollo,
    block_matrices,
    fused_matrices,
    galore,
    muon,
    step_size_units,
)

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer: ``step`` makes an update, ``state`` are bytes beside weights and gradients."""

    step: Callable[[], object]
    state: int


def ours(model: Decoder) -> dict[str, Callable[[Named], Optimizer]]:
    adam = AdamWSettings(weight_decay=0.1)
    matrices = block_matrices(model)
    return {
        "adamw": lambda named: AdamW(named, adam),
        "adamw_8bit": lambda named: Adam8bit(named, adam),
        "adamw_mini": lambda named: AdamMini(named, adam, step_size_units(model)),
        "adafactor": lambda named: adafactor(named, AdafactorSettings(), fused_matrices(model)),
        "muon": lambda named: muon(named, MuonSettings(others=adam), matrices),
        "galore": lambda named: galore(named, GaLoreSettings(adam=adam), matrices),
        "apollo": lambda named: apollo(named, ApolloSettings(adam=adam), matrices),
        "apollo_mini": lambda named: apollo(named, ApolloSettings(rank=1, scaling="tensor", adam=adam), matrices),
    }


def our_entry(model: Decoder, grads: Mapping[str, Tensor], make: Callable[[Named], Optimizer]) -> Entry:
    named = [(name, nn.Parameter(p.detach().clone())) for name, p in model.named_parameters()]
    optimizer = make(named)
    optimizer.step(grads, lr=1e-4, grad_scale=1.0)
    state = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.state_tensors().values())
    return Entry(step=lambda: optimizer.step(grads, lr=1e-4, grad_scale=1.0), state=state)


def their_entry(
    model: Decoder, grads: Mapping[str, Tensor], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Entry:
    parameters = [nn.Parameter(p.detach().float()) for _, p in model.named_parameters() if p.dim() == 2]
    for parameter, (name, _) in zip(
        parameters, ((n, p) for n, p in model.named_parameters() if p.dim() == 2), strict=True
    ):
        parameter.grad = grads[name].float()
    optimizer = make(parameters)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    # The fp32 weights are weights and masters at once: 2 bytes more than bf16.
    state = sum(t.numel() * t.element_size() for t in tensors) + 2 * sum(p.numel() for p in parameters)
    return Entry(step=optimizer.step, state=state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = {**CONFIG, "num_hidden_layers": arguments.layers}
    model = Decoder(build_spec(config)[1], config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    grads = {name: (torch.randn(p.shape) * 1e-3).bfloat16() for name, p in model.named_parameters()}
    entries = {name: our_entry(model, grads, make) for name, make in ours(model).items()}
    entries["torch AdamW, fused"] = their_entry(model, grads, lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True))
    entries["torch Muon"] = their_entry(model, grads, lambda p: torch.optim.Muon(p, lr=1e-4))
    times: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(arguments.rounds):
        for name, entry in entries.items():
            start = time.process_time()
            entry.step()
            times[name].append(time.process_time() - start)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters, 1 thread, least of {arguments.rounds} steps\n")
    print(f"| {'rule':20} | CPU ms a step | ns a parameter | state, bytes a parameter |\n|---|---|---|---|")
    for name, entry in entries.items():
        seconds = min(times[name])
        print(f"| {name:20} | {seconds * 1e3:13.1f} | {seconds / count * 1e9:14.2f} | {entry.state / count:24.2f} |")


if __name__ == "__main__":
    main()
