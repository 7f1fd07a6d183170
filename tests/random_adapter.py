"""LoRA adapters that change what a model says."""

import torch

from oarsmith.adapters.lora import LoraSegment, attach, lora_modules
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.adapters.targets import lora_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder


def make_adapter(base, folder):
    """A random LoRA adapter."""
    segment = LoraSegment(name="", rank=2, scale=1.0)
    rewrite = lora_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), segment), 0.0)
    model = load_decoder(base, rewrite=rewrite)
    attach(model, 1)
    with torch.no_grad():
        for _, module in lora_modules(model):
            for b in module.lora_B.values():
                b.normal_(std=20.0, generator=torch.Generator().manual_seed(1))
    folder.mkdir()
    write_adapter(model, folder, base=str(base), settings={"r": 2, "lora_alpha": 2.0, "lora_dropout": 0.0})
    return folder
