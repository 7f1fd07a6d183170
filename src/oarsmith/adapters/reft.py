"""Representation finetuning: edits of hidden states after layers, at some tokens of each prompt (Wu et al. 2024).

LoReFT, equation 2: h + R^T (act(W h + b) - R h), with orthonormal rows of R. TinyReFT, the suite's: h + A a B b, with
matrices A and B and vectors a and b. Tokens are counted as the authors' code does: the first and last ones, each at
most half of the prompt, so that none is edited twice; answers are not edited, except through what they see.

In training the prompt is what stands before the first token that is trained on; a text that is trained on from its
beginning has none. PEFT has no files for it: ours are a config of type REFT, and for each layer ``rotate`` (R),
``source`` (W), ``bias`` (b), or ``down`` (A), ``up`` (B), ``down_scale``, ``up_scale``, under ``base_model.reft.N.``.

Shapes: T tokens, N edited ones, D hidden, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.part import AdapterPart
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.families import Family
from oarsmith.models.layout import Layout
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

_PREFIX = "base_model.reft."
Kind = Literal["loreft", "tiny"]
Act = Literal["linear", "relu"]


@dataclass(frozen=True, kw_only=True)
class ReftSpec:
    """Edits after some layers.

    Args:
        first, last: so many tokens of a prompt.
    """

    layers: tuple[int, ...]
    hidden: int
    rank: int
    first: int
    last: int
    kind: Kind = "loreft"
    act: Act = "linear"
    bias: bool = False
    dropout: float = 0.0

    what: ClassVar[str] = "ReFT"
    num_virtual: ClassVar[int] = 0
    # Which tokens are edited follows from where the prompt ends.
    prefixes: ClassVar[bool] = False

    def build(self, spec: DecoderSpec) -> Reft:
        return Reft(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a layer's tensors."""
        if self.kind == "tiny":
            matrices = {"down": (self.rank, self.hidden), "up": (self.hidden, self.rank)}
            return {**matrices, "down_scale": (self.rank,), "up_scale": (self.hidden,)}
        both = {"rotate": (self.rank, self.hidden), "source": (self.rank, self.hidden)}
        return both | ({"bias": (self.rank,)} if self.bias else {})


