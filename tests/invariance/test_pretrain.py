"""A step on rows of a corpus depends on its rows alone: not on passes, on what is computed again, or on neighbours.

Tolerances are those of ``test_step.py``: the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from corpora import write_corpus
from oarsmith import kernels
from oarsmith.config.load import load_config
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.data.batch import Batch, make_batch
from oarsmith.data.corpus.loader import make_corpus_batch
from oarsmith.data.corpus.parts import Corpus, Row
from oarsmith.data.samples import Sample
from oarsmith.jobs.optimizers import make_optimizer
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.models.recompute import Granularity, Recompute
from oarsmith.training.compile import compile_model
from oarsmith.training.step import StepResult, run_step, run_step_in_backward, seed_step
from tiny import CONFIGS, Step, largest_difference, one_step, tiny_decoder

LOSS_TOLERANCE = 1e-6
GRAD_TOLERANCE = 1e-5
NUM_ROWS = 12


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of 48 tokens out of documents of 20 to 89 random ones: most rows hold the border of two."""
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text", documents=20, odd=20)
    part = Corpus(str(prefix), shares=(1, 0, 0), seq_len=48).draw("train", NUM_ROWS, seed=1)
    found = [part.row(number) for number in range(NUM_ROWS)]
    assert sum(len(row.pieces) > 1 for row in found) > NUM_ROWS / 2
    return found


def in_passes(rows: Sequence[Row], size: int, isolate: bool) -> list[Batch]:
    return [
        make_corpus_batch(rows[start : start + size], isolate_documents=isolate) for start in range(0, len(rows), size)
    ]


def recomputed(granularity: Granularity, *skipped: int) -> Callable[[Decoder, Sequence[Row], bool], Step]:
    def way(model: Decoder, rows: Sequence[Row], isolate: bool) -> Step:
        model.recompute = Recompute(granularity=granularity, skip_layers=frozenset(skipped))
        return one_step(model, in_passes(rows, 4, isolate))

    return way


def plain_torch(model: Decoder, rows: Sequence[Row], isolate: bool) -> Step:
    with kernels.using("torch"):
        return one_step(model, in_passes(rows, 4, isolate))


WAYS: dict[str, Callable[[Decoder, Sequence[Row], bool], Step]] = {
    "all rows in one pass": lambda model, rows, isolate: one_step(model, in_passes(rows, NUM_ROWS, isolate)),
    "passes of four": lambda model, rows, isolate: one_step(model, in_passes(rows, 4, isolate)),
    "uneven passes": lambda model, rows, isolate: one_step(model, in_passes(rows, 5, isolate)),
    "reversed": lambda model, rows, isolate: one_step(model, in_passes(rows[::-1], 3, isolate)),
    "blocks recomputed": recomputed("full"),
    "all blocks but the first recomputed": recomputed("full", 0),
    "attention recomputed": recomputed("full_attn"),
    "scores recomputed but for the last block": recomputed("core_attn", 1),
    "plain torch": plain_torch,
}


def assert_same(found: Step, expected: Step) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)
    assert largest_difference(found.grads, expected.grads) < GRAD_TOLERANCE


@pytest.mark.parametrize("isolate", [False, True], ids=["stream", "apart"])
@pytest.mark.parametrize("family", CONFIGS)
def test_ways_of_one_step(family: str, isolate: bool, rows: list[Row]) -> None:
    expected = one_step(tiny_decoder(family), in_passes(rows, 1, isolate))
    for name, way in WAYS.items():
        try:
            assert_same(way(tiny_decoder(family), rows, isolate), expected)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("family", CONFIGS)
def test_apart_is_each_piece_of_a_document_alone(family: str, rows: list[Row]) -> None:
    """Rows cut by hand: every piece is a sample of its own, whose tokens but the first are trained."""
    samples = []
    for row in rows:
        at = 0
        for piece in row.pieces:
            ids = row.tokens[at : at + piece.length].astype(np.int32)
            weights = np.ones(piece.length, np.float32)
            weights[0] = 0
            samples += [Sample(ids, weights, f"{piece}")] if piece.length > 1 else []
            at += piece.length
    alone = one_step(tiny_decoder(family), [make_batch([sample]) for sample in samples])
    assert_same(one_step(tiny_decoder(family), in_passes(rows, 6, True)), alone)


