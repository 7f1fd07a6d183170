"""Merging pairs: the documents of all, in the order given."""

import pytest

from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset
from oarsmith.data.corpus.merge import find_pairs, merge_pairs
from oarsmith.errors import DataError


def pair(prefix, documents, dtype="<u2"):
    with IndexedBuilder(prefix, dtype) as builder:
        for ids in documents:
            builder.add(ids)
            builder.end_document()
    return prefix


def documents_of(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.read(index).tolist() for index in range(len(dataset))]


def test_documents_follow_each_other(tmp_path):
    pair(tmp_path / "b.part", [[1, 2], [3]])
    pair(tmp_path / "a", [[4], [5, 6, 7]])
    assert merge_pairs(find_pairs([str(tmp_path)]), tmp_path / "all") == (4, 7)
    assert documents_of(tmp_path / "all") == [[4], [5, 6, 7], [1, 2], [3]]
    pairs = find_pairs([str(tmp_path / "b.part.idx"), str(tmp_path / "a.bin"), str(tmp_path / "b.part")])
    merge_pairs(pairs, tmp_path / "again")
    assert documents_of(tmp_path / "again") == [[1, 2], [3], [4], [5, 6, 7], [1, 2], [3]]


def test_what_cannot_be_merged(tmp_path):
    (tmp_path / "empty").mkdir()
    a, b = pair(tmp_path / "a", [[1]]), pair(tmp_path / "b", [[1]], "<i4")
    with pytest.raises(DataError, match=r"int32, those of .*uint16"):
        merge_pairs([a, b], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match="one of the pairs"):
        merge_pairs([a, a], a)
    with pytest.raises(DataError, match="1 pair: nothing to merge"):
        find_pairs([str(a)])
    with pytest.raises(DataError, match=r"no \.idx file"):
        find_pairs([str(tmp_path / "empty")])
    with pytest.raises(DataError):
        merge_pairs([a, tmp_path / "absent"], tmp_path / "out")
