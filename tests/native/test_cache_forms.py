"""Keys and values in 8 bits with scales that are known before: the step's numbers are the decoder's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from native_sequences import Sequences
from oarsmith.compiling import BuildError
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.decoder import Decoder
from oarsmith.native.library import load

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def form_of(model: Decoder, code: str, *, heads: bool) -> CacheForm:
    """Scales that are about right, other ones for each layer and head."""
    layers, step = [], 10 / (127 if code == "int" else 448)
    for layer, block in enumerate(model.blocks()):
        slots = block.attention.cache_shape.slots
        count = slots[0][0] if heads and len(slots[0]) > 1 else 1
        keys = tuple(step * (1 + 0.1 * head + 0.05 * layer) for head in range(count))
        layers.append((keys, tuple(0.7 * scale for scale in keys) if len(slots) > 1 else keys))
    return CacheForm(code="int" if code == "int" else "e4m3", scales=tuple(layers))


@pytest.mark.parametrize("row", ["llama", "gemma3_text", "deepseek_v2", "yuan"])
@pytest.mark.parametrize("kind", ["int heads", "int layer", "e4m3 heads", "e4m3 layer", "e4m3"])
@torch.no_grad()
def test_the_step_and_the_decoder(row: str, kind: str, tmp_path: Path) -> None:
    """What the decoder computes over keys and values rounded alike; a half of a step may fall either way."""
    bench = Bench(row, ROWS[row], tmp_path)
    model, code, _, what = (bench.model(), *kind.partition(" "))
    form = form_of(model, code, heads=what == "heads") if what else CacheForm(code="e4m3")
    ids = bench.document(45, 1)
    cache, sequences = model.new_cache(1, 45, form=form), Sequences(model, prompt=len(ids), form=form)
    expected, found = [], []
    for start, stop in ((0, 21), (21, 38), *((at, at + 1) for at in range(38, 45))):
        layout = cache.extend([stop - start], [0], [len(ids)])
        expected.append(model.logits(model.hidden(torch.tensor(ids[start:stop]), layout, cache)))
        found.append(sequences.bring(a=ids[start:stop])["a"])
    twin, own, exact = torch.cat(expected), torch.cat(found), model(torch.tensor([ids]))[0]
    assert float((own - twin).norm() / exact.norm()) < 2e-3
    assert 1e-5 < float((own - exact).norm() / exact.norm()) < 0.2
    assert sequences.step.program.page_bytes(16, form=form) * 4 == sequences.step.program.page_bytes(16)


@torch.no_grad()
def test_what_is_not_finite_is_noticed(tmp_path: Path) -> None:
    bench = Bench("llama", ROWS["llama"], tmp_path)
    model, ids = bench.model(), bench.document(20, 1)
    model.embedding.weight[ids[3]] = torch.nan
    for code in ("int", "e4m3"):
        sequences = Sequences(model, form=form_of(model, code, heads=True))
        found = sequences.bring(a=ids, b=ids[:3])
        assert bool(found["a"][3:].isnan().any(-1).all())
        # It stays in its rows of the table and of the sequence, also in pages that are used again.
        kept = torch.arange(model.spec.vocab_size) != ids[3]
        sequences.free += sequences.pages.pop("a")
        other = sequences.bring(c=ids[:3])["c"]
        assert torch.equal(other[:, kept], found["b"][:, kept]) and not bool(other[:, kept].isnan().any())
