"""One step is the same step on any number of processes: loss, gradients, their norm, the weights after it."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.processes import run_ranks

STAGES = ("stage1", "stage2", "stage3")
# Dense with grouped heads, tied head, windows, learned positions, MLA and experts, ALiBi, a two-way prefix, filters.
MODELS = ("llama", "qwen2", "mistral", "gpt2", "deepseek_v3", "gpt_oss", "baichuan_13b", "chatglm_6b", "yuan2_2b")


OBJECTIVES = ("dpo", "aot", "bco", "kto", "reward")


def case(
    model: str, stage: str = "none", *, objective: str = "sft", lora_rank: int | None = None, **degrees: int
) -> dict[str, Any]:
    return {"model": model, "stage": stage, "objective": objective, "degrees": degrees, "lora_rank": lora_rank}


CASES = {
    2: [
        *(case(model, replicate=2) for model in MODELS),
        *(case(model, "stage3", shard=2) for model in MODELS),
        *(case("qwen2", stage, shard=2) for stage in STAGES),
        *(case("llama", stage, lora_rank=4, shard=2) for stage in STAGES),
        case("llama", lora_rank=4, replicate=2),
        *(case("llama", objective=name, replicate=2) for name in OBJECTIVES),
        *(case("llama", "stage3", objective=name, shard=2) for name in OBJECTIVES),
    ],
    4: [
        *(case("qwen2", stage, shard=4) for stage in STAGES),
        case("llama", "stage3", replicate=2, shard=2),
        case("deepseek_v3", "stage2", replicate=2, shard=2),
        case("llama", "stage1", lora_rank=4, replicate=2, shard=2),
    ],
    8: [case("qwen2", "stage3", replicate=2, shard=4)],
}


@pytest.mark.parametrize("count", CASES)
def test_steps(count: int) -> None:
    printed = run_ranks(count, "parallel.equality:compare", cases=CASES[count])
    assert printed.count("equal") == len(CASES[count])


def test_whole_and_split_again() -> None:
    layouts = [
        {"degrees": {"shard": 4}, "stage": "stage3"},
        {"degrees": {"replicate": 2, "shard": 2}, "stage": "stage1"},
        {"degrees": {"replicate": 4}, "stage": "none"},
    ]
    assert run_ranks(4, "parallel.equality:reshard", layouts=layouts).count("equal") == len(layouts)
