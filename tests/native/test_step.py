"""The compiled step computes what the decoder computes, in every family that it has operations for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from native_sequences import Sequences
from oarsmith.compiling import BuildError
from oarsmith.models.cache_form import INT8_GROUPS
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.native.library import load
from oarsmith.native.lower import refusal

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

# fp32, sums in another order; logits are of size 1 to 30.
TOLERANCE = 1e-4


def row_model(row: str, folder: Path) -> tuple[Bench, Decoder]:
    bench = Bench(row, ROWS[row], folder)
    model = bench.model()
    if (reason := refusal(model.spec)) is not None:
        pytest.skip(f"runs on PyTorch: {reason}")
    return bench, model


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_logits_of_every_family(row: str, tmp_path: Path) -> None:
    bench, model = row_model(row, tmp_path)
    ids = bench.document(45, 1)
    expected, found, sequences = model(torch.tensor([ids]))[0], [], Sequences(model, prompt=len(ids))
    for start, stop in ((0, 21), (21, 38), *((at, at + 1) for at in range(38, 45))):
        found.append(sequences.bring(a=ids[start:stop])["a"])
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("row", ["llama", "mixtral", "gemma3_text", "bloom"])
@torch.no_grad()
def test_sequences_side_by_side(row: str, tmp_path: Path) -> None:
    """Prompts, pieces of prompts and single tokens in one step, in pages that lie anywhere."""
    bench, model = row_model(row, tmp_path)
    documents = {name: bench.document(60, seed) for seed, name in enumerate("abc")}
    expected = {name: model(torch.tensor([ids]))[0] for name, ids in documents.items()}
    sequences, found = Sequences(model, threads=3), {name: [] for name in documents}
    steps = [{"a": 17}, {"a": 1, "b": 33}, {"a": 1, "b": 1, "c": 20}, {"b": 1, "c": 30, "a": 1}, {"c": 1, "a": 40}]
    for step in steps:
        at = {name: sequences.used.get(name, 0) for name in step}
        got = sequences.bring(**{name: documents[name][at[name] : at[name] + count] for name, count in step.items()})
        for name, logits in got.items():
            found[name].append(logits)
    for name, parts in found.items():
        logits = torch.cat(parts)
        torch.testing.assert_close(logits, expected[name][: len(logits)], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_more_rows_than_go_together(tmp_path: Path) -> None:
    bench, model = row_model("llama", tmp_path)
    sequences = Sequences(model, num_pages=64)
    documents = {f"d{seed}": bench.document(180, seed) for seed in range(5)}
    for name, logits in sequences.bring(**documents).items():
        expected = model(torch.tensor([documents[name]]))[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_copied_pages(tmp_path: Path) -> None:
    bench, model = row_model("qwen2", tmp_path)
    sequences, ids = Sequences(model), bench.document(40, 3)
    sequences.bring(a=ids[:30])
    sequences.pages["b"], sequences.used["b"] = [20, 21], 30
    for source, target in zip(sequences.pages["a"], (20, 21), strict=True):
        sequences.step.copy_page(source, target)
    other = bench.document(10, 4)
    found = sequences.bring(a=ids[30:], b=other)
    torch.testing.assert_close(found["a"], model(torch.tensor([ids]))[0, 30:], rtol=0, atol=TOLERANCE)
    expected = model(torch.tensor([ids[:30] + other]))[0, 30:]
    torch.testing.assert_close(found["b"], expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_damaged_row_harms_no_other(tmp_path: Path) -> None:
    """A NaN in one token's embedding stays with its sequence, now and in the pages it leaves."""
    bench, model = row_model("gemma2", tmp_path)
    bad, ids = 5, [token for token in bench.document(60, 5) if token != 5]
    table = model.embedding.weight.clone()
    model.embedding.weight[bad] = torch.nan
    expected = model.hidden(torch.tensor(ids), Layout.documents([0, len(ids)], torch.arange(len(ids))))
    expected = model.head.bend(model.head_inputs(expected)[0] @ table.T)
    sequences = Sequences(model)
    damaged = sequences.bring(bad=[bad, bad], good=ids[:20])
    assert damaged["bad"].isnan().any(-1).all()
    sequences.free += sequences.pages.pop("bad")
    del sequences.used["bad"]
    found = torch.cat([sequences.bring(other=ids[:20])["other"], sequences.bring(other=ids[20:])["other"]])
    kept = torch.arange(model.spec.vocab_size) != bad  # the head is the same table
    torch.testing.assert_close(found[:, kept], expected[:, kept], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("precision", "most"), [("bf16", 0.03), ("int8", 0.03), ("int4", 0.35)])
