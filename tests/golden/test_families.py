"""Loss and gradient norm of every family on the same documents, pinned: what changes them changes the model.

The parity tests hold families against their oracles where these are at hand; this holds them against yesterday.
After a change that is meant to: ``python tests/golden/test_families.py`` writes the file anew; say why in the log of
changes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.losses.token import token_cross_entropy

FILE = Path(__file__).with_name("families.json")


def loss_and_norm(name: str, folder: Path) -> list[float]:
    """Mean loss over the trained tokens and the norm of all gradients, fp32 on the CPU, in training mode."""
    bench = Bench(name, ROWS[name], folder)
    model, batch = bench.model().train(), bench.batch
    outcome = token_cross_entropy(model, batch, 1 / batch.num_trained)
    outcome.loss.backward()
    square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    return [outcome.total / outcome.count, square**0.5]


@pytest.mark.parametrize("name", ROWS)
def test_pinned(name: str, tmp_path: Path, few_threads: None) -> None:
    # Other CPUs sum in another order; gradients of random models of this size amplify it.
    loss, norm = json.loads(FILE.read_text())[name]
    found_loss, found_norm = loss_and_norm(name, tmp_path)
    assert found_loss == pytest.approx(loss, rel=1e-4)
    assert found_norm == pytest.approx(norm, rel=1e-2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        content = {name: loss_and_norm(name, Path(folder, name.replace(" ", "_"))) for name in ROWS}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
