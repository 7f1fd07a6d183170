"""LoRA adapters that change what a model says."""

import torch

from oarsmith.adapters.linear import adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder


@torch.no_grad()
def randomise(model, std, seed=1, tensors=("lora_B",)):
    """Give tensors of a model's adapters random values: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted_modules(model):
        for table in module.adapter.values():
            for name in table:
                if name in tensors:
                    table[name].normal_(std=std, generator=generator)


def make_adapter(base, folder, seed=1):
    """A random LoRA adapter."""
    change = Lora(rank=2, alpha=2.0)
    rewrite = adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))
    model = load_decoder(base, rewrite=rewrite)
    attach(model, seed)
    randomise(model, std=20.0, seed=seed)
    folder.mkdir()
    write_adapter(model, folder, base=str(base))
    return folder
