"""What a quantized model still is of its original: perplexity, KL divergence, agreement, on text of its own.

Both are read from their files and walked a layer at a time. Shapes: N places, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.streamed import Streamer
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.quantize.walk import Keys, Stream, Tap, embed, make_batches, run_block

# Places whose logits exist at a time: 50 MB of a vocabulary of 50,000.
_PLACES = 256
_BATCH_TOKENS = 2048

Rounding = Callable[[Decoder, int], tuple[dict[str, Tap], Keys | None]]
"""From a decoder and a layer's number to what rounds the inputs of its maps, and its keys and values."""


@dataclass(frozen=True)
class Comparison:
    """A model beside its original on the same windows of a text.

    Attributes:
        perplexity: exp of the mean -log p of the next token, and ``original`` that of the original.
        kl: mean KL(original || model) of the next token's distribution, in nats.
        top1: share of places where both have the same likeliest token.
        num_tokens: predicted tokens that the perplexities are of.
    """

    perplexity: float
    original: float
    kl: float
    top1: float
    num_tokens: int


class Walked:
    """A model in a directory with its hidden states at the end, and its head."""

    def __init__(self, directory: Path, windows: Sequence[Sequence[int]], rounding: Rounding | None = None) -> None:
        config, self._source = open_model(directory)
        with torch.no_grad():
            family, self.spec = families.build_spec(config)
            self.model = meta_decoder(self.spec, config, torch.float32).eval()
            self._streamer = Streamer(self.model, family.names(self.spec), self._source)
            batches = make_batches(self.spec, windows, _BATCH_TOKENS)
            self.stream = Stream("walked", batches, self.spec.hidden_size)
            with self._streamer.loaded("embedding"):
                embed(self.model, batches, self.stream)
            for index, block in enumerate(self.model.blocks()):
                with self._streamer.loaded(f"layers.{index}"):
                    taps, keys = ({}, None) if rounding is None else rounding(self.model, index)
                    run_block(block, batches, self.stream, taps, keys=keys, into=self.stream, exact=True)

    @contextmanager
    def head(self) -> Iterator[Callable[[int, int], Tensor]]:
        """A function from places [start, stop) of the stream to logits [N, V] in fp32."""
        last = [name for name in ("final_norm", "head") if name in dict(self.model.named_children())]
        hidden_TD = torch.cat(self.stream.states)
        with self._streamer.loaded(*last, *(["embedding"] if self.spec.head.tied else [])):
            yield lambda start, stop: self.model.logits(hidden_TD[start:stop]).float()

    def close(self) -> None:
        self._source.close()


@torch.no_grad()
def compare(original: Walked, other: Walked, windows: Sequence[Sequence[int]]) -> Comparison:
    """Both on all windows; the last token of a window is predicted and the first is not."""
    nats, own_nats, kl, same, num_tokens, num_places = 0.0, 0.0, 0.0, 0, 0, 0
    with original.head() as reference, other.head() as own:
        start = 0
        for window in windows:
            targets_T = torch.tensor([*window[1:], 0])
            for at in range(0, len(window), _PLACES):
                stop = min(at + _PLACES, len(window))
                p_NV = reference(start + at, start + stop).log_softmax(-1)
                q_NV = own(start + at, start + stop).log_softmax(-1)
                kl += float((p_NV.exp() * (p_NV - q_NV)).sum(dtype=torch.float64))
                same += int((p_NV.argmax(-1) == q_NV.argmax(-1)).sum())
                num = min(stop, len(window) - 1) - at
                at_N1 = targets_T[at : at + num, None]
                nats -= float(p_NV[:num].gather(1, at_N1).sum(dtype=torch.float64))
                own_nats -= float(q_NV[:num].gather(1, at_N1).sum(dtype=torch.float64))
                num_tokens += num
                num_places += stop - at
            start += len(window)
    return Comparison(
        perplexity=_exp(own_nats / num_tokens),
        original=_exp(nats / num_tokens),
        kl=max(kl / num_places, 0.0),
        top1=same / num_places,
        num_tokens=num_tokens,
    )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if not math.isnan(loss) else math.nan
