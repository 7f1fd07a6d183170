"""PEFT's side of `benchmarks/adapters.py`: steps of one method, in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

RANK, TARGETS = 16, "all-linear"


def config_of(method: str) -> Any:
    """PEFT's configuration of a method of the benchmark; None: all weights train."""
    common = {"task_type": "CAUSAL_LM"}
    linear = {**common, "target_modules": TARGETS}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    scaled = ["k_proj", "v_proj", "down_proj"]
    kinds: dict[str, Any] = {
        "full": lambda: None,
        "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=32, **linear),
        "pissa": lambda: peft.LoraConfig(r=RANK, lora_alpha=32, init_lora_weights="pissa_niter_4", **linear),
        "olora": lambda: peft.LoraConfig(r=RANK, lora_alpha=32, init_lora_weights="olora", **linear),
        "dora": lambda: peft.LoraConfig(r=RANK, lora_alpha=32, use_dora=True, **linear),
        "adalora": lambda: peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=1000, **linear),
        "vera": lambda: peft.VeraConfig(r=256, target_modules=["q_proj", "o_proj"], **common),
        "loha": lambda: peft.LoHaConfig(r=RANK, alpha=32, target_modules=names, **common),
        "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=32, target_modules=names, **common),
        "ia3": lambda: peft.IA3Config(target_modules=scaled, feedforward_modules=["down_proj"], **common),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=names, **common),
        "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=names, **common),
        "boft": lambda: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=names, **common),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=128, **common),
        "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=128, **common),
    }
    return kinds[method]()


def main() -> None:
    """One measurement."""
    parser = argparse.ArgumentParser()
    for name in ("model", "one"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "rows", "length", "steps", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    config = config_of(options.one)
    if config is not None:
        model = peft.get_peft_model(model, config)
    model.train()
    rows, length, size = options.rows, options.length, model.config.vocab_size
    made = [[(7919 * (row * length + at) + 13) % (size - 10) + 5 for at in range(length)] for row in range(rows)]
    ids = torch.tensor(made)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, seconds = torch.optim.AdamW(parameters, lr=1e-4), []
    for step in range(options.warmup + options.steps):
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if options.one == "adalora":
            model.base_model.update_and_allocate(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trained = sum(p.numel() for p in parameters)
    print(json.dumps({"seconds": seconds[options.warmup :], "peak_mb": peak, "trained": trained}))


if __name__ == "__main__":
    main()
