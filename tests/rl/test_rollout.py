"""Rollouts: what was drawn is what is learned from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import oarsmith
from oarsmith.data.policy_batch import make_policy_batch
from oarsmith.engine import Sampling
from oarsmith.losses.policy.scoring import score_policy
from oarsmith.models.decoder import Decoder
from oarsmith.rl.policy import Policy
from oarsmith.rl.prompts import Asked, PromptOrder
from oarsmith.rl.referee import Referee
from oarsmith.rl.rollout import Sampler
from oarsmith.rl.study import answers_of
from oarsmith.text import Tokenizer
from tiny import TOKENIZER, tiny_decoder

TOK: Tokenizer = oarsmith.load_tokenizer(TOKENIZER)
PROMPTS = [
    Asked(ids=tuple(TOK.encode(text)), text=text, row={}, where=f"made:{n}")
    for n, text in enumerate(["One plus one is", "Where do birds go in winter, and why?", "a"])
]


def sampler_of(model: Decoder, compute: str = "auto", **keys: object) -> Sampler:
    policy = Policy(model, TOK, compute=compute, rows=12, max_length=64)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=9, temperature=1.0)
    return Sampler(policy=policy, sampling=sampling, max_length=64, **keys)  # type: ignore[arg-type]


def largest_mismatch(model: Decoder, sampler: Sampler) -> float:
    groups = sampler.sample(PROMPTS, 4, seed=1)
    answers = answers_of(PROMPTS, groups)
    batch = make_policy_batch(answers, count=1.0, facts={})
    with torch.no_grad():
        found = score_policy(model, batch).logprobs_N
    return float((found - batch.sampled_N).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("compute", ["native", "torch"])
def test_sampler_and_trainer_agree(family: str, compute: str) -> None:
    """In fp32, also after an update of the weights."""
    model = tiny_decoder(family)
    sampler = sampler_of(model, compute)
    assert largest_mismatch(model, sampler) < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    sampler.policy.refresh()
    assert largest_mismatch(model, sampler) < 1e-4


def test_without_refresh_the_compiled_step_keeps_its_weights() -> None:
    model = tiny_decoder()
    sampler = sampler_of(model, "native")
    before = sampler.sample(PROMPTS, 2, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert [w.ids for g in sampler.sample(PROMPTS, 2, seed=3) for w in g] == [w.ids for g in before for w in g]
    assert largest_mismatch(model, sampler) > 1e-2


@pytest.mark.parametrize("compute", ["native", "torch"])
def test_a_rollout_made_ahead_leaves_the_mode_of_the_decoder_alone(compute: str) -> None:
    """It is drawn in a thread while the decoder trains."""
    model = tiny_decoder().train()
    policy = Policy(model, TOK, compute=compute, rows=12, max_length=64, ahead=True)  # type: ignore[arg-type]
    with policy.answering():
        assert model.training
    sampler = Sampler(policy=policy, sampling=Sampling(max_new_tokens=3, temperature=1.0), max_length=64)
    assert len(sampler.sample(PROMPTS, 2, seed=1)) == 3 and model.training


def test_an_adapter_is_served_by_the_decoder_itself() -> None:
    model = tiny_decoder(lora_rank=4).train()
    sampler = sampler_of(model)
    assert "adapter" in sampler.policy.how and model.training
    assert largest_mismatch(model.eval(), sampler) < 1e-4


def test_the_same_seed_draws_the_same_answers() -> None:
    sampler = sampler_of(tiny_decoder())
    first, again, other = (sampler.sample(PROMPTS, 4, seed=seed) for seed in (7, 7, 8))
    ids = [[written.ids for group in groups for written in group] for groups in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_greedy_answers_are_the_likeliest() -> None:
    model = tiny_decoder()
    ((written,), *_) = sampler_of(model).sample(PROMPTS, 4, seed=1, greedy=True)
    logits = model(torch.tensor([[*PROMPTS[0].ids, *written.ids]]))[0]
    start = len(PROMPTS[0].ids) - 1
    assert logits[start : start + len(written.ids)].argmax(-1).tolist() == written.ids


def test_limits_are_told() -> None:
    groups = sampler_of(tiny_decoder()).sample(PROMPTS, 4, seed=1)
    for written in (written for group in groups for written in group):
        assert written.truncated == (written.ids[-1] not in TOK.stop_ids)
        assert len(written.ids) <= 9 and all(written.own) and len(written.logprobs) == len(written.ids)


class Echo:
    """Says three tokens after each turn, twice, and gives a reward for each."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.cut = False

    def continue_with(self, written: Sequence[int], *, truncated: bool) -> Sequence[int] | None:
        self.heard.append(list(written))
        self.cut = truncated
        return [5, 6, 7] if len(self.heard) < 3 and not truncated else None

    @property
    def reward(self) -> float | None:
        return 0.5 * len(self.heard)


