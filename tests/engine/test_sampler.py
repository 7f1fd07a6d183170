"""What is done to logits before the filters against transformers, and what a row's choice says."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from oarsmith.engine import Sampling
from oarsmith.engine.choice import Choice
from oarsmith.engine.draws import Draws
from oarsmith.engine.sampler import choose, edited, prompt_logprobs
from oarsmith.engine.state import SamplingState
from oarsmith.errors import ConfigError, ModelError, OarsmithError

SIZE = 40
PROMPT, ANSWER = [3, 3, 9, 30], [7, 9, 7, 12, 7, 5]


class Only:
    """A constraint to fixed tokens."""

    def __init__(self, *tokens, size=SIZE):
        self.mask = bytearray(size)
        for token in tokens:
            self.mask[token] = 200
        self.taken = []

    def allowed(self):
        return self.mask

    def accept(self, token):
        self.taken.append(token)


def state_of(sampling, answer=(), prompt=(), size=SIZE, seed=0, **kwargs):
    state = SamplingState(sampling, prompt, Draws(str(seed)), vocab_size=size, **kwargs)
    for token in answer:
        state.accept(token)
    return state


def random_logits(rows=1, size=SIZE, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_the_repetition_penalty_is_that_of_transformers():
    logits_1V = random_logits()
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + ANSWER]), logits_1V.clone())
    state = state_of(Sampling(repetition_penalty=1.7), ANSWER, PROMPT)
    assert torch.equal(edited(logits_1V, [state]), expected)


def test_presence_and_frequency_count_the_answer_alone():
    logits_1V = random_logits()
    counts_V = torch.bincount(torch.tensor(ANSWER), minlength=SIZE)
    expected = logits_1V - 0.7 * counts_V - 1.3 * (counts_V > 0)
    sampling = Sampling(frequency_penalty=0.7, presence_penalty=1.3)
    torch.testing.assert_close(edited(logits_1V, [state_of(sampling, ANSWER, PROMPT)]), expected)
    both = Sampling(frequency_penalty=0.7, presence_penalty=1.3, repetition_penalty=1.7)
    penalized = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + ANSWER]), logits_1V.clone())
    expected = penalized - 0.7 * counts_V - 1.3 * (counts_V > 0)
    torch.testing.assert_close(edited(logits_1V, [state_of(both, ANSWER, PROMPT)]), expected)


def test_occurrences_have_room_for_long_answers():
    answer = [index % 300 for index in range(1000)]
    logits_1V = random_logits(size=300)
    state = state_of(Sampling(frequency_penalty=0.01), answer, size=300)
    expected = logits_1V - 0.01 * torch.bincount(torch.tensor(answer), minlength=300)
    torch.testing.assert_close(edited(logits_1V, [state]), expected)


@pytest.mark.parametrize("length", range(len(ANSWER) + 1))
def test_bad_words_are_kept_out_as_by_transformers(length):
    words = [[4], [7, 9], [7, 12, 7], [9, 7, 12, 7], [12, 30], [7, 9, 7, 12, 7, 5, 1]]
    logits_1V, answer = random_logits(), ANSWER[:length]
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([answer], dtype=torch.int64), logits_1V.clone())
    assert torch.equal(edited(logits_1V, [state_of(Sampling(), answer, bad_words=words)]), expected)


def test_a_bad_word_that_begins_in_the_prompt_is_none():
    logits_1V = random_logits()
    assert torch.equal(edited(logits_1V, [state_of(Sampling(), (), [7], bad_words=[[7, 9]])]), logits_1V)


@pytest.mark.parametrize("length", [0, 2, 3, 6])
def test_no_stop_token_before_the_least_length(length):
    logits_1V, ids = random_logits(), torch.tensor([PROMPT + ANSWER[:length]])
    expected = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [1, 2])(ids, logits_1V.clone())
    state = state_of(Sampling(min_new_tokens=3), ANSWER[:length], PROMPT, stop_ids={1, 2, SIZE + 7})
    assert torch.equal(edited(logits_1V, [state]), expected)


def test_the_bias_is_added_as_by_transformers_and_before_the_penalty():
    logits_1V, bias = random_logits(), {3: 5.0, 8: -100.0, 7: 0.25}
    ids = torch.tensor([PROMPT + ANSWER])
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[index], value] for index, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.3),
        ]
    )
    state = state_of(Sampling(logit_bias=bias, repetition_penalty=1.3), ANSWER, PROMPT)
    torch.testing.assert_close(edited(logits_1V, [state]), processors(ids, logits_1V.clone()))


def test_the_given_logits_stay_as_they_are():
    logits_1V = random_logits()
    before = logits_1V.clone()
    choose(logits_1V, [state_of(Sampling(logit_bias={3: 5.0}), grammar=Only(3, 4))])
    assert torch.equal(logits_1V, before)


def test_the_constraint_comes_before_everything_and_learns_what_was_taken():
    grammar = Only(3, 4)
    state = state_of(Sampling(logit_bias={9: 100.0}, repetition_penalty=3.0), prompt=[3], grammar=grammar)
    logits_1V = torch.zeros(1, SIZE)
    logits_1V[0, 3] = 1.0
    logits_1V[0, 4] = 0.5
    (choice,) = choose(logits_1V, [state])
    assert choice.token == 4
    state.accept(4)
    assert grammar.taken == [4]


def test_what_would_leave_no_token_is_not_applied():
    (choice,) = choose(random_logits(), [state_of(Sampling(min_new_tokens=9), stop_ids={2}, grammar=Only(2))])
    assert choice.token == 2
    everything = [[index] for index in range(SIZE)]
    logits_1V = random_logits()
    (choice,) = choose(logits_1V, [state_of(Sampling(), bad_words=everything)])
    assert choice.token == int(logits_1V.argmax())
    (choice,) = choose(logits_1V, [state_of(Sampling(), bad_words=everything, grammar=Only(5, 6))])
    assert choice.token in (5, 6)


def test_a_constraint_that_fails_is_noted_and_the_other_rows_go_on():
    class Broken(Only):
        def allowed(self):
            raise OarsmithError("too complex")

    failing, fine = state_of(Sampling(), grammar=Broken(3)), state_of(Sampling(), grammar=Only(3))
    choices = choose(random_logits(2), [failing, fine])
    assert choices[1].token == 3 and fine.failure is None
    assert failing.failure is not None and failing.failure.what == "too complex"
    with pytest.raises(OarsmithError, match="too complex"):
        failing.accept(choices[0].token)


MIXED = [
    Sampling(),
    Sampling(logprobs=3),
    Sampling(temperature=0.8, seed=1),
    Sampling(temperature=0.8, top_p=0.9, logprobs=0),
    Sampling(temperature=1.5, top_k=5, repetition_penalty=1.3),
    Sampling(temperature=1.0, min_p=0.1, frequency_penalty=0.5, presence_penalty=-0.5),
    Sampling(temperature=1.0, typical_p=0.5, logit_bias={3: 2.0}),
    Sampling(temperature=1.0, min_new_tokens=100, n=1, best_of=3),
    Sampling(temperature=0.5, top_k=600),
]


def test_a_row_does_not_depend_on_its_neighbours():
    """Every kind of setting in one batch; alone each row chooses the same, draw after draw."""

    def states():
        made = []
        for row, sampling in enumerate(MIXED):
            words, grammar = ([[4], [7, 9]], Only(*range(20), size=700)) if row % 2 else ([], None)
            made.append(state_of(sampling, (), PROMPT, 700, row, bad_words=words, grammar=grammar, stop_ids={1}))
        return made

    together, alone = states(), states()
    for step in range(6):
        logits_NV = random_logits(len(MIXED), 700, seed=step)
        choices = choose(logits_NV, together)
        single = [choose(logits_NV[row : row + 1], [state])[0] for row, state in enumerate(alone)]
        assert [choice.token for choice in choices] == [choice.token for choice in single]
        for choice, other in zip(choices, single, strict=True):
            assert (choice.logprob is None) == (other.logprob is None)
            assert [token for token, _ in choice.top] == [token for token, _ in other.top]
            assert choice.logprob == pytest.approx(other.logprob, abs=1e-5)
        for state, other, choice in zip(together, alone, choices, strict=True):
            state.accept(choice.token)
            other.accept(choice.token)


def test_logprobs_are_of_the_model_s_own_distribution():
    sampling = Sampling(temperature=2.0, top_k=1, logit_bias={5: 100.0}, logprobs=4)
    logits_1V = random_logits()
    (choice,) = choose(logits_1V, [state_of(sampling)])
    logprobs_V = logits_1V[0].double().log_softmax(-1)
    assert choice.token == 5
    assert choice.logprob == pytest.approx(float(logprobs_V[5]), abs=1e-5)
    best = logprobs_V.topk(4)
    assert [token for token, _ in choice.top] == best.indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_nobody_gets_logprobs_who_did_not_ask():
    choices = choose(random_logits(3), [state_of(one) for one in (Sampling(), Sampling(logprobs=0), Sampling())])
    assert [choice.logprob is None for choice in choices] == [True, False, True]
    assert all(choice.top == () for choice in choices)
    # best_of has to compare answers
    (choice,) = choose(random_logits(), [state_of(Sampling(temperature=1.0, best_of=2))])
    assert choice.logprob is not None


def test_prompt_logprobs():
    logits_TV, targets_T = random_logits(3), torch.tensor([4, 0, 39])
    found = prompt_logprobs(logits_TV.bfloat16(), targets_T, 2)
    logprobs_TV = logits_TV.bfloat16().double().log_softmax(-1)
    for row, choice in enumerate(found):
        assert choice.token == int(targets_T[row])
        assert choice.logprob == pytest.approx(float(logprobs_TV[row, choice.token]), abs=1e-5)
        assert [value for _, value in choice.top] == pytest.approx(logprobs_TV[row].topk(2).values.tolist(), abs=1e-5)
    assert prompt_logprobs(logits_TV, targets_T, 0)[0].top == ()
    assert len(prompt_logprobs(logits_TV, targets_T, 1000)[0].top) == SIZE


def test_greedy_takes_the_likeliest_and_no_random_number():
    logits_NV = random_logits(3)
    draws = Draws("3")
    states = [SamplingState(Sampling(top_k=2, top_p=0.1), [], draws, vocab_size=SIZE) for _ in range(3)]
    assert choose(logits_NV, states) == [Choice(token) for token in logits_NV.argmax(-1).tolist()]
    assert draws.count == 0


def test_logits_that_are_not_numbers_are_refused():
    for value in (torch.nan, torch.inf):
        logits_1V = random_logits()
        logits_1V[0, 3] = value
        with pytest.raises(ModelError, match="not finite"):
            choose(logits_1V, [state_of(Sampling())])


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ConfigError, match="logit_bias has token 40; the vocabulary has 40"):
        state_of(Sampling(logit_bias={SIZE: 1.0}))
    with pytest.raises(ConfigError, match="bad_words has token 99"):
        state_of(Sampling(), bad_words=[[3, 99]])
