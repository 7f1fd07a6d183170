"""LongRoPE: past the original context all keys turn otherwise, so the engine reads the text again, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import oarsmith
from oarsmith.engine import Engine, Sampling
from oarsmith.models.decoder import Decoder

from .test_engine import transformers_answer

ORIGINAL = 16


@torch.inference_mode()
def without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_without_a_cache(tiny_model: Callable[[str], Path], batch_size: int) -> None:
    """Prompts that begin below, at and above the border; transformers reads again too."""
    path = tiny_model("phi3_long")
    model = oarsmith.load_model(path, dtype="fp32", device="cpu")
    prompts = [list(range(5, 5 + n)) for n in (1, 9, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 30)]
    answers = Engine(model, batch_size=batch_size).generate(prompts, Sampling(max_new_tokens=24))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.ids) == without_cache(model, prompt, 24)
        assert list(answer.ids) == transformers_answer(path, prompt, 24)


def test_keeping_the_keys_would_answer_otherwise(tiny_model: Callable[[str], Path]) -> None:
    """The case above decides something."""
    model, prompt = oarsmith.load_model(tiny_model("phi3_long"), dtype="fp32", device="cpu"), list(range(5, 14))
    cache, ids, kept = model.new_cache(1, 33), prompt, []
    with torch.inference_mode():
        for _ in range(24):
            hidden = model.hidden(torch.tensor(ids), cache.extend([len(ids)]), cache)
            ids = [int(model.logits(hidden[-1:]).argmax())]
            kept += ids
    expected = without_cache(model, prompt, 24)
    assert kept[: ORIGINAL - len(prompt) + 1] == expected[: ORIGINAL - len(prompt) + 1] and kept != expected