def test_a_stream_is_something_else(rows: list[Row]) -> None:
    """The comparisons above can fail."""
    apart, stream = (one_step(tiny_decoder(), in_passes(rows, 4, isolate)) for isolate in (True, False))
    assert largest_difference(apart.grads, stream.grads) > 1000 * GRAD_TOLERANCE


def felt(model: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets [T], and the loss sum's gradient for what the embedding gives [T, D]."""
    with torch.no_grad():
        logits_TV = model.logits(model.hidden(batch.input_ids, Layout.documents(batch.bounds, batch.positions)))
        logprobs_T = logits_TV.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    kept: list[torch.Tensor] = []
    handle = model.embedding.register_forward_hook(lambda _, __, out: kept.append(out) or out.retain_grad())
    TokenCrossEntropy()(model, batch, 1.0).loss.backward()
    handle.remove()
    assert kept[0].grad is not None
    return logprobs_T, kept[0].grad.clone()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("family", CONFIGS)
def test_no_document_feels_another(family: str, backend: kernels.Backend, rows: list[Row]) -> None:
    """One document's tokens become others: shapes stay, so everything about the other documents stays bit for bit."""
    if backend == "native" and kernels.select.library() is None:
        pytest.skip(kernels.describe())
    batch = make_corpus_batch(rows[:4], isolate_documents=True)
    assert len(batch.bounds) > 6
    with kernels.using(backend):
        model = tiny_decoder(family)
        logprobs, grads = felt(model, batch)
        for start, stop in zip(batch.bounds[:-1], batch.bounds[1:], strict=True):
            ids, targets = batch.input_ids.clone(), batch.targets.clone()
            ids[start:stop] = (ids[start:stop] + 17) % 1100
            targets[start : stop - 1] = ids[start + 1 : stop]
            changed = felt(model, replace(batch, input_ids=ids, targets=targets))
            other = torch.ones(batch.num_tokens, dtype=torch.bool)
            other[start:stop] = False
            for before, after in ((logprobs, changed[0]), (grads, changed[1])):
                assert torch.equal(after[other], before[other])
                assert not torch.equal(after[~other], before[~other])


def config_of(*words: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, ["--model_name_or_path=x", "--input_dir=x", *words]).config


OPTIMIZERS = ["adamw", "adamw_8bit", "adamw_mini", "adafactor", "muon", "galore", "apollo", "apollo_mini"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])  # gemma and gpt2: head and embedding are one matrix
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_updates_in_backward_are_those_after_it(optim: str, family: str, dtype: torch.dtype, rows: list[Row]) -> None:
    """Bit for bit, with blocks recomputed and noise on the embeddings."""
    projected = ["--projection_rank=4", "--projection_steps=2"] if optim in ("galore", "apollo") else []
    config = config_of(f"--optim={optim}", "--weight_decay=0.1", *projected)

    def train(within: bool) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
        model = tiny_decoder(family).to(dtype).train()
        model.recompute, model.neftune_alpha = Recompute(), 5.0
        optimizer, results = make_optimizer(config, model), []
        for step in range(4):
            batch = make_corpus_batch(rows[3 * step : 3 * step + 3], isolate_documents=True)
            seed_step(0, "step", step)
            if within:
                results.append(run_step_in_backward(model, TokenCrossEntropy(), batch, optimizer, lr=1e-2))
            else:
                results.append(run_step(model, TokenCrossEntropy(), [batch], optimizer, lr=1e-2, max_grad_norm=0))
        return results, dict(model.named_parameters())

    (after, weights), (inside, found) = train(False), train(True)
    assert [result.total for result in inside] == [result.total for result in after]
    # The same squares, added up in another order.
    assert [r.grad_norm for r in inside] == pytest.approx([r.grad_norm for r in after], rel=1e-12)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [None, "full"])
def test_compiled(granularity: Granularity | None, rows: list[Row]) -> None:
    """torch.compile on rows of a corpus, with and without recomputing (15 s: it compiles)."""
    model = tiny_decoder("llama", num_hidden_layers=1)
    expected = one_step(model, in_passes(rows, 1, True))
    model.recompute = None if granularity is None else Recompute(granularity=granularity)
    compile_model(model)
    assert_same(one_step(model, in_passes(rows, 5, True)), expected)
