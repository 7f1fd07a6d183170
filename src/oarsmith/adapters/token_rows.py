"""Single rows of the embedding that train (PEFT's trainable tokens), alone or beside changes of projections.

PEFT calls the rows deltas, but they are whole rows: they take the place of the table's. Where the head is tied to the
table it has them too.

Shapes: T tokens, N rows, V vocabulary, E table row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from oarsmith.adapters.ends import EndsSpec
from oarsmith.adapters.part import AdapterPart
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.families import Family
from oarsmith.models.spec import DecoderSpec
from oarsmith.text import load_tokenizer

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

ENDING = "trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class TokenRowsSpec:
    """Rows of the table.

    Args:
        ids: the tokens they belong to.
        module: what the family calls the embedding.
        beside: the file has changes of projections too.
        copies: names under which it holds the rows again, for a head that is tied to the table.
    """

    ids: tuple[int, ...]
    size: int
    module: str
    beside: bool
    copies: tuple[str, ...] = ()

    what: ClassVar[str] = "trainable tokens"
    num_virtual: ClassVar[int] = 0
    prefixes: ClassVar[bool] = True

    def build(self, spec: DecoderSpec) -> TokenRows:
        return TokenRows(self)


class TokenRows(AdapterPart):
    """``rows`` [N, E]."""

    what = TokenRowsSpec.what

    def __init__(self, spec: TokenRowsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.rows = nn.Parameter(torch.empty(len(spec.ids), spec.size))
        self._places: Tensor | None = None

    def _ids(self) -> Tensor:
        return torch.tensor(self.spec.ids, device=self.rows.device)

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """The base's own."""
        self.rows = nn.Parameter(model.embedding.weight.detach()[self._ids().to(model.device)].float())

    def looked_up(self, ids_T: Tensor, x_TE: Tensor) -> Tensor:
        place_T = self._place_of(ids_T)
        rows_TE = self.rows.to(x_TE.dtype)[place_T.clamp_min(0)]
        return torch.where((place_T >= 0)[:, None], rows_TE, x_TE)

    def _place_of(self, ids_T: Tensor) -> Tensor:
        """The number of the row that each token has; -1: none."""
        size = max(self.spec.ids) + 1
        if self._places is None or self._places.device != ids_T.device:
            self._places = torch.full((size + 1,), -1, device=ids_T.device)
            self._places[self._ids().to(ids_T.device)] = torch.arange(len(self.spec.ids), device=ids_T.device)
        # The last entry is for all other ids.
        return self._places[torch.where((ids_T >= 0) & (ids_T < size), ids_T, size)]

    def table(self, weight_VE: Tensor) -> Tensor:
        return weight_VE.index_copy(0, self._ids(), self.rows.to(weight_VE.dtype))

    def _name(self) -> str:
        inner = "token_adapter." if self.spec.beside else ""
        return f"base_model.model.{self.spec.module}.{inner}{ENDING}"

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        return dict.fromkeys((self._name(), *self.spec.copies), self.rows)

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        self.rows.copy_(found[self._name()])
        for name in self.spec.copies:
            if not torch.equal(found[name], found[self._name()]):
                what = "the rows of the head differ from those of the embedding, but the two are tied"
                raise CheckpointError(what, where=name, fix="use the adapter's own base model")

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        ids, leaf = list(self.spec.ids), self.spec.module.rsplit(".", 1)[-1]
        if self.spec.beside:
            return {"trainable_token_indices": {leaf: ids}}
        return {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids, "target_modules": [leaf], "init_weights": True}

    def merge(self, model: Decoder) -> None:
        model.embedding.weight[self._ids()] = self.rows.to(model.embedding.weight.dtype)


def embedding_name(family: Family, spec: DecoderSpec) -> str:
    """What the family calls the embedding."""
    found = next(place.file for place in family.names(spec).places if place.parameter == "embedding.weight")
    return found.removesuffix(".weight")


def _require_own(spec: DecoderSpec) -> None:
    """Refuse rows beside a change of the matrix that they are rows of: which of the two they would have is unclear.

    Raises:
        ConfigError: there is one.
    """
    for part in spec.parts:
        if isinstance(part, EndsSpec) and (part.embedding is not None or spec.head.tied):
            raise ConfigError(
                "single rows cannot train beside an adapter on the matrix that has them",
                where="trainable_tokens",
                fix="leave the embedding and a head tied to it out of lora_target_modules, or trainable_tokens out",
            )


def make_token_rows(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> TokenRowsSpec:
    """Rows as a configuration names them."""
    _require_own(spec)
    names = [name for name in keys.trainable_tokens if not name.isdecimal()]
    tokenizer = load_tokenizer(base) if names else None
    ids: list[int] = []
    for name in keys.trainable_tokens:
        index = int(name) if name.isdecimal() else None if tokenizer is None else tokenizer.token_to_id(name)
        if index is None or index >= spec.vocab_size:
            what = f"{name!r} is no token of this model, which has rows for {spec.vocab_size}"
            raise ConfigError(what, where="trainable_tokens", fix="give ids, or tokens as the tokenizer spells them")
        ids.append(index)
    return TokenRowsSpec(
        ids=tuple(dict.fromkeys(ids)),
        size=spec.embedding.size,
        module=embedding_name(family, spec),
        beside=keys.adapter_type != "trainable_tokens",
    )


def read_token_rows(
    config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec
) -> TokenRowsSpec:
    """Rows from a file."""
    _require_own(spec)
    alone = config.peft_type == "TRAINABLE_TOKENS"
    key = "token_indices" if alone else "trainable_token_indices"
    value, name = config.values.get(key), embedding_name(family, spec)
    leaf, where = name.rsplit(".", 1)[-1], f"{config.where}: {key}"
    others = [held for held in shapes if held.endswith(f".{ENDING}") and f".{name}." not in held]
    copies: tuple[str, ...] = ()
    if spec.head.tied and len(others) == 1:
        copies, others = (others[0],), []
    if isinstance(value, dict) and set(value) <= {leaf, name, "embed_tokens"}:
        value = next(iter(value.values()), None)
    if others or isinstance(value, dict):
        what = f"rows of other parts than the embedding {name} cannot be trained here"
        raise CheckpointError(what, where=where, fix="train rows of the embedding alone")
    if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
        raise CheckpointError(f"{value!r} is no list of different token ids", where=where)
    if not all(type(index) is int and 0 <= index < spec.vocab_size for index in value):
        what = f"ids outside the model's vocabulary of {spec.vocab_size}"
        raise CheckpointError(what, where=where, fix="use the adapter's own base model")
    return TokenRowsSpec(ids=tuple(value), size=spec.embedding.size, module=name, beside=not alone, copies=copies)
