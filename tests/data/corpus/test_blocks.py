"""Samples in blocks of epochs are those of one index over all epochs, in less memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.data.corpus import blocks
from oarsmith.data.corpus.blocks import FileSamples
from oarsmith.data.corpus.cache import IndexCache, Ranks
from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset
from oarsmith.data.corpus.parts import Corpus
from oarsmith.data.corpus.samples import build_index, epochs_for, samples_in


def write(prefix, sizes):
    with IndexedBuilder(prefix, np.uint16) as builder:
        builder.add_documents(np.zeros(sum(sizes), np.uint16), np.array(sizes, np.int32))
    return prefix


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 20]), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 3),
)
def test_epochs_from_the_middle(sizes, seq_len, first_epoch, num_epochs):
    """Also where a sample is longer than an epoch."""
    lengths, num_tokens = np.array(sizes, dtype=np.int32), sum(sizes)
    shape = {"seq_len": seq_len, "seed": 3, "purpose": "p"}
    ends = first_epoch, first_epoch + num_epochs
    if num_tokens == 0 or len({samples_in(end, num_tokens, seq_len) for end in ends}) == 1:
        return
    first, stop = (samples_in(end, num_tokens, seq_len) for end in ends)
    documents = range(len(sizes))
    part = build_index(lengths, documents, num_epochs=num_epochs, first_epoch=first_epoch, **shape)
    whole = build_index(lengths, documents, num_epochs=ends[1], **shape)
    assert len(part) == stop - first
    for k in range(len(part)):
        assert list(part.pieces(k, lengths)) == list(whole.pieces(first + k, lengths))


@pytest.mark.parametrize("block", [1, 20, 100, 10_000])
def test_any_place_in_any_order(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    file = IndexedDataset(write(tmp_path / "c", [5, 30, 0, 2, 11]))
    documents, num_samples = range(1, 5), 150
    shape = {"seq_len": 4, "seed": 7}
    samples = FileSamples(file, "train", documents, num_samples=num_samples, cache=IndexCache(), **shape)
    num_epochs = epochs_for(num_samples, 43, 4)
    assert (samples.num_tokens, samples.num_epochs, samples.note) == (43, num_epochs, "")
    purpose = f"train {file.fingerprint}"
    whole = build_index(file.document_lengths, documents, num_epochs=num_epochs, purpose=purpose, **shape)
    for k in [*range(len(whole)), *np.random.default_rng(0).integers(0, len(whole), 30).tolist()]:
        assert list(samples.pieces(k)) == list(whole.pieces(k, file.document_lengths))
    saved = len(list((tmp_path / "index-cache").glob("*.dsc")))
    per_block = max(1, block // 10)
    assert saved == -(-num_epochs // per_block)
    again = FileSamples(file, "train", documents, num_samples=num_samples, cache=IndexCache(), **shape)
    assert list(again.pieces(149)) == list(whole.pieces(149, file.document_lengths))
    assert len(list((tmp_path / "index-cache").glob("*.dsc"))) == saved


def test_no_process_waits_for_a_later_block(tmp_path, monkeypatch):
    """The one that would build it may be waiting for this one's gradients."""
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    file = IndexedDataset(write(tmp_path / "c", [50]))
    shape = {"num_samples": 30, "seq_len": 4, "seed": 7}
    builder = FileSamples(file, "train", range(1), cache=IndexCache(), **shape)
    other = FileSamples(file, "train", range(1), cache=IndexCache(ranks=Ranks(1, 1, 2), timeout=0.05), **shape)
    assert [list(other.pieces(k)) for k in range(30)] == [list(builder.pieces(k)) for k in range(30)]


def test_memory_does_not_grow_with_the_run(tmp_path):
    """A thousand million samples, of which the last can be had at once: an index of all would take 12 GB."""
    corpus = Corpus(str(write(tmp_path / "c", [300] * 2000)), shares=(1, 0, 0), seq_len=64)
    tracemalloc.start()
    part = corpus.draw("train", 10**9, seed=1)
    rows = [part.row(number) for number in (0, 10**8, 10**9 - 1)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(len(row.tokens) == 65 for row in rows)
    assert peak < 150e6, f"{peak / 1e6:.0f} MB"
