"""A tiny real model whose greedy answer to every prompt is known: each token is followed by the next of one long cycle.

So answers to prompts that end differently differ from their first token on, and one that was mixed up is seen.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

import oarsmith
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

WIDTH = 128
CONTEXT = 1024


class Cycle:
    """The cycle and its text.

    Attributes:
        ids: all tokens in their order; the last one is followed by the first.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        tokenizer = oarsmith.load_tokenizer(tokenizer_dir)
        self._pieces = {}
        for char in map(chr, range(33, 127)):
            for text in (char, f" {char}", *(f" {char}{other}" for other in "aeioustnr")):
                ids = tokenizer.encode(text)
                if len(ids) == 1:
                    self._pieces[ids[0]] = text
        self.ids = sorted(self._pieces)
        random.Random(5).shuffle(self.ids)

    def after(self, place: int, count: int) -> str:
        """The text that follows the token at a place of the cycle."""
        size = len(self.ids)
        return "".join(self._pieces[self.ids[(place + 1 + step) % size]] for step in range(count))

    def prompt(self, place: int, length: int, draw: random.Random) -> list[int]:
        """Ids that end with the token at a place."""
        return [*draw.choices(self.ids, k=length - 1), self.ids[place]]


def write_cycle_model(folder: Path, tokenizer_dir: Path) -> Cycle:
    """Make the model's directory."""
    cycle = Cycle(tokenizer_dir)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1120,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    model = Decoder(families.build_spec(config)[1], config)
    with torch.no_grad():
        # The blocks add nothing: the next token depends on the last one alone.
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        table = torch.randn(config["vocab_size"], WIDTH, generator=torch.Generator().manual_seed(0))
        model.embedding.weight.copy_(table)
        for place, id in enumerate(cycle.ids):
            model.head.weight[cycle.ids[(place + 1) % len(cycle.ids)]] = table[id]
    oarsmith.save_model(model.eval(), folder)
    for file in tokenizer_dir.iterdir():
        if file.name != "expected.json":
            shutil.copy(file, folder)
    return cycle
