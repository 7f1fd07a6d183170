"""The column of adapters that change no projections: virtual tokens, edited states, rows, biases, both ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

import oarsmith
from oarsmith import Engine, Sampling
from oarsmith.adapters.linear import attach, disabled
from oarsmith.adapters.merge import merge_adapter, mergeable
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights, write_adapter
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout

from .bench import Bench, packed_logits
from .capabilities import close

_METHODS: dict[str, dict[str, Any]] = {
    "prefix_tuning": {"num_prefix_tokens": 5},
    "prompt_tuning": {"num_prompt_tokens": 5},
    "reft": {"lora_rank": 3, "reft_position": "f2+l3"},
    "bitfit": {},
    "trainable_tokens": {},
    "lora on the head": {"adapter_type": "lora", "lora_rank": 3, "lora_target_modules": ("embed_tokens", "lm_head")},
}


@torch.no_grad()
def part_adapters(bench: Bench) -> str:
    """Each by itself: packed as alone, answered with as whole passes do, back from its file, and off the base."""
    missing = []
    for name, keys in _METHODS.items():
        more = {"trainable_tokens": bench.document(13, 3)[:3]} if name == "trainable_tokens" else keys
        if not _works(bench, AdapterKeys.model_validate({"adapter_type": name, **more})):
            missing.append(name)
    return f"not {', '.join(missing)}" if missing else "yes"


def _works(bench: Bench, keys: AdapterKeys) -> bool:
    try:
        model = load_decoder(bench.path, rewrite=rewrite_of(keys, bench.path)).eval()
    except ConfigError:
        return False
    documents = [bench.document(length, seed) for length, seed in ((13, 3), (6, 4), (21, 5))]
    plain = packed_logits(bench.model(), documents)
    attach(model, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = packed_logits(model, documents)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, plain, strict=True)), keys.adapter_type
    for document, packed in zip(documents, expected, strict=True):
        close(packed_logits(model, [document])[0], packed)
    with disabled(model):
        for a, b in zip(packed_logits(model, documents), plain, strict=True):
            close(a, b, 1e-5)
    _answers(model, documents)
    folder = bench.folder / f"adapter-{keys.adapter_type}"
    folder.mkdir()
    write_adapter(model, folder, base="base")
    again = load_decoder(bench.path, rewrite=adapter_rewrite(folder)).eval()
    attach(again, seed=1)
    load_adapter_weights(again, folder)
    for a, b in zip(packed_logits(again, documents), expected, strict=True):
        close(a, b, 1e-4)
    if mergeable(model):
        merged = merge_adapter(model)
        for a, b in zip(packed_logits(merged, documents), expected, strict=True):
            close(a, b, 1e-4)
        oarsmith.save_model(merged, bench.folder / f"merged-{keys.adapter_type}")
    return True


def _answers(model: Decoder, documents: list[list[int]]) -> None:
    """Prompts in pieces, in an engine with little room."""
    engine = Engine(model, block_size=4, batch_size=2, max_step_tokens=6, num_pages=20)
    found = engine.generate(documents, Sampling(max_new_tokens=5, ignore_eos=True))
    for document, completion in zip(documents, found, strict=True):
        ids = [*document, *completion.ids]
        for at, after in pairwise(range(len(document), len(ids) + 1)):
            layout = Layout.documents([0, at], torch.arange(at)).asking([len(document)])
            layout = replace(layout, prompts_T=torch.full((at,), len(document)))
            logits = model.logits(model.hidden(torch.tensor(ids[:at]), layout)[-1:])[0]
            assert float(logits.max() - logits[ids[after - 1]]) < 1e-3, (at, ids)
