"""What the tests of LoRA's relatives share: models under a change, and PEFT's model beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional

import oarsmith
from oarsmith.adapters.change import Change
from oarsmith.adapters.forms import WeightForm
from oarsmith.adapters.linear import attach
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.adapters.targets import adapt_rewrite, kept_as, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder

from .conftest import Adapted, Base, randomise, tokens

SOME = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj"), "mixtral": ("k_proj", "w1")}
IDS = tokens(2, 9)


def under(
    base: Path,
    change: Change,
    targets: str | tuple[str, ...],
    form: WeightForm | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """A base with a fresh adapter, in training mode."""
    rewrite = adapt_rewrite(lambda places: dict.fromkeys(match_targets(places, targets), change))
    model = load_decoder(base, dtype=dtype, rewrite=rewrite if form is None else kept_as(form, rewrite))
    attach(model, seed=3)
    return model.train()


def trained(model: Decoder, std: float = 0.1) -> Decoder:
    """As after some steps."""
    randomise((p for p in model.parameters() if p.requires_grad), seed=5, std=std)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model.eval()(IDS)
    return found if isinstance(found, Tensor) else found.logits


def saved(model: Decoder, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(model, folder, base="base")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def by_peft(base: Base, folder: Path) -> Any:
    """Our file, read by PEFT, which trains on from it."""
    return peft.PeftModel.from_pretrained(base.oracle(), folder, is_trainable=True).eval()


def loss_of(found: Any) -> Tensor:
    out = found if isinstance(found, Tensor) else found.logits
    return functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def peft_gradients(oracle: Any) -> dict[str, Tensor]:
    """By our file's keys."""
    oracle.zero_grad()
    loss_of(oracle(IDS)).backward()
    return {name.replace(".default", ""): p.grad.clone() for name, p in oracle.named_parameters() if p.grad is not None}


def our_gradients(model: Decoder) -> dict[str, Tensor]:
    """By the model's names."""
    model.zero_grad()
    loss_of(model.eval()(IDS)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def same_as_peft(adapted: Adapted, folder: Path) -> Decoder:
    """PEFT's adapter in our model: logits, merged weights, and the file written again."""
    ours = oarsmith.load_model(adapted.base.path, adapter=adapted.path, device="cpu")
    expected = logits(adapted.oracle)
    assert (expected - logits(adapted.base.oracle())).abs().max() > 0.01
    close(logits(ours), expected)
    again = saved(ours, folder)
    close(logits(by_peft(adapted.base, again)), expected)
    merged = merge_adapter(oarsmith.load_model(adapted.base.path, adapter=adapted.path, device="cpu"))
    close(logits(merged), expected)
    theirs = adapted.oracle.merge_and_unload()
    oarsmith.save_model(merged, folder / "merged")
    plain = dict(theirs.named_parameters())
    found = type(theirs).from_pretrained(folder / "merged", dtype=torch.float32)
    for name, parameter in found.named_parameters():
        close(parameter, plain[name])
    return ours


def whole(base: Path, change: Change, targets: str | tuple[str, ...], form: WeightForm | None = None) -> None:
    """The start is the base, and merged is adapted."""
    plain = logits(load_decoder(base, rewrite=None if form is None else kept_as(form, lambda _, spec: spec)))
    model = under(base, change, targets, form)
    close(logits(model), plain, atol=1e-4 if form else 1e-5)
    found = logits(trained(model))
    assert (found - plain).abs().max() > 0.01
    if form is None:
        close(logits(merge_adapter(model)), found, atol=1e-4)
