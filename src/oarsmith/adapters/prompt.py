"""Vectors in front of every document, which go through all layers: prompt tuning and P-tuning.

Prompt tuning (Lester et al. 2021) trains the vectors; P-tuning (Liu et al. 2021) trains a network that makes them, of
which a file has the vectors alone, as PEFT's do. They stand where scaled rows of the embedding's table do.

Shapes: P virtual tokens, E table row, M width of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.virtual import VirtualTokens, require_room, virtual_tokens
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError
from oarsmith.models.families import Family
from oarsmith.models.spec import DecoderSpec
from oarsmith.text import load_tokenizer

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

_LINEARS = {"mlp": 3, "lstm": 2}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The network of P-tuning: three linear layers, or an LSTM in both directions and two linear layers."""

    kind: Literal["mlp", "lstm"]
    width: int
    layers: int
    dropout: float


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Soft prompts.

    Args:
        size: E.
        scale: of the table's rows, which the vectors stand beside.
        start: ids whose rows the vectors begin as, ``sample_vocab`` (random ids) or ``random`` (random numbers).
        p_tuning: they are made by an encoder, or were.
    """

    num_virtual: int
    size: int
    scale: float = 1.0
    start: tuple[int, ...] | Literal["sample_vocab", "random"] = "random"
    p_tuning: bool = False
    encoder: Encoder | None = None

    prefixes: ClassVar[bool] = True

    @property
    def what(self) -> str:
        return "P-tuning" if self.p_tuning else "prompt tuning"

    def build(self, spec: DecoderSpec) -> SoftPrompt:
        return SoftPrompt(self)


class SoftPrompt(VirtualTokens):
    """``rows`` [P, E] and, with an encoder, its layers."""

    unmergeable = "its vectors stand before every text: no weights do the same"

    def __init__(self, spec: PromptSpec) -> None:
        super().__init__(spec.num_virtual, encoded=spec.encoder is not None)
        self.spec = spec
        self.what = spec.what
        self.rows = nn.Parameter(torch.empty(spec.num_virtual, spec.size))
        self.lstm: nn.LSTM | None = None
        self.linears = nn.ParameterDict()
        if spec.encoder is not None:
            inner, width = spec.size, spec.encoder.width
            if spec.encoder.kind == "lstm":
                layers, dropout = spec.encoder.layers, spec.encoder.dropout
                self.lstm = nn.LSTM(inner, width, layers, dropout=dropout, bidirectional=True, batch_first=True)
                inner = width = 2 * width
            count = _LINEARS[spec.encoder.kind]
            for index in range(count):
                out = spec.size if index == count - 1 else width
                self.linears[f"weight{index}"] = nn.Parameter(torch.empty(out, inner if index == 0 else width))
                self.linears[f"bias{index}"] = nn.Parameter(torch.empty(out))

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """The rows as the spec says; an encoder's normal, and its layers uniform as PyTorch's are."""
        encoder, table_VE = self.spec.encoder, model.embedding.weight
        if encoder is None:
            self.rows = nn.Parameter(self._start(table_VE, generator).to(model.device))
            return
        self.rows = nn.Parameter(torch.empty(self.rows.shape).normal_(generator=generator).to(model.device))
        for name in list(self.linears):
            weight = self.linears[f"weight{name[-1]}"]
            self._draw(self.linears, name, weight.shape[1] ** -0.5, model.device, generator)
        if self.lstm is not None:
            for name, _ in list(self.lstm.named_parameters()):
                self._draw(self.lstm, name, encoder.width**-0.5, model.device, generator)

    @staticmethod
    def _draw(owner: nn.Module, name: str, bound: float, device: torch.device, generator: torch.Generator) -> None:
        drawn = torch.empty(owner.get_parameter(name).shape).uniform_(-bound, bound, generator=generator)
        setattr(owner, name, nn.Parameter(drawn.to(device)))

    def _start(self, table_VE: Tensor, generator: torch.Generator) -> Tensor:
        count = self.num_virtual
        if self.spec.start == "random":
            deviation = float(table_VE.float().std()) * self.spec.scale
            return torch.empty(count, self.spec.size).normal_(0, deviation, generator=generator)
        if self.spec.start == "sample_vocab":
            ids = torch.randint(len(table_VE), (count,), generator=generator)
        else:
            ids = torch.tensor(self.spec.start).repeat(-(-count // len(self.spec.start)))[:count]
        return table_VE[ids.to(table_VE.device)].float() * self.spec.scale

    def virtual_rows(self) -> Tensor:
        x: Tensor = self.rows
        if self.lstm is not None:
            self.lstm.train(self.training)
            x = self.lstm(x[None])[0][0]
        count = len(self.linears) // 2
        for index in range(count):
            x = functional.linear(x, self.linears[f"weight{index}"], self.linears[f"bias{index}"])
            x = x if index == count - 1 else x.relu()
        return x

    def embedded(self, ids_T: Tensor, x_TE: Tensor) -> Tensor:
        rows_TE = self.virtual_rows().to(x_TE.dtype)[(-1 - ids_T).clamp_min(0)]
        return torch.where((ids_T < 0)[:, None], rows_TE, x_TE)

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        config: dict[str, Any] = {
            "peft_type": "P_TUNING" if self.spec.p_tuning else "PROMPT_TUNING",
            "num_virtual_tokens": self.num_virtual,
            "num_transformer_submodules": 1,
            "num_layers": len(model.spec.layers),
            "num_attention_heads": model.spec.layers[0].attention.num_heads,
            "token_dim": self.spec.size,
        }
        if not self.spec.p_tuning:
            return config | {"prompt_tuning_init": "RANDOM"}
        encoder = self.spec.encoder or Encoder(kind="mlp", width=self.spec.size, layers=2, dropout=0.0)
        return config | {
            "encoder_reparameterization_type": encoder.kind.upper(),
            "encoder_hidden_size": encoder.width,
            "encoder_num_layers": encoder.layers,
            "encoder_dropout": encoder.dropout,
        }


def make_prompt(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> PromptSpec:
    """Soft prompts as a configuration asks for them."""
    require_room(spec, keys.num_prompt_tokens, "num_prompt_tokens")
    start: tuple[int, ...] | Literal["sample_vocab", "random"] = keys.prompt_tuning_init
    encoder = None
    if keys.adapter_type == "p_tuning":
        encoder = Encoder(
            kind=keys.p_tuning_encoder,
            width=keys.p_tuning_hidden_size or spec.hidden_size,
            layers=keys.p_tuning_layers,
            dropout=keys.p_tuning_dropout,
        )
    elif keys.prompt_tuning_init_text is not None:
        start = tuple(load_tokenizer(base).encode(keys.prompt_tuning_init_text))
        if not start or max(start) >= spec.vocab_size:
            what = "prompt_tuning_init_text has no tokens, or some that the model has no rows for"
            raise ConfigError(what, where="prompt_tuning_init_text", fix="write another text")
    return PromptSpec(
        num_virtual=keys.num_prompt_tokens,
        size=spec.embedding.size,
        scale=spec.embedding.scale or 1.0,
        start=start,
        p_tuning=keys.adapter_type == "p_tuning",
        encoder=encoder,
    )


def read_prompt(
    config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec
) -> PromptSpec:
    """Soft prompts from a file: the vectors alone, also where an encoder made them."""
    config.refuse("modules_to_save")
    count = virtual_tokens(config, shapes)
    require_room(spec, count, "num_virtual_tokens")
    return PromptSpec(num_virtual=count, size=spec.embedding.size, p_tuning=config.peft_type == "P_TUNING")