class Reft(AdapterPart):
    """``tables[layer][tensor]``; of R any matrix with the same rows' span, of which R is made anew in each call."""

    what = ReftSpec.what
    unmergeable = "it edits some tokens only: no weights do the same"

    def __init__(self, spec: ReftSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tables = nn.ModuleDict(
            {
                str(layer): nn.ParameterDict({name: torch.empty(*shape) for name, shape in spec.shapes().items()})
                for layer in spec.layers
            }
        )
        self._known: tuple[Layout, Tensor] | None = None

    def _table(self, layer: int) -> nn.ParameterDict:
        table = self.tables[str(layer)]
        assert isinstance(table, nn.ParameterDict), layer
        return table

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """LoReFT with W = R and no bias, TinyReFT with B = 0: states stay as they are.

        The authors begin with a random W, and so with changed states.
        """
        for layer in self.spec.layers:
            table = self._table(layer)
            for name, shape in self.spec.shapes().items():
                value = torch.zeros(shape)
                if name == "rotate":
                    value = orthonormal(torch.empty(shape).normal_(generator=generator))
                elif name == "source":
                    value = table["rotate"].detach().cpu()
                elif name == "down":
                    value.uniform_(-(self.spec.hidden**-0.5), self.spec.hidden**-0.5, generator=generator)
                elif name.endswith("_scale"):
                    value.fill_(1)
                table[name] = nn.Parameter(value.to(model.device))

    def after_layer(self, layer: int, x_TD: Tensor, layout: Layout) -> Tensor:
        if layer not in self.spec.layers:
            return x_TD
        index_N = self._edited(layout)
        if not len(index_N):
            return x_TD
        return x_TD.index_copy(0, index_N, self.edit(layer, x_TD[index_N]))

    def edit(self, layer: int, h_ND: Tensor) -> Tensor:
        """States after the edit, computed in fp32 and in the dtype of the model."""
        on, h = self._table(layer), h_ND.float()
        if self.spec.kind == "tiny":
            inner = functional.linear(h, on["down"]) * on["down_scale"]
            edited = h + functional.linear(inner, on["up"]) * on["up_scale"]
        else:
            rotate_rD = orthonormal(on["rotate"])
            target = functional.linear(h, on["source"], on["bias"] if self.spec.bias else None)
            target = target.relu() if self.spec.act == "relu" else target
            edited = h + (target - functional.linear(h, rotate_rD)) @ rotate_rD
        return functional.dropout(edited, self.spec.dropout, self.training).to(h_ND.dtype)

    def _edited(self, layout: Layout) -> Tensor:
        """Where the edited tokens of a call are; the same for all of its layers."""
        if self._known is None or self._known[0] is not layout:
            found: list[int] = []
            asked = layout.asked
            if asked is None:
                asked = tuple(piece.stop - piece.start if piece.old == 0 else 0 for piece in layout.pieces)
            for piece, prompt in zip(layout.pieces, asked, strict=False):  # nobody asks what only fills up a call
                first, last = (min(count, prompt // 2) for count in (self.spec.first, self.spec.last))
                places = [*range(first), *range(prompt - last, prompt)]
                shift = piece.start - piece.old
                found += [at + shift for at in places if piece.start <= at + shift < piece.stop]
            self._known = layout, torch.tensor(found, dtype=torch.int64, device=layout.positions_T.device)
        return self._known[1]

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        found = {}
        for layer in self.spec.layers:
            for name, tensor in self._table(layer).items():
                found[f"{_PREFIX}{layer}.{name}"] = orthonormal(tensor) if name == "rotate" else tensor
        return found

    def exact(self) -> Mapping[str, Tensor]:
        """What R is made of: a step of training moves that."""
        return {f"{layer}.rotate": self._table(layer)["rotate"] for layer in self.spec.layers if self._rotates}

    @property
    def _rotates(self) -> bool:
        return self.spec.kind == "loreft"

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        for layer in self.spec.layers:
            for name, tensor in self._table(layer).items():
                tensor.copy_(found.get(f"{layer}.{name}", found[f"{_PREFIX}{layer}.{name}"]))

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        spec = self.spec
        parts = [f"{letter}{count}" for letter, count in (("f", spec.first), ("l", spec.last)) if count]
        return {
            "peft_type": "REFT",
            "layers": list(spec.layers),
            "position": "+".join(parts),
            "intervention_type": spec.kind,
            "r": spec.rank,
            "act_fn": spec.act,
            "add_bias": spec.bias,
            "dropout": spec.dropout,
        }


def orthonormal(raw_rD: Tensor) -> Tensor:
    """Orthonormal rows with the span of the given ones: Q of the QR decomposition whose R has a positive diagonal, so
    that a matrix with orthonormal rows stays as it is."""
    q_Dr, upper_rr = torch.linalg.qr(raw_rD.float().t())
    return (q_Dr * upper_rr.diagonal().sign()).t()


def parse_position(text: str) -> tuple[int, int] | None:
    """How many first and last tokens ``f7+l7`` asks for; None: it is nothing of the kind."""
    found = re.fullmatch(r"(?:f(\d{1,4}))?\+?(?:l(\d{1,4}))?", text)
    if found is None or ("+" in text) != (found[1] is not None and found[2] is not None):
        return None
    first, last = int(found[1] or 0), int(found[2] or 0)
    return (first, last) if first + last else None


def make_reft(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> ReftSpec:
    """Edits as a configuration asks for them."""
    number = len(spec.layers)
    names = [name for name in keys.reft_layers if name != "all"]
    if any(not name.isdecimal() or int(name) >= number for name in names):
        what = f"reft_layers is {', '.join(names)}; the model has layers 0 to {number - 1}"
        raise ConfigError(what, where="reft_layers", fix="give numbers separated by commas, or all")
    if keys.lora_rank > spec.hidden_size:
        what = f"a subspace of {keys.lora_rank} dimensions does not fit into states of {spec.hidden_size}"
        raise ConfigError(what, where="lora_rank", fix="lower it")
    counts = parse_position(keys.reft_position)
    if counts is None:
        raise ConfigError(f"{keys.reft_position!r} names no token", where="reft_position", fix="write f7+l7, f3 or l1")
    return ReftSpec(
        layers=tuple(sorted({int(name) for name in names})) or tuple(range(number)),
        hidden=spec.hidden_size,
        rank=keys.lora_rank,
        first=counts[0],
        last=counts[1],
        kind=keys.reft_intervention_type,
        act=keys.reft_act_fn,
        bias=keys.reft_add_bias,
        dropout=keys.reft_dropout,
    )


def read_reft(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec) -> ReftSpec:
    """Edits from a file."""
    layers, counts = config.values.get("layers"), parse_position(str(config.values.get("position")))
    if not isinstance(layers, list) or not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise CheckpointError(f"{layers!r} is no list of layers", where=f"{config.where}: layers")
    if max(layers) >= len(spec.layers):
        what = f"the adapter edits layer {max(layers)}, which the base model does not have"
        raise CheckpointError(what, where=config.where, fix="use the adapter's own base model")
    if counts is None:
        raise CheckpointError(f"{config.values.get('position')!r} names no token", where=f"{config.where}: position")
    kind: Any = config.values.get("intervention_type", "loreft")
    act: Any = config.values.get("act_fn") or "linear"
    if kind not in get_args(Kind) or act not in get_args(Act):
        raise CheckpointError(f"edits of kind {kind!r} with {act!r} are not known", where=config.where)
    return ReftSpec(
        layers=tuple(sorted(set(layers))),
        hidden=spec.hidden_size,
        rank=config.whole("r", 8),
        first=counts[0],
        last=counts[1],
        kind=kind,
        act=act,
        bias=config.flag("add_bias"),
        dropout=config.share("dropout"),
    )
