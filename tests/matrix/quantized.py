"""The column of quantization."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.load import load_config
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.errors import ModelError
from oarsmith.jobs.quantize_plan import make_plan, open_output, write_parts
from oarsmith.quantize.proof import Comparison, Walked, compare
from oarsmith.quantize.read_again import rounding_of

from .bench import Bench, packed_logits

# Divergence in nats, of random models whose logits are large.
_LIMITS = {"w8a16": 0.05, "w4a16": 2.0, "w8a8": 0.3}
_WORDS = {
    "w8a16": ("--algorithm", "rtn"),
    "w4a16": ("--algorithm", "gptaq", "--group_size", "-1", "--smooth_all_linears", "true"),
    "w8a8": ("--act_quant", "static", "--smooth", "smoothquant"),
}


def quantized(bench: Bench) -> str:
    """Weights in 8 and 4 bits, and int8 with static scales of inputs: calibrated, written, read back, compared.

    Returns:
        "yes", or the layout that has a place for the family's files where compressed-tensors has none.
    """
    try:
        for scheme, own in _WORDS.items():
            found = _quantize(bench, scheme, *own)
            assert found.kl < _LIMITS[scheme], (scheme, found)
    except ModelError as error:
        if "have no place" not in error.what:
            raise
    else:
        return "yes"
    for scheme in ("w8a16", "w4a16"):  # GGUF says nothing of inputs
        found = _quantize(bench, scheme, "--layout", "gguf")
        assert found.kl < _LIMITS[scheme], (scheme, found)
    return "as GGUF"


def _quantize(bench: Bench, scheme: str, *words: str) -> Comparison:
    out = bench.folder / (f"{scheme}.gguf" if "gguf" in words else scheme)
    own = [str(bench.path), str(out), "--scheme", scheme, "--calibration", "none", *words]
    documents = [bench.document(40, seed) for seed in range(6)]
    held_out, found = [bench.document(30, 100 + seed) for seed in range(3)], list[Comparison]()
    plan = make_plan(load_config(QuantizeConfig, None, own).config, bench.path, None)

    def check(directory: Path) -> None:
        original, other = Walked(bench.path, held_out), Walked(directory, held_out, rounding_of(directory))
        found.append(compare(original, other, held_out))
        original.close()
        other.close()
        # The decoder as a whole gives what the walk gave, layer by layer.
        for path, walked in ((bench.path, original), (directory, Walked(directory, held_out))):
            logits = torch.cat(packed_logits(load_decoder(path, dtype=torch.float32).eval(), held_out))
            with walked.head() as head:
                again = head(0, len(logits))
            assert (logits - again).abs().max() <= 1e-3 * logits.abs().max(), path

    with open_output(plan, out, check, with_tokenizer=False) as writer:
        pieces = write_parts(plan, writer, documents, Console(quiet=True))
    assert len(pieces) >= len(plan.contents.maps), (len(pieces), len(plan.contents.maps))
    return found[0]
