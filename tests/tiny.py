"""Tiny random models, rows for them, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import oarsmith
from oarsmith import cli
from oarsmith.adapters.linear import attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.data.batch import Batch, make_batch
from oarsmith.data.samples import Sample
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.text.choose import with_named_template
from random_adapter import randomise

TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizers" / "qwen25_bpe_json"
SRC = Path(oarsmith.__file__).parents[1]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1120,  # the tokenizer has 1,106 ids; embeddings are padded in real models too
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {**_SIZES, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "mistral": {**_SIZES, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "gemma": {
        **_SIZES,
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
        "vocab_size": 1120,
        "torch_dtype": "float32",
    },
}


def tiny_decoder(family: str = "llama", *, seed: int = 0, lora_rank: int | None = None, **changes: Any) -> Decoder:
    """A float32 decoder in which every parameter is random, norms and biases too; with LoRA both A and B are."""
    config = CONFIGS[family] | changes
    known, spec = families.build_spec(config)
    if lora_rank is not None:
        change = Lora(rank=lora_rank, alpha=2.0 * lora_rank)
        spec = adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))(known, spec)
    model = Decoder(spec, config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Several times the deviation of a fresh model: then attention is not nearly uniform.
            parameter.add_(torch.empty(parameter.shape).normal_(std=0.08, generator=generator))
        if lora_rank is not None:
            attach(model, seed)
            randomise(model, 0.1, seed + 2)
    return model


def write_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model directory with weights and a tokenizer that has the chatml template."""
    tokenizer = with_named_template(oarsmith.load_tokenizer(TOKENIZER), "chatml")
    oarsmith.save_model(tiny_decoder(family, seed=seed, **changes), folder, tokenizer)
    return folder


def write_rows(path: Path, count: int = 24, first: int = 0) -> Path:
    """Questions and answers of different lengths, one JSON object a line."""
    rows = (
        {
            "src": f"What is {n} plus {n + 1}?" + " Say it slowly." * (n % 3),
            "tgt": f"It is {2 * n + 1}." + " Yes." * (n % 5),
        }
        for n in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_samples(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 1120) -> list[Sample]:
    """Documents of random ids; about a third of the tokens carry no loss, some a weight that is not 1."""
    generator = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        weights = generator.choice([0.0, 1.0, 0.5], size=length, p=[0.35, 0.55, 0.1]).astype(np.float32)
        weights[0], weights[-1] = 0.0, 1.0
        ids = generator.integers(0, vocab_size, size=length).astype(np.int32)
        samples.append(Sample(ids, weights, f"random:{number}"))
    return samples


def batches_of(samples: Sequence[Sample], size: int) -> list[Batch]:
    return [make_batch(samples[start : start + size]) for start in range(0, len(samples), size)]


@dataclass(frozen=True)
class Step:
    """Mean loss and gradients (fp32, by parameter name) of a step over several micro-batches."""

    loss: float
    grads: dict[str, torch.Tensor]


def one_step(model: Decoder, batches: Iterable[Batch]) -> Step:
    """Forward and backward of the SFT objective, as the loop does it, without the update."""
    from oarsmith.methods.sft import OBJECTIVE
    from oarsmith.training.step import Gradients

    batches = list(batches)
    scale = 1.0 / sum(batch.num_trained for batch in batches)
    gradients, total = Gradients(model, wide=len(batches) > 1), 0.0
    for batch in batches:
        outcome = OBJECTIVE(model, batch, scale)
        outcome.loss.backward()
        total += outcome.total
    found = {name: grad.detach().float().clone() for name, grad in gradients.result().items()}
    gradients.clear()
    return Step(total * scale, found)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest over the tensors of ||a - b|| / ||b||."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-12)) for name in b)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sft_words(model: Path, data: Path, output_dir: Path, **keys: Any) -> list[str]:
    """Words after ``oarsmith``. Tiny matrices only wait for a second thread."""
    keys = {"num_threads": 1, "dtype": "fp32", "output_dir": output_dir, **keys}
    return ["sft", str(model), str(data), *(f"--{key}={value}" for key, value in keys.items())]


def run_sft(model: Path, data: Path, output_dir: Path, **keys: Any) -> int:
    """``oarsmith sft`` in this process; the exit status."""
    return cli.main(sft_words(model, data, output_dir, **keys))


def interrupted(run: Path, again: Path, *lost: str) -> None:
    """A copy of a finished run as it would be if it had been killed: without its weights and these checkpoints."""
    shutil.copytree(run, again)
    for name in (weights_folder(run), *lost):
        shutil.rmtree(again / name)


def assert_same_run(run: Path, again: Path) -> None:
    """The log and all weights are the same bit for bit."""
    files = [path.relative_to(run) for path in (run / weights_folder(run)).glob("*.safetensors")]
    assert files
    for file in (Path("log.jsonl"), *files):
        assert (run / file).read_bytes() == (again / file).read_bytes(), (again, file)


def weights_folder(run: Path) -> str:
    return "adapter" if (run / "adapter").is_dir() else "model"


def command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "oarsmith", *words]


def environment() -> dict[str, str]:
    """For a process that runs this checkout; one thread from the start, whatever the machine."""
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
