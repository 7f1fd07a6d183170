"""How near the logits are to those of the original code, for every family and variant that the tests know.

    python benchmarks/parity.py --out parity.md

Two kinds of oracle, both in float32: transformers, run here beside Oarsmith on tiny random models of every variant of
tests/models/variants, and the outputs that the authors' own code gave once (tests/fixtures/families). Each case feeds
two rows of 40 tokens (or what was recorded), past every window and original context, then continues a prompt greedily
with a cache on both sides. Exits with an error if a case is outside its limit or continues otherwise.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.models.conftest import VARIANTS, Case, randomise, tokens  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures" / "families"
LIMIT = 1e-4
NUM_GREEDY = 16


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One case. ``difference`` is the largest of all logits; ``spread`` their standard deviation, for comparison."""

    family: str
    case: str
    oracle: str
    num_tokens: int
    difference: float
    limit: float
    spread: float
    same_greedy: bool

    @property
    def good(self) -> bool:
        return self.difference <= self.limit and self.same_greedy


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """``count`` tokens, one at a time, with a cache."""
    cache, ids, found = model.new_cache(1, len(prompt) + count), prompt, []
    for _ in range(count):
        hidden = model.hidden(torch.tensor(ids), cache.extend([len(ids)]), cache)
        ids = [int(model.logits(hidden[-1:]).argmax())]
        found += ids
    return found


@torch.no_grad()
def oracle_greedy(case: Case, prompt: list[int]) -> list[int]:
    model, past, ids, found = case.oracle(), None, prompt, []
    for _ in range(NUM_GREEDY):
        out = model(torch.tensor([ids]), past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, [int(out.logits[0, -1].argmax())]
        found += ids
    return found


@torch.no_grad()
def beside_transformers(name: str, folder: Path) -> Parity:
    import transformers

    kind, arguments = VARIANTS[name]
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**arguments))
    randomise(theirs, seed=7)
    theirs.save_pretrained(folder)
    case = Case(name, folder)
    model, ids, prompt = case.decoder(), tokens(2, 40), tokens(9, seed=3).tolist()
    expected = case.oracle()(ids).logits
    return Parity(
        family=families.find(model.config).name,
        case=name,
        oracle=f"transformers {transformers.__version__}",
        num_tokens=ids.numel(),
        difference=float((model(ids) - expected).abs().max()),
        limit=LIMIT,
        spread=float(expected.std()),
        same_greedy=greedy(model, prompt, NUM_GREEDY) == oracle_greedy(case, prompt),
    )


@torch.no_grad()
def beside_recorded(folder: Path) -> Parity:
    recorded = np.load(folder / "expected.npz")
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    model = load_decoder(folder, dtype=torch.float32).eval()
    ids, logits = torch.from_numpy(recorded["input_ids"]), torch.from_numpy(recorded["logits"])
    lengths = recorded["lengths"].tolist() if "lengths" in recorded else [ids.shape[1]] * len(ids)

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for row, length in enumerate(lengths):
            yield model(ids[row : row + 1, :length])[0], logits[row, :length]

    prompt, answer = recorded["input_ids"][0].tolist(), recorded["greedy"].tolist()
    return Parity(
        family=families.find(model.config).name,
        case=folder.name,
        oracle=f"recorded: {metadata['reference']}",
        num_tokens=sum(lengths),
        difference=max(float((found - expected).abs().max()) for found, expected in rows()),
        limit=metadata["logits_atol"],
        spread=float(logits.std()),
        same_greedy=greedy(model, prompt, len(answer)) == answer,
    )


def measure(pattern: str) -> Iterator[Parity]:
    for name in VARIANTS:
        if fnmatch.fnmatch(name, pattern):
            with tempfile.TemporaryDirectory() as folder:
                yield beside_transformers(name, Path(folder))
    for folder in sorted(FIXTURES.iterdir()):
        if fnmatch.fnmatch(folder.name, pattern):
            yield beside_recorded(folder)


def table(results: list[Parity]) -> str:
    """Markdown, by family."""
    lines = [
        "| family | case | oracle | tokens | max abs. dlogit | limit | std of logits | greedy equal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in sorted(results, key=lambda result: result.family):
        numbers = f"{found.num_tokens} | {found.difference:.1e} | {found.limit:.0e} | {found.spread:.2f}"
        verdict = "yes" if found.same_greedy else "NO"
        lines.append(f"| {found.family} | {found.case} | {found.oracle[:70]} | {numbers} | {verdict} |")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    worst = max(results, key=lambda result: result.difference / result.limit)
    summary = (
        f"{len(results)} cases of {len({result.family for result in results})} families; the nearest to its limit is "
        f"{worst.case} ({worst.difference:.1e} of {worst.limit:.0e}). {platform.machine()}, Python "
        f"{platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    return "\n".join([*lines, "", summary, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Logits and greedy tokens beside the original code.")
    parser.add_argument("--only", default="*", help="pattern of case names, e.g. 'llama*'")
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices
    results = list(measure(options.only))
    if not results:
        parser.error(f"no case matches {options.only}")
    text = table(results)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