@torch.no_grad()
def test_rounded_weights(precision: str, most: float, tmp_path: Path) -> None:
    """The error of logits is that of the weights' rounding, relative to the size of logits."""
    bench, model = row_model("llama", tmp_path)
    ids = bench.document(40, 1)
    expected, sequences = model(torch.tensor([ids]))[0], Sequences(model, precision)
    found = torch.cat([sequences.bring(a=ids[:30])["a"], *(sequences.bring(a=[token])["a"] for token in ids[30:])])
    assert float((found - expected).norm() / expected.norm()) < most


@torch.no_grad()
def test_weights_in_fp16_are_the_decoders(tmp_path: Path) -> None:
    """Only they are rounded: sums, activations, keys and values are fp32."""
    bench, model = row_model("mixtral", tmp_path)
    ids, sequences = bench.document(40, 1), Sequences(model.half(), "fp16")
    expected = model.float()(torch.tensor([ids]))[0]
    found = torch.cat([sequences.bring(a=ids[:30])["a"], *(sequences.bring(a=[token])["a"] for token in ids[30:])])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("row", ["llama", "gemma3_text", "deepseek_v2", "bloom", "yuan", "phi3"])
@torch.no_grad()
def test_a_cache_in_8_bits(row: str, tmp_path: Path) -> None:
    """What the decoder computes over keys and values rounded alike; a half of a step may fall either way."""
    bench, model = row_model(row, tmp_path)
    ids = bench.document(45, 1)
    cache, sequences = model.new_cache(1, 45, form=INT8_GROUPS), Sequences(model, prompt=len(ids), form=INT8_GROUPS)
    expected, found = [], []
    for start, stop in ((0, 21), (21, 38), *((at, at + 1) for at in range(38, 45))):
        layout = cache.extend([stop - start], [0], [len(ids)])
        expected.append(model.logits(model.hidden(torch.tensor(ids[start:stop]), layout, cache)))
        found.append(sequences.bring(a=ids[start:stop])["a"])
    twin, own, exact = torch.cat(expected), torch.cat(found), model(torch.tensor([ids]))[0]
    # The step pads latents to a multiple of 16, so this row's 12 are grouped otherwise.
    assert float((own - twin).norm() / exact.norm()) < (0.01 if row == "deepseek_v2" else 1e-3)
    assert 1e-4 < float((own - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("window", [None, 100])
@torch.no_grad()
def test_many_queries_at_once(window: int | None, tmp_path: Path) -> None:
    """Blocks of queries go through tiles where there are such; single ones do not."""
    config = {**ROWS["mistral"].config, "head_dim": 64, "sliding_window": window, "max_position_embeddings": 512}
    bench = Bench("mistral", replace(ROWS["mistral"], config=config), tmp_path)
    model, ids = bench.model(), bench.document(400, 2)
    expected = model(torch.tensor([ids]))[0]
    for precision, form, most in (("fp32", None, 1e-5), ("bf16", None, 0.03), ("bf16", INT8_GROUPS, 0.04)):
        sequences = Sequences(model, precision, page_size=64, form=form)
        parts = [sequences.bring(a=ids[start:stop])["a"] for start, stop in ((0, 130), (130, 133), (133, 399))]
        found = torch.cat([*parts, sequences.bring(a=ids[399:])["a"]])
        assert float((found - expected).norm() / expected.norm()) < most
