"""What lies in the cache is what was computed: pieces of any size, rooms given to others, documents in one stream.

Checkpoints by the authors' code (tests/fixtures/families) with rules of their own, and the older native families.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import KVCache
from oarsmith.models.lfa import FilteredAttention

from .conftest import Case, read_json, tokens
from .variants import older

Make = Callable[[str], Case]
FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
AUTHORS = [
    "baichuan2_13b",
    "baichuan_13b",
    "baichuan_7b",
    "chatglm2_6b",
    "chatglm3_6b",
    "chatglm_6b",
    "internlm2",
    "qwen1_ntk_logn",
    "yuan2_2b",
]
NAMES = [*AUTHORS, *older.VARIANTS]
# Rules that look at the first call as the prompt: it must come whole.
WHOLE_PROMPT = {"chatglm_6b", "qwen1_ntk_logn"}
EOD, GMASK, MASK, SOP = 290, 301, 300, 304
# fp32; one product over more rows may be blocked differently, and logits are as large as 15 here.
TOLERANCE = 5e-5


def load(case: Make, name: str) -> Decoder:
    if name in AUTHORS:
        return load_decoder(FAMILIES / name, dtype=torch.float32).eval()
    return case(name).decoder()


def document(name: str, length: int, seed: int) -> Tensor:
    """Random ids with what the family's rule looks for: ends of documents, or a mask and a start in the middle."""
    ids = tokens(length, vocab=101 if name in older.VARIANTS else 280, seed=seed)
    if name == "yuan2_2b":
        for at in (0, 4, 5, 13, length - 1):
            ids[min(at, length - 1)] = EOD
    if name == "chatglm_6b":
        start = max(length // 2, 1)
        ids[start], ids[start - 1] = SOP, MASK if seed % 2 else GMASK
        ids[start - 2 if start > 2 else start - 1] = GMASK
    return ids


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def step(model: Decoder, cache: KVCache, pieces: list[Tensor], rooms: list[int]) -> list[Tensor]:
    """One call with a piece for each of the rooms; the logits of each."""
    counts = [len(piece) for piece in pieces]
    layout = cache.extend(counts, rooms)
    return list(model.logits(model.hidden(torch.cat(pieces), layout, cache)).split(counts))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pieces_of_any_size(case: Make, name: str) -> None:
    """Seven documents through three rooms in random pieces, rooms given on as documents end. Qwen stays within 24."""
    model, draw = load(case, name), random.Random(name)
    longest = 24 if name == "qwen1_ntk_logn" else 30
    shortest = 2 if name == "chatglm_6b" else 1
    waiting = [document(name, length, seed) for seed, length in enumerate((longest, 2, 17, 9, 23, shortest, 12), 1)]
    cache, open_rooms = model.new_cache(3, longest), dict[int, tuple[Tensor, Tensor, int]]()
    while waiting or open_rooms:
        for room in {0, 1, 2} - open_rooms.keys():
            if waiting:
                ids = waiting.pop(0)
                cache.used[room] = 0
                open_rooms[room] = ids, model(ids[None])[0], 0
        rooms = draw.sample(sorted(open_rooms), draw.randint(1, len(open_rooms)))
        counts = []
        for room in rooms:
            ids, _, seen = open_rooms[room]
            least = len(ids) // 2 + 1 if name in WHOLE_PROMPT and seen == 0 else 0
            counts.append(max(least, draw.choice((0, 1, 2, len(ids) - seen, draw.randint(0, len(ids) - seen)))))
        counts = [min(count, len(open_rooms[r][0]) - open_rooms[r][2]) for count, r in zip(counts, rooms, strict=True)]
        pieces = [open_rooms[r][0][open_rooms[r][2] :][:count] for count, r in zip(counts, rooms, strict=True)]
        if not any(counts):
            continue
        for room, count, found in zip(rooms, counts, step(model, cache, pieces, rooms), strict=True):
            ids, expected, seen = open_rooms[room]
            close(found, expected[seen : seen + count])
            open_rooms[room] = ids, expected, seen + count
            if seen + count == len(ids):
                del open_rooms[room]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "adjacent"])
