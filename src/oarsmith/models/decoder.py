"""The decoder: embedding, blocks, final norm, head. One class for every family.

Shapes: B rows, T tokens (of a row or of the stream), D hidden, V vocabulary, N chosen tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith import kernels
from oarsmith.errors import ModelError
from oarsmith.models import front, visibility
from oarsmith.models.block import Block
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.embedding import Embedding
from oarsmith.models.head import Head
from oarsmith.models.layout import Cache, KVCache, Layout
from oarsmith.models.norm import build_norm
from oarsmith.models.part import Part
from oarsmith.models.position import position_tables
from oarsmith.models.recompute import Recompute, run
from oarsmith.models.shifted import ShiftedSparse
from oarsmith.models.spec import DecoderSpec


class Decoder(nn.Module):
    """Built from a spec; weights are not initialised here (see ``init.py`` and ``checkpoint``).

    Attributes:
        spec: what was built.
        config: the ``config.json`` the spec came from, kept so that saving writes back what was read.
        generation_config: text of the ``generation_config.json`` beside it, kept for the same reason.
        file_names: family name -> name in the file it was read from, where the file omits a prefix.
        recompute: what backward computes again instead of keeping it; None: nothing.
        neftune_alpha: size of the noise on the embeddings in training (see ``neftune_noise``); None: none.
        shifted: LongLoRA's sparse attention, in training only; None: full attention.
    """

    def __init__(self, spec: DecoderSpec, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.config = dict(config)
        self.generation_config: str | None = None
        self.file_names: dict[str, str] = {}
        self.recompute: Recompute | None = None
        self.neftune_alpha: float | None = None
        self.shifted: ShiftedSparse | None = None
        self.embedding = Embedding(spec.embedding, spec.vocab_size)
        self.layers = nn.ModuleList(Block(layer, index) for index, layer in enumerate(spec.layers))
        self.final_norm = build_norm(spec.final_norm) if spec.final_norm is not None else None
        self.head = Head(spec.head, spec.vocab_size, spec.hidden_size)
        self.parts = nn.ModuleList(part.build(spec) for part in spec.parts)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.embedding.weight.device

    def hidden(self, input_ids_T: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states [T, D] of a token stream before the final norm.

        Without a cache, a document that nobody sees rounds up the number of tokens (see ``kernels.rows_to_add``), and
        the virtual tokens of parts are added; with one, they are in the stream.
        """
        parts = [part for part in self.own_parts() if part.enabled]
        lead = next((part for part in parts if part.num_virtual), None)
        keys = None if lead is None else lead.virtual_keys()
        own_T = None
        if lead is not None and keys is None and cache is None:
            input_ids_T, layout, own_T = front.put_before(input_ids_T, layout, lead.num_virtual)
        marked = cache if isinstance(cache, KVCache) else None
        ids_E = input_ids_T if layout.branches is None else input_ids_T[layout.branches.source_E]
        layout = layout.with_whole(
            lambda whole: visibility.apply(self.spec.visibility, ids_E, whole, marked, self.training)
        )
        if self.shifted is not None and self.training:
            layout = layout.with_whole(self.shifted.apply)
        if keys is not None:
            whole = cache is None
            layout = front.moved(layout, len(keys[0][0])) if whole else front.instead_of_own(layout, input_ids_T, keys)
        x_TD = self.embedding(input_ids_T, layout, self.neftune_alpha if self.training else None, parts)
        added = kernels.rows_to_add(len(x_TD)) if cache is None else 0
        if added:
            x_TD, layout = functional.pad(x_TD, (0, 0, 0, added)), layout.followed_by(added)
        if keys is not None and cache is None:
            layout = front.with_keys(layout, keys)
        rules = {layer.attention.position for layer in self.spec.layers} - {None}
        tables = position_tables([rule for rule in rules if rule is not None], layout, self.training)
        recompute = self.recompute if torch.is_grad_enabled() and cache is None else None
        for index, block in enumerate(self.layers):
            part = None if recompute is None else recompute.of_layer(index)
            x_TD = run(block, x_TD, layout, tables, cache, part, again=part == "full")
            for other in parts:
                x_TD = other.after_layer(index, x_TD, layout)
        if added:
            x_TD = x_TD[: len(input_ids_T)]
        return x_TD if own_T is None else x_TD[own_T]

    def final(self, hidden_ND: Tensor) -> Tensor:
        """What the output matrix reads: final norm and head rule applied."""
        return self.head.inputs(hidden_ND if self.final_norm is None else self.final_norm(hidden_ND))

    def _head_products(self, hidden_ND: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Inputs [N, I] and matrices [V, I] whose products add up to the logits; the first is the model's own."""
        inputs_ND = self.final(hidden_ND)
        table_VE: Tensor = self.embedding.weight
        parts = [part for part in self.own_parts() if part.enabled]
        if self.spec.head.tied:
            for part in parts:
                table_VE = part.table(table_VE)
        added = [part.beside_matrix(inputs_ND) for part in parts]
        return [(inputs_ND, self.head.matrix(table_VE)), *(pair for pair in added if pair is not None)]

    def head_inputs(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied with the output matrix, and the matrix [V, D]; what parts add is more columns of both."""
        products = self._head_products(hidden_ND)
        if len(products) == 1:
            return products[0]
        inputs, matrices = zip(*products, strict=True)
        return torch.cat(inputs, -1), torch.cat(matrices, -1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of chosen hidden states."""
        own_NV, *added = (functional.linear(*product) for product in self._head_products(hidden_ND))
        return self.head.bend(sum(added, own_NV))

    def scores(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N, S] of chosen hidden states in fp32, by a head that has some (``HeadSpec.num_scores``)."""
        assert self.spec.head.num_scores is not None, "the head gives logits"
        inputs_ND, weight_SD = self.head_inputs(hidden_ND)
        return functional.linear(inputs_ND.float(), weight_SD.float())

    def head_loss(
        self, hidden_ND: Tensor, targets_N: Tensor, coef_N: Tensor, *, z_loss: float = 0.0
    ) -> kernels.HeadResult:
        """sum_n coef_n * -log p(target_n) of chosen hidden states, without their logits (see ``kernels.head_loss``)."""
        inputs_ND, weight_VD = self.head_inputs(hidden_ND)
        softcap = self.spec.head.softcap
        return kernels.head_loss(inputs_ND, weight_VD, targets_N, coef_N, softcap=softcap, z_loss=z_loss)

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, documents: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [B, T, V] of token ids [B, T], every row causal and on its own.

        Args:
            positions: [B, T]; by default each row (or document) counts from 0.
            documents: borders of documents within each row (``[0, ..., T]``), which then cannot see each other.

        Raises:
            ModelError: ids outside the vocabulary, more tokens than a learned position table holds, or positions or
                documents that do not fit the ids.
        """
        if input_ids.dim() != 2:
            raise ModelError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}", fix="add a batch axis")
        rows, length = input_ids.shape
        self._check_ids(input_ids)
        borders = [0, length] if documents is None else list(documents)
        if borders[:1] != [0] or borders[-1] != length or borders != sorted(borders):
            raise ModelError(f"documents {borders} do not run from 0 to {length}", fix="pass [0, ..., T] in order")
        bounds = [0] + [row * length + border for row in range(rows) for border in borders[1:]]
        if positions is None:
            sizes = [b - a for a, b in pairwise(bounds)]
            positions = torch.cat([torch.arange(size, device=input_ids.device) for size in sizes])
        elif positions.shape != input_ids.shape:
            raise ModelError(
                f"positions of shape {tuple(positions.shape)} do not fit input_ids of shape {tuple(input_ids.shape)}",
                fix="pass one position for each token",
            )
        hidden_TD = self.hidden(input_ids.flatten(), Layout.documents(bounds, positions.flatten()))
        return self.logits(hidden_TD).unflatten(0, (rows, length))

    def new_cache(
        self, num_sequences: int, block_size: int, num_pages: int | None = None, *, form: CacheForm | None = None
    ) -> KVCache:
        """An empty key/value cache that fits this decoder.

        Args:
            block_size: tokens of a page.
            num_pages: their number, none of them in the table yet; not given: each sequence has one page of its own.
            form: keep keys and values in 8 bits, in this way.
        """
        cache = KVCache(
            [block.attention.cache_shape for block in self.blocks()],
            num_sequences=num_sequences,
            num_pages=num_sequences if num_pages is None else num_pages,
            block_size=block_size,
            dtype=self.embedding.weight.dtype,
            device=self.device,
            form=form,
        )
        if num_pages is None:
            cache.pages = [[number] for number in range(num_sequences)]
        return cache

    def own_parts(self) -> Iterator[Part]:
        """What rewrites have added, typed."""
        for part in self.parts:
            assert isinstance(part, Part)
            yield part

    def blocks(self) -> Iterator[Block]:
        """The layers, typed."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.numel() == 0:
            raise ModelError("input_ids is empty", fix="pass at least one token")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise ModelError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.spec.vocab_size}",
                fix="use the tokenizer that belongs to this model",
            )
