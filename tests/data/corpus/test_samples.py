"""Samples are what the description says, for odd sizes too, and the first ones do not depend on how many are made."""

from __future__ import annotations

import binascii

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.data.corpus.samples import PARTS, build_index, epochs_for, samples_in, split_documents
from oarsmith.data.order import permutation


def megatron_split(shares: list[float], size: int) -> list[int]:
    """Borders of the parts by the rule of Megatron-LM: round each, then shift all borders by what is too much."""
    borders = [0]
    for share in shares:
        borders.append(borders[-1] + round(share * float(size)))
    surplus = borders[-1] - size
    return [0, *(border - surplus for border in borders[1:])]


def normalised(numbers: list[float]) -> list[float]:
    return [number / sum(numbers) for number in numbers]


@given(st.integers(0, 3000), st.tuples(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000)))
def test_documents_are_split_as_in_megatron(size, numbers):
    shares = normalised(list(numbers))
    parts = split_documents(size, shares)
    borders = megatron_split(shares, size)
    assert [parts[part] for part in PARTS] == [range(borders[n], borders[n + 1]) for n in range(3)]


@given(st.integers(0, 3000), st.tuples(*[st.integers(0, 1000)] * 3).filter(any))
def test_every_document_is_in_one_part_and_none_in_a_part_without_share(size, numbers):
    parts = split_documents(size, normalised(list(numbers)))
    assert [document for part in PARTS for document in parts[part]] == list(range(size))
    assert not [part for part, number in zip(PARTS, numbers, strict=True) if number == 0 and len(parts[part])]


def test_the_usual_split():
    assert split_documents(1000, normalised([949, 50, 1])) == {
        "train": range(949),
        "valid": range(949, 999),
        "test": range(999, 1000),
    }


@given(st.integers(0, 2000), st.integers(1, 50), st.integers(2, 300))
def test_the_least_number_of_epochs(num_samples, seq_len, num_tokens):
    epochs = epochs_for(num_samples, num_tokens, seq_len)
    assert (epochs * num_tokens - 1) // seq_len >= num_samples
    assert epochs == 1 or ((epochs - 1) * num_tokens - 1) // seq_len < num_samples
    assert samples_in(epochs, num_tokens, seq_len) == (epochs * num_tokens - 1) // seq_len


def slow_permutation(size: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """Sorting by raw Philox numbers keyed by (seed, CRC-32 of the purpose, epoch), one by one."""
    source = np.random.Philox(np.random.SeedSequence([seed, binascii.crc32(purpose.encode()), epoch]))
    drawn = [(int(source.random_raw()), index) for index in range(size)]
    return [index for _, index in sorted(drawn)]


def slow_samples(lengths, documents, seq_len, num_epochs, seed, purpose) -> list[list[tuple[int, int]]]:
    """Samples as lists of (document, token), one token at a time."""
    stream, epoch_of = [], []
    for epoch in range(num_epochs):
        for place in slow_permutation(len(documents), seed, f"documents {purpose}", epoch):
            for token in range(lengths[documents[place]]):
                stream.append((documents[place], token))
                epoch_of.append(epoch)
    cut, by_epoch = 0, [[] for _ in range(num_epochs)]
    while cut + seq_len < len(stream):
        by_epoch[epoch_of[cut + seq_len]].append(stream[cut : cut + seq_len + 1])
        cut += seq_len
    return [
        found[place]
        for epoch, found in enumerate(by_epoch)
        for place in slow_permutation(len(found), seed, f"samples {purpose}", epoch)
    ]


def spelled_out(index, lengths) -> list[list[tuple[int, int]]]:
    return [
        [(p.document, p.offset + n) for p in index.pieces(k, lengths) for n in range(p.length)]
        for k in range(len(index))
    ]


CORPORA = st.tuples(
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 20]), min_size=1, max_size=12),
    st.integers(0, 3),  # documents in front of the part
    st.integers(1, 9),  # seq_len
    st.integers(1, 4),  # epochs
    st.integers(0, 2**40),
).filter(lambda case: sum(case[0][case[1] :]) * case[3] > case[2])


@settings(max_examples=300, deadline=None)
@given(CORPORA)
def test_samples_are_those_of_the_slow_construction(case):
    lengths, start, seq_len, num_epochs, seed = case
    documents = range(start, len(lengths))
    array = np.array(lengths, dtype=np.int32)
    index = build_index(array, documents, seq_len=seq_len, num_epochs=num_epochs, seed=seed, purpose="train x")
    assert spelled_out(index, array) == slow_samples(lengths, documents, seq_len, num_epochs, seed, "train x")
    assert index.doc_idx.dtype == index.sample_idx.dtype == np.int32 and index.shuffle_idx.dtype == np.uint32


@settings(max_examples=100, deadline=None)
@given(CORPORA)
def test_more_epochs_begin_with_the_same_samples(case):
    lengths, start, seq_len, num_epochs, seed = case
    array, documents = np.array(lengths, dtype=np.int32), range(start, len(lengths))
    shape = {"seq_len": seq_len, "seed": seed, "purpose": "p"}
    few = build_index(array, documents, num_epochs=num_epochs, **shape)
    many = build_index(array, documents, num_epochs=num_epochs + 2, **shape)
    assert spelled_out(many, array)[: len(few)] == spelled_out(few, array)


def test_every_token_is_read_once_an_epoch_but_for_what_is_left_over():
    lengths = np.array([5, 0, 1, 17, 3, 1], dtype=np.int32)
    index = build_index(lengths, range(6), seq_len=4, num_epochs=1, seed=0, purpose="p")
    inputs = [token for sample in spelled_out(index, lengths) for token in sample[:-1]]
    assert len(inputs) == len(set(inputs)) == 4 * 6
    assert lengths.sum() - 1 - len(inputs) == 2  # (27 - 1) // 4 = 6 samples, 2 tokens left over


def test_seed_epoch_and_purpose_change_the_order():
    lengths = np.full(100, 10, dtype=np.int32)

    def order(**changed):
        wanted = {"seq_len": 10, "num_epochs": 2, "seed": 1, "purpose": "p", **changed}
        index = build_index(lengths, range(100), **wanted)
        return index.doc_idx.tolist(), index.shuffle_idx.tolist()

    documents, samples = order()
    assert order() == (documents, samples)
    assert documents[:100] != documents[100:] and sorted(documents[:100]) == sorted(documents[100:])
    for changed in ({"seed": 2}, {"purpose": "q"}):
        assert order(**changed)[0] != documents and order(**changed)[1] != samples


def test_wide_numbers_where_narrow_ones_do_not_suffice():
    lengths = np.array([2**31 + 5, 2**31 + 7], dtype=np.int64)
    index = build_index(lengths, range(2), seq_len=2**30, num_epochs=1, seed=0, purpose="p")
    assert index.sample_idx.dtype == np.int64 and index.doc_idx.dtype == np.int32
    assert [sum(piece.length for piece in index.pieces(k, lengths)) for k in range(len(index))] == [2**30 + 1] * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((8, 42, "documents x", 0), [6, 1, 0, 3, 5, 4, 7, 2]), ((8, 42, "documents x", 1), [2, 6, 0, 3, 5, 7, 4, 1])],
)
def test_the_order_never_changes(arguments, expected):
    """Pinned: a resumed run must get the samples of the version that saved it."""
    assert permutation(*arguments).tolist() == expected