@torch.no_grad()
def test_pages(case: Make, name: str, scattered: bool) -> None:
    """Documents over pages of 4 tokens, side by side or not; a third one goes on where another stands, then differs."""
    model, draw = load(case, name), random.Random(name)
    length = 24
    parts = [document(name, length, seed) for seed in (1, 2)]
    parts.append(torch.cat((parts[0][:13], document(name, length, 3)[13:])) if name != "chatglm_6b" else parts[0])
    expected = [model(ids[None])[0] for ids in parts]
    cache = model.new_cache(3, 4, num_pages=20)
    numbers = draw.sample(range(20), 20) if scattered else list(range(20))
    cache.pages = [numbers[:6], numbers[6:12], [*numbers[:3], *numbers[12:15]]]
    for counts in ((13, 15), (0, 1), (1, 1), (6, 7), (4, 0)):
        pieces = [ids[used : used + count] for ids, used, count in zip(parts, cache.used, counts, strict=False)]
        before = cache.used[:2]
        for row, found in enumerate(step(model, cache, pieces, [0, 1])):
            close(found, expected[row][before[row] : before[row] + counts[row]])
        if counts == (13, 15):
            cache.copy_sequence(0, 2)
            cache.copy_page(numbers[3], numbers[12])
    close(torch.cat(step(model, cache, [parts[2][13:]], [2])), expected[2][13:])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prompt_in_several_calls(case: Make, name: str) -> None:
    """What its length decides is told beforehand: past 24 tokens Qwen turns by another base."""
    if name == "chatglm_6b":
        pytest.skip("sees its prompt in both directions: it comes whole")
    model, ids = load(case, name), document(name, 46, 1)
    expected, cache, found = model(ids[None])[0], model.new_cache(1, 46), []
    for piece in ids.split([9, 20, 17]):
        layout = cache.extend([len(piece)], prompts=[46])
        found.append(model.logits(model.hidden(piece, layout, cache)))
    close(torch.cat(found), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_documents_in_one_stream(case: Make, name: str) -> None:
    """Alone, in one row with borders, and as one call of several sequences with a cache."""
    model, lengths = load(case, name), [9, 2 if name == "chatglm_6b" else 1, 14, 6]
    parts = [document(name, length, seed) for seed, length in enumerate(lengths, 20)]
    alone = [model(ids[None])[0] for ids in parts]
    borders = [0, *accumulate(lengths)]
    packed = model(torch.cat(parts)[None], documents=borders)[0]
    cached = step(model, model.new_cache(4, 14), parts, [0, 1, 2, 3])
    for (start, stop), expected, found in zip(pairwise(borders), alone, cached, strict=True):
        close(packed[start:stop], expected)
        close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_packed_gradients(case: Make, name: str) -> None:
    """The gradient of a sum over documents is the sum of their gradients, in training mode too."""
    model, lengths = load(case, name).train(), [9, 14, 6]
    parts = [document(name, length, seed) for seed, length in enumerate(lengths, 30)]
    results = []
    for packed in (True, False):
        model.zero_grad()
        rows = [torch.cat(parts)] if packed else parts
        for ids in rows:
            model(ids[None], documents=[0, *accumulate(lengths)] if packed else None).logsumexp(-1).sum().backward()
        results.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, expected in results[1].items():
        limit = max(1e-5, 2e-5 * float(expected.abs().max()))
        torch.testing.assert_close(results[0][key], expected, rtol=0, atol=limit, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_qwen_keeps_the_base_of_its_prompt() -> None:
    """A prompt of 30 (context 24) is decoded with its own base; the row of 50 has another, but shares the log."""
    model = load_decoder(FAMILIES / "qwen1_ntk_logn").eval()
    ids = document("qwen1_ntk_logn", 50, 1)
    expected, cache = model(ids[None])[0], model.new_cache(1, 50)
    frozen = [step(model, cache, [piece], [0])[0] for piece in ids.split([30, 1, 3, 16])]
    close(torch.cat(frozen[:-1]), model(ids[None, :34])[0])
    close(torch.cat(frozen)[:48], model(ids[None, :48])[0])
    assert not torch.allclose(torch.cat(frozen)[-1], expected[-1], atol=1e-2), "49 tokens take the next step"


@torch.no_grad()
def test_qwen_in_training() -> None:
    expected = np.load(FAMILIES / "qwen1_ntk_logn" / "expected.npz")
    model = load_decoder(FAMILIES / "qwen1_ntk_logn").train()
    found = model(torch.from_numpy(expected["input_ids"][:1]))[0]
    torch.testing.assert_close(found, torch.from_numpy(expected["logits_train_mode_row0"]), rtol=0, atol=2e-4)


@torch.no_grad()
def test_chatglm_sees_its_prompt_in_both_directions() -> None:
    """And refuses a document that never starts to answer, or answers nothing."""
    model = load_decoder(FAMILIES / "chatglm_6b", dtype=torch.float32).eval()
    ids = torch.tensor([7, 8, 9, GMASK, SOP, 11, 12])
    other = ids.clone()
    other[2] = 10
    assert not torch.allclose(model(ids[None])[0, 0], model(other[None])[0, 0])
    later = ids.clone()
    later[6] = 13
    assert torch.equal(model(ids[None])[0, :6], model(later[None])[0, :6])
    for broken, message in (([7, 8, GMASK, 9], "no start token (id 304)"), ([7, SOP, 9], "none of the mask tokens")):
        with pytest.raises(ModelError) as caught:
            model(torch.tensor([broken]))
        assert message in str(caught.value) and "[gMASK]<sop>" in caught.value.fix


@torch.no_grad()
def test_yuan_forgets_at_the_end_of_a_document() -> None:
    """Attention starts anew after <eod>; only the filter looks across, and rope knows distances only."""
    model = load_decoder(FAMILIES / "yuan2_2b", dtype=torch.float32).eval()
    ids = torch.tensor([5, 6, 7, EOD, 8, 9, 10, 11])
    found = model(ids[None])[0]
    assert not torch.allclose(found[4:], model(ids[None, 4:])[0], atol=1e-3)
    for block in model.blocks():
        assert isinstance(block.attention, FilteredAttention)
        block.attention.filter.second.weight.zero_()
    close(model(ids[None])[0, 4:], model(ids[None, 4:])[0])


@torch.no_grad()
def test_yuan_that_forgets_in_training_alone() -> None:
    """reset_attention_mask without reset_position_ids, as the authors' code reads them."""
    ids = document("yuan2_2b", 12, 1)[None]
    config, found = read_json(FAMILIES / "yuan2_2b" / "config.json"), {}
    keys = ("reset_attention_mask", "reset_position_ids")
    for switches in ((True, True), (True, False), (False, True), (False, False)):
        model = load_decoder(FAMILIES / "yuan2_2b", dtype=torch.float32)
        model.spec = families.build_spec({**config, **dict(zip(keys, switches, strict=True))})[1]
        found[switches] = model.eval()(ids), model.train()(ids)
    plain, reset = found[False, False][0], found[True, True][0]
    assert not torch.allclose(plain, reset, atol=1e-2)
    for switches, expected in {
        (True, True): (reset, reset),
        (True, False): (plain, reset),
        (False, True): (plain, plain),
        (False, False): (plain, plain),
    }.items():
        assert all(torch.equal(a, b) for a, b in zip(found[switches], expected, strict=True)), switches
