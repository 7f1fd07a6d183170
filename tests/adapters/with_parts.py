"""What the tests of parts share: models with one, and whether all ways of computing give the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import oarsmith
from oarsmith.adapters.linear import attach, disabled
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.adapters import AdapterKeys
from oarsmith.engine import Engine, Sampling
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.models.recompute import Recompute

from .conftest import randomise, tokens


def under(base: Path, **keys: Any) -> Decoder:
    """A base with a fresh adapter, in training mode."""
    model = load_decoder(base, rewrite=rewrite_of(AdapterKeys(**keys), base))
    attach(model, seed=3)
    return model.train()


def trained(model: Decoder, std: float = 0.3) -> Decoder:
    """As after some steps."""
    randomise((p for p in model.parameters() if p.requires_grad), seed=5, std=std)
    return model.eval()


def saved(model: Decoder, folder: Path, base: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(model, folder, base=str(base))
    return folder


def read(base: Path, folder: Path) -> Decoder:
    return oarsmith.load_model(base, adapter=folder, device="cpu")


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_as_alone(model: Decoder, sizes: tuple[int, ...] = (5, 1, 9), prompts: tuple[int, ...] | None = None) -> None:
    """Documents of a pack, and their gradients, are what they are by themselves; recomputed too.

    Args:
        prompts: tokens of each document that are its prompt.
    """
    ids = tokens(sum(sizes))
    bounds = [sum(sizes[:end]) for end in range(len(sizes) + 1)]
    positions = torch.cat([torch.arange(size) for size in sizes])
    given = [None] * len(sizes) if prompts is None else [(prompt,) for prompt in prompts]

    def hidden(start: int, stop: int, inner: list[int], asked: Any) -> Tensor:
        layout = Layout.documents([at - start for at in inner], positions[start:stop])
        return model.hidden(ids[start:stop], layout if asked is None else layout.asking(asked))

    model.zero_grad()
    alone = torch.cat([hidden(a, b, [a, b], own) for (a, b), own in zip(pairwise(bounds), given, strict=True)])
    alone.square().sum().backward()
    expected = gradients(model)
    assert expected
    for recompute in (None, *(Recompute(granularity=kind) for kind in ("full", "full_attn", "core_attn"))):
        model.zero_grad()
        model.recompute = recompute
        packed = hidden(0, sum(sizes), bounds, prompts)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
        packed.square().sum().backward()
        for name, found in gradients(model).items():
            limit = 1e-4 * float(expected[name].abs().max())
            torch.testing.assert_close(found, expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    model.recompute = None


@torch.no_grad()
def answers_as_forward(model: Decoder, **sizes: Any) -> Engine:
    """Greedy answers of an engine are those of whole forward passes: prompts that begin alike, in little room."""
    first = tokens(11).tolist()
    prompts = [first, first[:9], [*first[:9], 7, 8, 9], tokens(3, seed=2).tolist(), first]
    given = {"batch_size": 3, "block_size": 4, "max_step_tokens": 5, "num_pages": 11} | sizes
    engine = Engine(model, **given)
    for _ in range(2):  # the second time pages are known
        found = engine.generate(prompts, Sampling(max_new_tokens=8, ignore_eos=True))
        for prompt, completion in zip(prompts, found, strict=True):
            assert list(completion.prompt_ids) == prompt
            assert list(completion.ids) == greedy(model, prompt, 8), prompt
    return engine


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        bounds = [0, len(ids)]
        layout = Layout.documents(bounds, torch.arange(len(ids))).asking((len(prompt),))
        ids.append(int(model.logits(model.hidden(torch.tensor(ids), layout)[-1:]).argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def off_is_base(model: Decoder, base: Path) -> None:
    ids = tokens(2, 9)
    with disabled(model):
        assert torch.equal(model(ids), oarsmith.load_model(base, device="cpu")(ids))
