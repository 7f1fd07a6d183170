"""llm-compressor's side of `benchmarks/quantize.py`: one scheme, in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def weights(bits: int, group: int | None, *, symmetric: bool) -> dict[str, Any]:
    """Arguments of a weight's grid."""
    common = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return common | ({"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group})


def groups(bits: int, group: int | None, *, symmetric: bool) -> dict[str, Any]:
    """Of all linear maps but the head."""
    return {"group_0": {"targets": ["Linear"], "weights": weights(bits, group, symmetric=symmetric)}}


RECIPES: dict[str, Any] = {
    "w8a16": lambda: [QuantizationModifier(config_groups=groups(8, None, symmetric=True), ignore=["lm_head"])],
    "w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ],
    "w4-sym-rtn": lambda: [QuantizationModifier(config_groups=groups(4, 64, symmetric=True), ignore=["lm_head"])],
    "w4-asym-rtn": lambda: [QuantizationModifier(config_groups=groups(4, 64, symmetric=False), ignore=["lm_head"])],
    "w4-sym-gptq": lambda: [GPTQModifier(config_groups=groups(4, 64, symmetric=True), ignore=["lm_head"])],
    "w4-asym-gptq": lambda: [GPTQModifier(config_groups=groups(4, 64, symmetric=False), ignore=["lm_head"])],
    "fp8": lambda: [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])],
}


def main() -> None:
    """One measurement: seconds of quantizing, the model being loaded; peak memory; the model's folder."""
    parser = argparse.ArgumentParser()
    for name in ("model", "text", "out", "one"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "samples", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = tokenizer(Path(options.text).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    rows = [ids[at : at + options.length] for at in range(0, options.samples * options.length, options.length)]
    rows = [row for row in rows if len(row) == options.length]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    begin = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=RECIPES[options.one](),
        max_seq_length=options.length,
        num_calibration_samples=len(rows),
    )
    seconds = time.perf_counter() - begin
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
