"""Prefix tuning (Li and Liang 2021): keys and values in front of every document, in every layer.

The virtual tokens take positions 0 to P - 1; what a document says begins at P, as where transformers is given past keys
and values. Keys are trained as the attention sees them, so they are not turned by a rotation. Layers with a window see
the prefix as they see other tokens: from within the window only, as in PEFT. The suite has the same table.

Shapes: P virtual tokens, L layers, G kv heads, K head dim, D hidden, M width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.virtual import VirtualTokens, require_room, virtual_tokens
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError
from oarsmith.models.families import Family
from oarsmith.models.part import KeysAndValues
from oarsmith.models.spec import DecoderSpec, ResetAfter
from oarsmith.models.spec_parts import GQA

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

# Small beside what a trained model's keys and values are: at first the prefix only takes a share of the attention.
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class PrefixSpec:
    """A prefix.

    Args:
        size: of a layer's keys and of its values: kv heads, head dim.
        encoder: M, where the table is made by a small network of D inputs (``prefix_projection``), which trains more
            steadily; None: it trains itself.
        folded: it was made by a network that is not there any more.
    """

    num_virtual: int
    num_layers: int
    size: tuple[int, int]
    hidden: int
    encoder: int | None = None
    folded: bool = False
    dropout: float = 0.0

    what: ClassVar[str] = "prefix tuning"
    prefixes: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Of a row of the table: layer by layer its keys, its values."""
        return self.num_layers * 2 * self.size[0] * self.size[1]

    def build(self, spec: DecoderSpec) -> Prefix:
        return Prefix(self)


class Prefix(VirtualTokens):
    """``rows`` [P, L 2 G K] or, with an encoder, [P, D] and its two layers."""

    what = PrefixSpec.what
    unmergeable = "the prefix acts through the attention: no weights do the same"

    def __init__(self, spec: PrefixSpec) -> None:
        super().__init__(spec.num_virtual, encoded=spec.encoder is not None)
        self.spec = spec
        self.rows = nn.Parameter(torch.empty(spec.num_virtual, spec.width if spec.encoder is None else spec.hidden))
        if spec.encoder is not None:
            self.down = nn.Parameter(torch.empty(spec.encoder, spec.hidden))
            self.down_bias = nn.Parameter(torch.empty(spec.encoder))
            self.up = nn.Parameter(torch.empty(spec.width, spec.encoder))
            self.up_bias = nn.Parameter(torch.empty(spec.width))

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """Normal rows; the encoder's layers uniform within 1 / sqrt(inputs), as PyTorch's are."""
        for name, parameter in list(self.named_parameters()):
            drawn = torch.empty(parameter.shape)
            if name == "rows":
                drawn.normal_(0, _STD if self.spec.encoder is None else 1.0, generator=generator)
            else:
                bound = (self.spec.hidden if name.startswith("down") else self.spec.encoder or 1) ** -0.5
                drawn.uniform_(-bound, bound, generator=generator)
            setattr(self, name, nn.Parameter(drawn.to(model.device)))

    def virtual_rows(self) -> Tensor:
        if self.spec.encoder is None:
            return self.rows
        hidden_PM = functional.linear(self.rows, self.down, self.down_bias).tanh()
        return functional.linear(hidden_PM, self.up, self.up_bias)

    def virtual_keys(self) -> Sequence[KeysAndValues]:
        table_PN = functional.dropout(self.virtual_rows(), self.spec.dropout, self.training)
        pairs = table_PN.unflatten(1, (self.spec.num_layers, 2, *self.spec.size)).unbind(1)
        return [(pair[:, 0], pair[:, 1]) for pair in pairs]

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        """As PEFT has it for grouped heads: so many "attention heads", and all of them together as ``token_dim``."""
        heads, dim = self.spec.size
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.num_virtual,
            "num_transformer_submodules": 1,
            "num_layers": self.spec.num_layers,
            "num_attention_heads": heads,
            "token_dim": heads * dim,
            "encoder_hidden_size": self.spec.encoder or heads * dim,
            "prefix_projection": self.spec.folded or self.spec.encoder is not None,
        }


def prefix_size(spec: DecoderSpec) -> tuple[int, int]:
    """Kv heads and head dim of every layer.

    Raises:
        ConfigError: prefixes mean nothing to the model.
    """
    attentions = [layer.attention for layer in spec.layers]
    reason = None
    if not all(isinstance(attention, GQA) for attention in attentions):
        reason = "its attention does not keep the keys and values of its heads, which is what a prefix consists of"
    elif isinstance(spec.visibility, ResetAfter):
        reason = "it forgets all that was before certain tokens, and would forget the prefix too"
    sizes = {(attention.num_kv_heads, attention.head_dim) for attention in attentions if isinstance(attention, GQA)}
    if reason is None and len(sizes) > 1:
        reason = "its layers have heads of different sizes, and a prefix is a table of equal ones"
    if reason is not None:
        raise ConfigError(
            f"prefix tuning cannot be used with this model: {reason}",
            where="adapter_type",
            fix="use prompt_tuning or lora",
        )
    return next(iter(sizes))


def make_prefix(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> PrefixSpec:
    """A prefix as a configuration asks for it."""
    require_room(spec, keys.num_prefix_tokens, "num_prefix_tokens")
    encoder = (keys.prefix_projection_hidden_size or spec.hidden_size) if keys.prefix_projection else None
    return PrefixSpec(
        num_virtual=keys.num_prefix_tokens,
        num_layers=len(spec.layers),
        size=prefix_size(spec),
        hidden=spec.hidden_size,
        encoder=encoder,
        dropout=keys.prefix_dropout,
    )


def read_prefix(
    config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec
) -> PrefixSpec:
    """A prefix from a file: the table alone, also where an encoder made it."""
    config.refuse("modules_to_save")
    count = virtual_tokens(config, shapes)
    require_room(spec, count, "num_virtual_tokens")
    projected = config.flag("prefix_projection")
    return PrefixSpec(
        num_virtual=count,
        num_layers=len(spec.layers),
        size=prefix_size(spec),
        hidden=spec.hidden_size,
        folded=projected,
    )
