"""The public interface: load a model and its tokenizer, look at logits, generate, save.

python examples/load_and_generate.py MODEL

MODEL is a Hugging Face directory, such as the `model` or `merged` folder of a run.
"""

from __future__ import annotations

import sys

import torch

import oarsmith


def main(path: str) -> None:
    model = oarsmith.load_model(path)
    tokenizer = oarsmith.load_tokenizer(path)

    # The model is a torch.nn.Module: ids [B, T] to logits [B, T, V].
    ids = tokenizer.encode("The boat lies at the")
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))
    best = logits[0, -1].float().softmax(-1).topk(3)
    for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{probability:6.1%}  {tokenizer.decode([token])!r}")

    # The engine answers conversations, texts or ids, several at a time.
    engine = oarsmith.Engine(model, tokenizer)
    question = [{"role": "user", "content": "Name three things found in a harbour."}]
    [answer] = engine.generate([question], oarsmith.Sampling(max_new_tokens=60))
    print(f"\n{answer.text}\n({answer.num_tokens} tokens, ended by {answer.finish_reason})\n")

    # Streaming, drawn instead of greedy. The seed makes the answer repeatable.
    for piece in engine.stream(question, oarsmith.Sampling(max_new_tokens=60, temperature=0.7, top_p=0.9, seed=1)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
