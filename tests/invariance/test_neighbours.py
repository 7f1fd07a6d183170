"""A document in a pack cannot feel the others: its logits and gradients stay when they change."""

from __future__ import annotations

import pytest
import torch

from oarsmith import kernels
from oarsmith.data.batch import Batch, make_batch
from oarsmith.data.samples import Sample
from oarsmith.kernels.select import library
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from tiny import CONFIGS, random_samples, tiny_decoder

# The same arithmetic on the same numbers, but matrix products over another number of rows may sum in another order.
TOLERANCE = 1e-6
DOCUMENT = random_samples((23,), seed=99)[0]


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def pack(lengths: tuple[int, ...], place: int, seed: int) -> tuple[Batch, slice]:
    """A batch with ``DOCUMENT`` at a place among random ones, and the rows it takes."""
    samples: list[Sample] = random_samples(lengths, seed=seed)
    samples.insert(place, DOCUMENT)
    batch = make_batch(samples)
    return batch, slice(batch.bounds[place], batch.bounds[place + 1])


def logits_and_gradient(model: Decoder, batch: Batch, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the document, and the gradient of the whole pack's loss sum for its embeddings."""
    with torch.no_grad():
        hidden_TD = model.hidden(batch.input_ids, Layout.documents(batch.bounds, batch.positions))
        logits_TV = model.logits(hidden_TD)[rows]
    kept: list[torch.Tensor] = []
    handle = model.embedding.register_forward_hook(lambda _, __, out: kept.append(out) or out.retain_grad())
    OBJECTIVE(model, batch, 1.0).loss.backward()
    handle.remove()
    assert kept[0].grad is not None
    return logits_TV, kept[0].grad[rows].clone()


PACKS = {
    "alone": ((), 0, 0),
    "first": ((7, 50), 0, 1),
    "last": ((1, 90, 2), 3, 2),
    "in the middle of others": ((60, 3, 5, 33), 2, 3),
}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("family", [*CONFIGS, "llama with lora"])
def test_other_documents_change_nothing(family: str, backend: kernels.Backend) -> None:
    if backend == "native" and library() is None:
        pytest.skip(kernels.describe())
    name, _, lora = family.partition(" with ")
    with kernels.using(backend):
        model = tiny_decoder(name, lora_rank=4 if lora else None)
        if lora:
            model.embedding.requires_grad_(True)
        expected = logits_and_gradient(model, *pack(*PACKS["alone"]))
        for where, choice in PACKS.items():
            found = logits_and_gradient(model, *pack(*choice))
            for ours, alone in zip(found, expected, strict=True):
                assert (ours - alone).abs().max() <= TOLERANCE * alone.abs().max(), where


@pytest.mark.parametrize("family", CONFIGS)
def test_earlier_tokens_do_count(family: str) -> None:
    """The comparison above can fail: without the border between two documents the second one changes."""
    model = tiny_decoder(family)
    batch, rows = pack((7,), 1, 0)
    apart, _ = logits_and_gradient(model, batch, rows)
    with torch.no_grad():
        joined = model(batch.input_ids[None], positions=batch.positions[None])[0, rows]
    assert (apart - joined).abs().max() > 1e-2