class Echoes:
    def __init__(self) -> None:
        self.made: list[Echo] = []

    def begin(self, asked: Asked) -> Echo:
        self.made.append(Echo())
        return self.made[-1]


def test_what_an_environment_says_is_not_the_models() -> None:
    model, others = tiny_decoder(), Echoes()
    stops = Sampling(max_new_tokens=4, temperature=1.0, stop_ids=tuple(range(0, 1120, 2)))
    sampler = Sampler(policy=sampler_of(model).policy, sampling=stops, max_length=64, conversations=others)
    groups = sampler.sample(PROMPTS, 2, seed=2)
    many = [written for group in groups for written in group if written.num_turns == 3 and not written.truncated]
    assert many and len(others.made) == 6
    for written in many:
        said = [token for token, own in zip(written.ids, written.own, strict=True) if not own]
        assert said == [5, 6, 7] * 2 and written.reward == 1.5
        assert all(logprob == 0 for logprob, own in zip(written.logprobs, written.own, strict=True) if not own)
    answers = answers_of(PROMPTS, groups)
    batch = make_policy_batch(answers, count=1.0, facts={})
    assert batch.sizes == tuple(written.num_own for group in groups for written in group)
    with torch.no_grad():
        found = score_policy(model, batch).logprobs_N
    assert float((found - batch.sampled_N).abs().max()) < 1e-4


def test_the_room_of_one_answer_does_not_cut_another() -> None:
    """The second prompt has little room, the third has much; nothing but a limit ends a turn after the first."""
    none = Sampling(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    policy = sampler_of(tiny_decoder()).policy
    long = Asked(ids=PROMPTS[2].ids * 40, text="a" * 40, row={}, where="made:4")

    class Speaks(Echo):
        """Goes on once although the limit ended the turn, as one whose own end was drawn."""

        def continue_with(self, written: Sequence[int], *, truncated: bool) -> Sequence[int] | None:
            self.heard.append(list(written))
            return [5, 6, 7] if len(self.heard) == 1 else None

    class All:
        def begin(self, asked: Asked) -> Speaks:
            return Speaks()

    sampler = Sampler(policy=policy, sampling=none, max_length=60, conversations=All())
    (cramped,), (free,) = sampler.sample([long, PROMPTS[2]], 1, seed=3)
    assert len(cramped.ids) == 60 - len(long.ids)
    assert len(free.ids) == 12 + 3 + 12


def test_turns_end_where_the_room_does() -> None:
    stops = Sampling(max_new_tokens=4, temperature=1.0, stop_ids=tuple(range(1120)))
    sampler = sampler_of(tiny_decoder())
    tight = Sampler(policy=sampler.policy, sampling=stops, max_length=8, conversations=Echoes())
    groups = tight.sample(PROMPTS[2:], 1, seed=2)
    assert groups[0][0].truncated and len(groups[0][0].ids) + 1 <= 8


def test_passes_do_not_change_log_probabilities() -> None:
    model = tiny_decoder()
    answers = answers_of(PROMPTS, sampler_of(model).sample(PROMPTS, 4, seed=1))
    found = [
        np.concatenate(
            Referee(model=model, reference=None, temperature=0.7, capacity=capacity, share=share).policy(answers)
        )
        for capacity, share in ((10_000, True), (20, True), (10_000, False))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_entropies_and_temperature_beside_plain_softmax() -> None:
    model = tiny_decoder()
    answers = answers_of(PROMPTS, sampler_of(model).sample(PROMPTS, 2, seed=1))
    batch = make_policy_batch(answers, count=1.0, facts={})
    with torch.no_grad():
        found = score_policy(model, batch, temperature=0.5, entropies=True)
        plain = score_policy(model, batch, temperature=0.5)
        first = answers[0]
        logits = model(torch.tensor([[*first.prompt.tolist(), *first.ids.tolist()]]))[0].float() / 0.5
    logprobs = logits[len(first.prompt) - 1 : -1].log_softmax(-1)
    expected = -(logprobs.exp() * logprobs).sum(-1)
    assert found.entropies_N is not None
    torch.testing.assert_close(found.entropies_N[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logprobs_N, plain.logprobs_N, rtol=1e-4, atol=1e-5)


def test_every_pass_over_the_prompts_asks_each_once() -> None:
    order = PromptOrder(PROMPTS, seed=1)
    asked = [prompt.where for prompt in order.take(0, 9)]
    assert all(sorted(asked[at : at + 3]) == ["made:0", "made:1", "made:2"] for at in (0, 3, 6))
    assert [prompt.where for prompt in order.take(4, 3)] == asked[4:7]
