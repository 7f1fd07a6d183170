"""What prefix tuning and soft prompts share: a table of virtual tokens, which a network may make, and its file.

Shapes: P virtual tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from oarsmith.adapters.part import AdapterPart
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

STORED = "prompt_embeddings"


class VirtualTokens(AdapterPart):
    """``rows`` [P, their width] are the table; where an encoder makes it, they are what goes in.

    Args:
        encoded: there is an encoder, whose parameters stand beside ``rows``.
    """

    rows: nn.Parameter

    def __init__(self, num_virtual: int, *, encoded: bool) -> None:
        super().__init__()
        self.num_virtual = num_virtual
        self._encoded = encoded

    @abstractmethod
    def virtual_rows(self) -> Tensor:
        """[P, a virtual token's numbers] in fp32."""

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        return {STORED: self.virtual_rows()}

    def exact(self) -> Mapping[str, Tensor]:
        return dict(self.named_parameters()) if self._encoded else {}

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        if not self._encoded:
            self.rows.copy_(found[STORED])
            return
        if any(name not in found for name, _ in self.named_parameters()):
            raise CheckpointError(
                f"the file of {self.what} holds what its encoder made, and training goes on from the encoder itself",
                where=STORED,
                fix="keep adapter_exact.safetensors beside it",
            )
        for name, parameter in self.named_parameters():
            parameter.copy_(found[name])


def require_room(spec: DecoderSpec, count: int, key: str) -> None:
    """Refuse virtual tokens that leave no room.

    Raises:
        ConfigError: they fill the context.
    """
    if count >= spec.max_positions:
        what = f"{count} virtual tokens leave nothing of the model's context of {spec.max_positions}"
        raise ConfigError(what, where=key, fix="lower it")


def virtual_tokens(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many a file has, which config and table agree on.

    Raises:
        CheckpointError: they do not, or there is no table.
    """
    shape = shapes.get(STORED)
    if shape is None or len(shape) != 2:
        what = f"tensor {STORED} is missing" if shape is None else f"tensor {STORED} has shape {shape}"
        raise CheckpointError(what, where=config.where)
    count = config.whole("num_virtual_tokens", shape[0])
    if config.whole("num_transformer_submodules", 1) != 1 or count != shape[0]:
        what = f"tensor {STORED} has {shape[0]} rows, the config speaks of {count} tokens"
        raise CheckpointError(what, where=config.where, fix="both must be of the same adapter")
    return count
