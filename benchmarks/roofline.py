"""What the machine could do: its measured rate of bf16 matrix products, and the FLOPs that a model's token costs.

    python benchmarks/roofline.py --threads 2

MFU is the FLOPs of the model (no recomputation, no padding, causal attention counted once) by time, divided by that
rate. The same formula is used for every trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# [tokens, in] x [in, out] of decoder blocks between 15M and 1B parameters; the best of them counts. Of the trials of a
# shape it is the ninth in ten: somebody else's work must not make the machine look slow, nor a jump of its clock fast.
SHAPES = ((512, 576, 1536), (2048, 576, 1536), (2048, 1536, 576), (4096, 288, 768), (2048, 2048, 2048))
NUM_TRIALS, SECONDS_PER_TRIAL = 30, 0.05


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the FLOPs of a token depend on.

    Attributes:
        matrix_parameters: those that multiply every token, the head's included.
        attention_width: query heads x size of a head.
    """

    matrix_parameters: int
    num_layers: int
    attention_width: int

    def flops_per_token(self, mean_context: float, *, frozen: bool) -> float:
        """Forward and backward of one token that attends to `mean_context` tokens, itself included, on average.

        A matrix costs 2 FLOPs a parameter forwards and 2 for the gradient of its input; its own gradient, 2 more, is
        not needed where it is frozen (LoRA; the adapters' own few FLOPs are left out). Attention has two products of
        `attention_width` by context each way, the way back twice.
        """
        attention = 12 * self.num_layers * self.attention_width * mean_context
        return (4 if frozen else 6) * self.matrix_parameters + attention


def model_size(model: Path) -> ModelSize:
    """Read from config.json of a Llama-like model (gated MLP, grouped queries)."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // heads
    keys = head * (config.get("num_key_value_heads") or heads)
    block = 2 * hidden * heads * head + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
    return ModelSize(
        matrix_parameters=layers * block + hidden * config["vocab_size"],
        num_layers=layers,
        attention_width=heads * head,
    )


def mean_context(lengths: list[int]) -> float:
    """Tokens a token attends to, on average over documents of these lengths, each causal and alone."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def matmul_rate(threads: int) -> float:
    """FLOP/s of bf16 products in a process of its own, with as many threads as the trainers get."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return max(json.loads(done.stdout).values())


def _measure(threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    rates = {}
    for tokens, inputs, outputs in SHAPES:
        x, w = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((tokens, inputs), (inputs, outputs)))
        y = torch.empty(tokens, outputs, dtype=torch.bfloat16)
        torch.mm(x, w, out=y)
        trials: list[float] = []
        while len(trials) < NUM_TRIALS:
            begun, runs = time.perf_counter(), 0
            while runs == 0 or time.perf_counter() - begun < SECONDS_PER_TRIAL:
                torch.mm(x, w, out=y)
                runs += 1
            trials.append(2 * tokens * inputs * outputs * runs / (time.perf_counter() - begun))
        rates[f"{tokens}x{inputs}x{outputs}"] = statistics.quantiles(trials, n=10)[-1]
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measured bf16 matrix products, FLOP/s by shape, as JSON.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    print(json.dumps(_measure(parser.parse_args().threads)))
