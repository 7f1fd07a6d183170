"""LoRA-GA (Wang, Yu and Li 2024): A and B start in the singular directions of W's gradient.

The gradient G of W, over a number of batches, is never formed. A LoRA pair on W has gradients that are products with
G: with B = 0 that of B is G A^T, with A = 0 that of A is B^T G. Rounds of backward passes that take an orthonormal
basis of the one for the other are the subspace iteration with which the authors' code finds G's singular vectors, in
the memory of a LoRA of four times the rank, for fused maps, experts and weights in fewer bits alike.

Shapes: I in features, O out features, q columns of the iteration, r rank; stacked maps have a leading axis of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from oarsmith.adapters.adapted import Adapted, adapted_maps
from oarsmith.adapters.change import Change, Size
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.started import Started
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder

# As in the authors' code: columns for each rank, and rounds after the first pair of passes.
_COLUMNS, _ROUNDS = 4, 4


@dataclass(frozen=True, kw_only=True)
class LoraGa(Started):
    """W + eta (B A - B0 A0), eta = alpha / sqrt(r), with U S V^T the gradient of W:

        A0 = c V[:, :r]^T, B0 = c U[:, r:2r], c = O^(1/4) / sqrt(gamma)

    This is algorithm 1 of the paper with its stable scale (both factors have c and none has S, unlike in PEFT).
    Until :func:`start_from_gradients` has been called it starts as LoRA does.
    """

    name: ClassVar[str] = "loraga"

    gamma: float = 16.0

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        if 2 * self.rank > min(size.out_features, size.in_features):
            raise ConfigError(
                f"loraga with rank {self.rank} needs {2 * self.rank} singular vectors, and a projection of "
                f"{size.in_features} to {size.out_features} features has fewer",
                where="lora_rank",
                fix="lower it, or leave such projections out of lora_target_modules",
            )
        return super().shapes(size)

    def start(self, weight_OI: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows, columns = weight_OI.shape
        a = torch.empty(self.rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        return a, torch.zeros(rows, self.rank)

    def from_gradient(self, u_Oq: Tensor, vt_qI: Tensor) -> tuple[Tensor, Tensor]:
        """A0 and B0 of the gradient's singular vectors."""
        factor = u_Oq.shape[0] ** 0.25 / self.gamma**0.5
        return factor * vt_qI[: self.rank], factor * u_Oq[:, self.rank : 2 * self.rank]


def make_loraga(keys: AdapterKeys) -> LoraGa:
    """LoRA-GA as a configuration asks for it; its scale is alpha / sqrt(r) in any case, as in the paper."""
    return LoraGa(
        rank=keys.lora_rank,
        alpha=keys.lora_alpha or 16.0,
        rslora=True,
        dropout=keys.lora_dropout,
        gamma=keys.loraga_gamma,
    )


@torch.no_grad()
def start_from_gradients(model: Decoder, backward: Callable[[], None], seed: int) -> None:
    """Give every LoRA-GA adapter of a model its start.

    Args:
        backward: adds the gradients of the loss, over always the same batches, to ``.grad`` of the parameters that
            train. Called ten times.
    """
    probes = [_Probe(module) for _, module in adapted_maps(model) if _ga(module)]
    generator = torch.Generator().manual_seed(seed)
    with _in_place(probes), torch.compiler.set_stance("force_eager"):
        for probe in probes:
            probe.draw(generator)
        for number in range(2 * _ROUNDS + 2):
            with torch.enable_grad():
                backward()
            for probe in probes:
                probe.advance(towards="a" if number % 2 else "b", last=number == 2 * _ROUNDS + 1)
    for probe in probes:
        probe.give()


def _ga(module: Adapted) -> dict[str, LoraGa]:
    return {name: change for name, change in module.changes.items() if isinstance(change, LoraGa)}


class _Probe:
    """LoRA pairs in place of a map's own adapters, and the bases they hold."""

    def __init__(self, module: Adapted) -> None:
        self.module, self.own, self.own_changes = module, module.adapter, module.changes
        self.ga = _ga(module)
        sizes = {s.name: (s.size, module.spec.in_features) for s in module.spec.segments}
        self.width = {name: min(_COLUMNS * change.rank, *sizes[name]) for name, change in self.ga.items()}
        lead = () if module.spec.experts is None else (module.spec.experts,)
        self.pairs = nn.ModuleDict()
        for name, width in self.width.items():
            shapes = {"lora_A": (*lead, width, sizes[name][1]), "lora_B": (*lead, sizes[name][0], width)}
            device = next(module.adapter.parameters()).device
            tensors = {key: nn.Parameter(torch.zeros(shape, device=device)) for key, shape in shapes.items()}
            self.pairs[name] = nn.ParameterDict(tensors)
        self.changes: dict[str, Change] = {name: Lora(rank=w, alpha=w) for name, w in self.width.items()}
        self.found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def draw(self, generator: torch.Generator) -> None:
        """Random directions for A."""
        for _, a, _ in self._each():
            # Drawn on the CPU: the same seed gives the same numbers on any device.
            drawn = torch.randn(a.mT.shape, generator=generator).to(a.device)
            a.copy_(torch.linalg.qr(drawn).Q.mT)

    def advance(self, *, towards: str, last: bool) -> None:
        """Take a basis of what the other matrix was multiplied with, and free the gradients."""
        for name, a, b in self._each():
            if towards == "b":
                b.copy_(torch.linalg.qr(_gradient(b)).Q)
                a.zero_()
            elif last:
                u, s, vt = torch.linalg.svd(_gradient(a), full_matrices=False)
                self.found[name] = (b @ u, s, vt)
            else:
                a.copy_(torch.linalg.qr(_gradient(a).mT).Q.mT)
                b.zero_()
            a.grad = b.grad = None

    def give(self) -> None:
        """Start the map's own adapters; one that the batches do not reach keeps the start of LoRA."""
        for index, sittings in enumerate(self.module.sittings()):
            for name, change in self.ga.items():
                u, s, vt = self.found[name]
                if self.module.spec.experts is not None:
                    u, s, vt = u[index], s[index], vt[index]
                if s[0] > 0:
                    change.begin(sittings[name], *change.from_gradient(u, vt))

    def _each(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        for name in self.width:
            pair = self.pairs[name]
            yield name, pair.get_parameter("lora_A"), pair.get_parameter("lora_B")


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def _in_place(probes: list[_Probe]) -> Iterator[None]:
    for probe in probes:
        probe.module.adapter, probe.module.changes = probe.pairs, probe.changes
    try:
        yield
    finally:
        for probe in probes:
            probe.module.adapter, probe.module.changes = probe.own, probe.own_changes
