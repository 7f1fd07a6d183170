"""Batches of corpora: equal to a construction token by token, and in the same order from any place of any plan."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oarsmith.data.corpus.cache import IndexCache, Ranks
from oarsmith.data.corpus.indexed import IndexedBuilder
from oarsmith.data.corpus.loader import CorpusLoader, batches_in_pass, evaluation_batches, make_corpus_batch
from oarsmith.data.corpus.parts import Corpus
from oarsmith.errors import ConfigError, DataError
from oarsmith.models.layout import Layout
from tiny import tiny_decoder

SHARES = (0.8, 0.15, 0.05)


def write(prefix, sizes, *, first_id=0, dtype=np.uint16):
    """Every token of a file is another one, so that a batch says where each came from."""
    ids = np.arange(first_id, first_id + int(np.sum(sizes)))
    with IndexedBuilder(prefix, dtype) as builder:
        builder.add_documents(ids, np.asarray(sizes, dtype=np.int32))
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    write(folder / "a", rng.integers(0, 40, 120))
    write(folder / "b", rng.integers(0, 20, 150), first_id=10_000)
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return Corpus(f"0.7 {folder / 'a'} 0.3 {folder / 'b'}", shares=SHARES, seq_len=16)


def make(corpus, num_samples=400, *, rows=3, seed=5, isolate=True, part="train", **options):
    drawn = corpus.draw(part, num_samples, seed=seed, **options)
    return CorpusLoader(drawn, rows_per_batch=rows, isolate_documents=isolate)


def same(one, other) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def take(loader, num):
    """The next batches, over the ends of epochs."""
    found = []
    while len(found) < num:
        for batch in loader:
            found.append(batch)
            if len(found) == num:
                break
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 5, 30]), min_size=1, max_size=12),
    st.integers(2, 9),
    st.integers(1, 3),
    st.booleans(),
)
def test_batches_are_those_made_token_by_token(tmp_path_factory, sizes, seq_len, num_rows, isolate):
    if sum(sizes) <= seq_len or (isolate and max(sizes) < 2):
        return
    prefix = write(tmp_path_factory.mktemp("c") / "c", sizes)
    part = Corpus(str(prefix), shares=(1, 0, 0), seq_len=seq_len).draw("train", 2 * num_rows, seed=3)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for first in (0, num_rows):
        rows = [part.row(number) for number in range(first, first + num_rows)]
        ids, targets, weights, positions, bounds = [], [], [], [], [0]
        for row in rows:
            stream = row.tokens.tolist()
            # Where a document begins again at its first token, in the next epoch, it is another document.
            new = [n > 0 and (owner[t] != owner[stream[n - 1]] or t != stream[n - 1] + 1) for n, t in enumerate(stream)]
            for n in range(seq_len):
                if n == 0 or (isolate and new[n]):
                    positions.append(0)
                    bounds[-1:] = [len(ids)] if bounds[-1] == len(ids) else [bounds[-1], len(ids)]
                else:
                    positions.append(positions[-1] + 1)
                ids.append(stream[n])
                crossing = isolate and new[n + 1]
                targets.append(0 if crossing else stream[n + 1])
                weights.append(0.0 if crossing else 1.0)
        if not any(weights):
            with pytest.raises(DataError, match="nothing can be trained"):
                make_corpus_batch(rows, isolate_documents=isolate)
            continue
        batch = make_corpus_batch(rows, isolate_documents=isolate)
        assert batch.input_ids.tolist() == ids
        assert batch.targets.tolist() == targets
        assert batch.weights.tolist() == weights
        assert batch.positions.tolist() == positions
        assert batch.bounds == (*bounds, len(ids))
        assert batch.num_tokens == len(ids) == num_rows * seq_len and batch.num_trained == sum(weights)
        assert len(batch.where) == len(batch.bounds) - 1


def test_rows_are_whole_and_each_its_own_stream_when_documents_are_not_kept_apart(corpus):
    batch = make(corpus, isolate=False).batch_at(0, 2)
    assert batch.bounds == (0, 16, 32, 48)
    assert batch.num_trained == batch.num_tokens == 48
    assert batch.positions.tolist() == [*range(16)] * 3


def test_documents_are_named(tmp_path):
    prefix = write(tmp_path / "c", [10])
    (row,) = [Corpus(str(prefix), shares=(1, 0, 0), seq_len=4).draw("train", 1, seed=0).row(0)]
    assert make_corpus_batch([row], isolate_documents=False).where == (f"{prefix}: document 0",)
    (where,) = make_corpus_batch([row], isolate_documents=True).where
    assert where == f"{prefix}: document 0 from token {row.tokens[0]}"
    many = Corpus(str(write(tmp_path / "d", [2, 2, 2])), shares=(1, 0, 0), seq_len=5).draw("train", 1, seed=0).row(0)
    order = ", ".join(str(piece.document) for piece in many.pieces)
    assert make_corpus_batch([many], isolate_documents=False).where == (f"{tmp_path / 'd'}: documents {order}",)


def test_the_order_depends_on_nothing_but_data_and_seed(corpus, folder, tmp_path):
    batches = take(make(corpus), 100)
    again = Corpus(f"7 {folder / 'a'} 3 {folder / 'b'}", shares=SHARES, seq_len=16)
    cold = IndexCache(data_cache=tmp_path, ranks=Ranks(1, 0, 2))
    assert all(map(same, batches, take(make(again, cache=cold), 100)))
    assert not same(batches[0], make(corpus, seed=6).batch_at(0, 0))


def test_moving_the_files_changes_nothing_but_their_names(corpus, folder, tmp_path):
    for file in [*folder.glob("?.bin"), *folder.glob("?.idx")]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = make(Corpus(f"0.7 {tmp_path / 'a'} 0.3 {tmp_path / 'b'}", shares=SHARES, seq_len=16))
    assert torch.equal(moved.batch_at(0, 7).input_ids, make(corpus).batch_at(0, 7).input_ids)
    moved.load_state(make(corpus).state())


def test_an_epoch_is_one_pass(corpus):
    loader = make(corpus)
    passes = [num // 16 for num in (tokens - 1 for tokens in corpus.num_tokens("train"))]
    assert corpus.samples_in_pass("train") == sum(passes)
    assert loader.batches_per_epoch(0) == loader.batches_per_epoch(7) == sum(passes) // 3
    assert batches_in_pass(5, 8) == 1 and batches_in_pass(17, 8) == 2


@pytest.mark.parametrize("stop", [0, 1, 17, 40, 41, 42, 83, 100])
def test_resuming_at_any_place(corpus, stop):
    """The epoch has 41 or so batches; places are before, at and behind its end."""
    loader = make(corpus)
    batches = take(loader, 110)
    other = make(corpus)
    take(other, stop)
    resumed = make(corpus)
    resumed.load_state(json.loads(json.dumps(other.state())))
    assert resumed.state() == other.state()
    assert all(map(same, batches[stop:], take(resumed, 110 - stop)))


def test_the_place_moves_on_before_a_batch_is_handed_out(corpus):
    loader = make(corpus)
    count = loader.batches_per_epoch(0)
    for number, batch in enumerate(loader, start=1):
        state = loader.state()
        assert (state["epoch"], state["position"]) == ((0, number) if number < count else (1, 0))
        assert same(batch, loader.batch_at(0, number - 1))
    assert number == count


@pytest.mark.parametrize("longer", [401, 900, 4000])
def test_a_longer_run_goes_on_where_the_shorter_one_ended(corpus, longer):
    short, long = make(corpus, 90), make(corpus, longer)
    assert all(map(same, take(short, 30), take(long, 30)))
    resumed = make(corpus, longer)
    resumed.load_state(short.state())
    assert resumed.state() == long.state()
    assert all(map(same, take(long, 50), take(resumed, 50)))


def test_the_plan_ends_with_an_error(corpus):
    with pytest.raises(IndexError, match="sample 10 of 10"):
        take(make(corpus, 10), 4)
    with pytest.raises(IndexError, match="batch 99"):
        make(corpus).batch_at(0, 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 6"),
        ({"rows": 4}, "rows_per_batch is 4"),
        ({"isolate": False}, "isolate_documents is False"),
    ],
)
def test_a_place_of_another_plan_is_refused(corpus, change, message):
    with pytest.raises(ConfigError, match=message):
        make(corpus, **change).load_state(make(corpus).state())


def test_a_place_of_other_data_is_refused(corpus, folder, tmp_path):
    text = f"0.7 {folder / 'a'} 0.3 {folder / 'b'}"
    state = make(corpus).state()
    with pytest.raises(ConfigError, match="max_length is 15"):
        make(Corpus(text, shares=SHARES, seq_len=15)).load_state(state)
    with pytest.raises(ConfigError, match="weights is"):
        make(Corpus(text.replace("0.7", "0.6"), shares=SHARES, seq_len=16)).load_state(state)
    with pytest.raises(DataError, match="data has changed"):
        make(Corpus(text, shares=(0.7, 0.25, 0.05), seq_len=16)).load_state(state)
    other = write(tmp_path / "b", np.random.default_rng(0).integers(0, 20, 150), first_id=10_001)
    with pytest.raises(DataError, match="data has changed"):
        make(Corpus(f"0.7 {folder / 'a'} 0.3 {other}", shares=SHARES, seq_len=16)).load_state(state)
    with pytest.raises(DataError, match="outside the data"):
        make(corpus).load_state({**state, "position": 1000})


def test_parts_share_no_token(corpus):
    seen = {}
    for part in ("train", "valid", "test"):
        drawn = corpus.draw(part, 3 * corpus.samples_in_pass(part), seed=1)
        seen[part] = {token for number in range(drawn.num_samples) for token in drawn.row(number).tokens.tolist()}
    assert not (seen["train"] & seen["valid"] or seen["train"] & seen["test"] or seen["valid"] & seen["test"])


def test_a_blend_is_drawn_in_its_proportions(corpus):
    drawn = corpus.draw("train", 1000, seed=1)
    from_a = [drawn.row(number).prefix.name == "a" for number in range(1000)]
    assert sum(from_a) == 700
    assert all(abs(sum(from_a[:n]) - 0.7 * n) <= 1 for n in range(1000))
    report = drawn.report()
    assert [component.samples for component in report.components] == [700, 300]


def test_evaluation_is_the_same_every_time(corpus):
    part = corpus.draw("valid", 7, seed=0)
    batches = evaluation_batches(part, rows_per_batch=3, isolate_documents=False)
    first = list(batches())
    assert [batch.num_tokens for batch in first] == [48, 48, 16]
    assert all(map(same, first, batches()))


def test_tokens_outside_the_vocabulary(corpus, folder, tmp_path):
    part = corpus.draw("train", 30, seed=0)
    loader = CorpusLoader(part, rows_per_batch=10, isolate_documents=False, vocab_size=10_000)
    with pytest.raises(DataError, match=r"token id 1\d{4} is outside .* 10,000") as caught:
        loader.batch_at(0, 0)
    assert str(folder / "b") in caught.value.where
    highest, where = corpus.highest_id(None)
    assert highest > 10_000 and where == str(folder / "b")
    CorpusLoader(part, rows_per_batch=10, isolate_documents=False, vocab_size=highest + 1).batch_at(0, 0)
    negative = Corpus(str(write(tmp_path / "n", [20], first_id=-30, dtype=np.int32)), shares=(1, 0, 0), seq_len=4)
    with pytest.raises(DataError, match="token id -"):
        CorpusLoader(
            negative.draw("train", 4, seed=0), rows_per_batch=1, isolate_documents=True, vocab_size=9
        ).batch_at(0, 0)


def test_parts_that_give_no_sample(tmp_path):
    prefix = write(tmp_path / "c", [30] * 20)
    none = Corpus(str(prefix), shares=(1, 0, 0), seq_len=16)
    with pytest.raises(DataError, match="the evaluation part has no share"):
        none.draw("valid", 1, seed=0)
    few = Corpus(str(prefix), shares=(0.99, 0.01, 0), seq_len=16)
    with pytest.raises(DataError, match=r"evaluation part has no document \(0.01 of 20 documents\)") as caught:
        few.draw("valid", 1, seed=0)
    assert caught.value.where == str(prefix) and "split" in caught.value.fix
    short = Corpus(str(prefix), shares=(0.95, 0.05, 0), seq_len=30)
    with pytest.raises(DataError, match=r"evaluation part has 30 tokens \(0.05 of 20 documents\), a sample 31"):
        short.draw("valid", 1, seed=0)
    assert Corpus(str(prefix), shares=(0.95, 0.05, 0), seq_len=29).draw("valid", 1, seed=0).num_samples == 1
    with pytest.raises(ConfigError, match="rows per batch is 0"):
        make(short, 1, rows=0)


def test_the_report(tmp_path):
    a, b = write(tmp_path / "a", [30, 0, 10]), write(tmp_path / "b", [50, 1])
    report = Corpus(f"3 {a} 1 {b}", shares=(1, 0, 0), seq_len=8).draw("train", 12, seed=0).report()
    one, two = report.components
    assert (one.documents, one.empty, one.tokens, one.samples, one.share) == (3, 1, 40, 9, 0.75)
    assert (two.documents, two.empty, two.tokens, two.samples, two.share) == (2, 0, 51, 3, 0.25)
    assert (one.epochs, two.epochs) == (9 * 8 / 40, 3 * 8 / 51)
    # a: 2 epochs are 80 tokens, 9 samples of 8 and one token more; b: 1 epoch, 6 samples
    assert (one.left_over, two.left_over) == (80 - 73, 51 - 49)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["tokens"] == 91 and content["drawn_tokens"] == 96 and content["components"][1]["samples"] == 3
    text = "\n".join(report.lines())
    assert "75.0% of the samples, 3 documents (1 empty), 40 tokens seen 1.80 times, 7 tokens left over" in text


def test_notes_of_files_and_caches_reach_the_report(tmp_path):
    prefix = write(tmp_path / "c", [30, 20])
    with (tmp_path / "c.bin").open("ab") as file:
        file.write(b"xx")
    (tmp_path / "index-cache").touch()
    notes = Corpus(str(prefix), shares=(1, 0, 0), seq_len=8).draw("train", 3, seed=0).report().notes
    assert "2 bytes at the end" in notes[0] and "kept in memory" in notes[1]


def test_a_model_feels_neighbours_only_where_documents_are_not_kept_apart(tmp_path, few_threads):
    write(tmp_path / "c", [7, 3, 1, 12, 9] * 6)
    part = Corpus(str(tmp_path / "c"), shares=(1, 0, 0), seq_len=20).draw("train", 2, seed=1)
    model = tiny_decoder()
    for isolate in (True, False):
        loader = CorpusLoader(part, rows_per_batch=2, isolate_documents=isolate)
        batch = loader.batch_at(0, 0)
        apart = CorpusLoader(part, rows_per_batch=2, isolate_documents=True).batch_at(0, 0)
        start, stop = next((a, b) for a, b in pairwise(apart.bounds) if a % 20 > 0)  # a document in mid-row
        others = batch.input_ids.clone()
        others[:start] += 300
        others[stop:] += 300
        layout = Layout.documents(batch.bounds, batch.positions)
        with torch.no_grad():
            before, after = (model.hidden(ids, layout)[start:stop] for ids in (batch.input_ids, others))
        assert torch.equal(before, after) == isolate


@pytest.mark.parametrize("isolate", [False, True])
def test_an_opening_stands_before_every_document_and_predicts_its_first_token(corpus, isolate):
    rows = [corpus.draw("train", 6, seed=5).row(number) for number in range(6)]
    plain = make_corpus_batch(rows, isolate_documents=isolate)
    opened = make_corpus_batch(rows, isolate_documents=isolate, opening=(70_001, 70_002))
    ids, targets, weights, bounds = [], [], [], [0]
    for start, stop in pairwise(plain.bounds):
        inside = plain.input_ids[start:stop].tolist()
        ids += [70_001, 70_002, *inside]
        targets += [70_002, inside[0], *plain.targets[start:stop].tolist()]
        weights += [0.0, 1.0, *plain.weights[start:stop].tolist()]
        bounds.append(len(ids))
    assert (opened.input_ids.tolist(), opened.targets.tolist()) == (ids, targets)
    assert (opened.weights.tolist(), list(opened.bounds)) == (weights, bounds)
    assert opened.num_trained == plain.num_trained + len(plain.where) and opened.where == plain.where
