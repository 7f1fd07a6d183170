"""Generation against transformers, and the engine's own promises: batch, streaming, ends, errors."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import oarsmith
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError, DataError, ModelError, OarsmithError
from oarsmith.model_path import find_tokenizer
from oarsmith.text import ChatTemplate

FAMILIES = ("llama", "gemma", "mistral", "gpt2")
PROMPTS = [[5, 17, 88, 3], [9], list(range(20, 33)), [150, 2, 2, 7, 61, 61], [44, 45]]


def engine_of(path, batch_size=8):
    return Engine(oarsmith.load_model(path, dtype="fp32", device="cpu"), batch_size=batch_size)


def transformers_answer(path, prompt, num_tokens, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=num_tokens,
            **options,
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_are_those_of_transformers(tiny_model, family, penalty):
    path = tiny_model(family)
    sampling = Sampling(max_new_tokens=24, repetition_penalty=penalty)
    answers = engine_of(path).generate(PROMPTS[:3], sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        assert list(answer.ids) == transformers_answer(path, prompt, 24, repetition_penalty=penalty)
        assert answer.finish_reason == "length"
        assert answer.prompt_ids == tuple(prompt)
        assert (answer.num_prompt_tokens, answer.num_tokens, answer.text) == (len(prompt), 24, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_a_cache_are_those_without(tiny_model, family):
    model = oarsmith.load_model(tiny_model(family), dtype="fp32")
    ids_T = torch.tensor([3, 60, 7, 7, 120, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79])
    with torch.inference_mode():
        expected = model(ids_T[None])[0]
        for steps in ([20], [1] * 20, [5, 1, 1, 9, 1, 3]):
            cache, start, logits = model.new_cache(1, 20), 0, []
            for count in steps:
                layout = cache.extend([count])
                logits.append(model.logits(model.hidden(ids_T[start : start + count], layout, cache)))
                start += count
            # the same sums in another order, float32
            torch.testing.assert_close(torch.cat(logits), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, temperature=0.9, seed=11),
        Sampling(max_new_tokens=20, temperature=1.2, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=11),
    ],
    ids=["greedy", "sampled", "all"],
)
def test_an_answer_does_not_depend_on_the_batch(tiny_model, sampling):
    path = tiny_model("llama")
    # One after another; in pairs, where each that ends gives its place to the next; and all together.
    results = [engine_of(path, batch_size=size).generate(PROMPTS, sampling) for size in (1, 2, 8)]
    assert results[0] == results[1] == results[2]
    assert len({answer.ids for answer in results[0]}) == len(PROMPTS)


def test_each_prompt_may_have_a_sampling_of_its_own(tiny_model):
    engine = engine_of(tiny_model("llama"))
    samplings = [Sampling(max_new_tokens=n, temperature=1.0, seed=4) for n in (3, 9, 5)]
    found = engine.generate(PROMPTS[:3], samplings)
    whole = engine.generate(PROMPTS[:3], samplings[1])
    assert [answer.ids for answer in found] == [answer.ids[:n] for answer, n in zip(whole, (3, 9, 5), strict=True)]
    with pytest.raises(ConfigError, match="2 samplings for 3 prompts"):
        engine.generate(PROMPTS[:3], samplings[:2])


def test_places_are_taken_over_by_waiting_prompts(tiny_model):
    # Different lengths of the answers: 60 tokens of context, less the prompt.
    engine = engine_of(tiny_model("llama"), batch_size=2)
    prompts = [list(range(1, size)) for size in (60, 5, 62, 58, 64, 3)]
    sampling = Sampling(max_new_tokens=10)
    alone = [engine.generate(prompt, sampling)[0] for prompt in prompts]
    assert engine.generate(prompts, sampling) == alone
    assert [answer.num_tokens for answer in alone] == [5, 10, 3, 7, 1, 10]


def test_a_seed_repeats_and_no_seed_does_not(tiny_model):
    engine = engine_of(tiny_model("llama"))
    once, again = (engine.generate([[5]] * 2, Sampling(temperature=1.0, seed=7)) for _ in range(2))
    assert once == again
    assert once[0].ids != once[1].ids
    assert once != engine.generate([[5]] * 2, Sampling(temperature=1.0, seed=8))
    free, other = (engine.generate([5], Sampling(temperature=1.0)) for _ in range(2))
    assert free != other


def test_prompts_may_be_text_ids_or_a_conversation(chain_model):
    engine = Engine(chain_model("one two"))
    messages = [{"role": "user", "content": "count"}]
    ids = engine.tokenizer.encode_chat(messages, None, True)
    answers = engine.generate(["count\n", ids, messages])
    assert [answer.text for answer in answers] == ["one two"] * 3
    assert answers[1] == answers[2] == engine.chat(messages)
    assert engine.generate("count\n") == answers[:1]
    assert engine.generate([]) == []


def test_the_end_of_turn_ends_an_answer_and_is_not_shown(chain_model):
    engine = Engine(chain_model("one two"))
    end = engine.tokenizer.stop_ids[0]
    (answer,) = engine.generate("\n")
    assert (answer.text, answer.finish_reason, answer.ids[-1]) == ("one two", "stop", end)
    (longer,) = engine.generate("\n", Sampling(ignore_eos=True, max_new_tokens=10))
    assert (longer.finish_reason, longer.num_tokens) == ("length", 10)
    two = engine.tokenizer.encode("one two")[2]
    (shorter,) = engine.generate("\n", Sampling(stop_ids=(two,)))
    assert (shorter.finish_reason, shorter.ids[-1]) == ("stop", two)
    assert "one two".startswith(shorter.text)


@pytest.mark.parametrize("stop", ["STOP", " thre", "two", ("zzz", "e S")])
def test_stop_texts_are_found_across_token_borders(chain_model, stop):
    text = "one two three STOP four"
    engine = Engine(chain_model(text))
    sampling = Sampling(stop=stop)
    stops = (stop,) if isinstance(stop, str) else stop
    expected = text[: min(at for part in stops if (at := text.find(part)) >= 0)]
    (answer,) = engine.generate("\n", sampling)
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    assert len(answer.ids) < len(engine.tokenizer.encode(text))
    assert "".join(engine.stream("\n", sampling)) == expected


@pytest.mark.parametrize("text", ["The quick brow", "dog 🦊né", "héllo!"])
def test_pieces_of_a_stream_are_whole_and_join_to_the_answer(chain_model, text):
    engine = Engine(chain_model(text))
    stream = engine.stream("\n")
    pieces = list(stream)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [stream.completion] == engine.generate("\n")


def test_a_sampled_stream_is_the_generated_answer(tiny_model, chain_model):
    tokenizer = oarsmith.load_tokenizer(chain_model("one"))
    engine = Engine(oarsmith.load_model(tiny_model("llama"), dtype="fp32"), tokenizer)
    sampling = Sampling(temperature=1.5, seed=3, max_new_tokens=40, stop=("nothing like it",))
    stream = engine.stream([1, 2, 3], sampling)
    text = "".join(stream)
    assert engine.generate([1, 2, 3], sampling) == [stream.completion]
    assert stream.completion.text == text == tokenizer.decode(stream.completion.ids, skip_special_tokens=True)


def test_the_context_ends_an_answer(tiny_model):
    engine = engine_of(tiny_model("gpt2"))
    assert engine.context_length == 64
    (answer,) = engine.generate(list(range(50)), Sampling(max_new_tokens=1000))
    assert (answer.num_tokens, answer.finish_reason) == (14, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (list(range(64)), "the prompt has 64 tokens; the model's context of 64 leaves no room"),
        ([1, 199], "token id 199 is outside the model's vocabulary of 199"),
        ([-1], "token id -1 is outside"),
    ],
)
def test_prompts_that_cannot_be_answered(tiny_model, prompt, message):
    with pytest.raises(DataError, match="prompt 1: ") as caught:
        engine_of(tiny_model("llama")).generate([[1], prompt])
    assert message in caught.value.what


def test_text_needs_a_tokenizer(tiny_model):
    engine = engine_of(tiny_model("llama"))
    for call in (lambda: engine.generate("hello"), lambda: engine.stream([1]), lambda: engine.chat([{"role": "user"}])):
        with pytest.raises(ConfigError, match="no tokenizer"):
            call()


def test_what_an_engine_is_made_of(tiny_model):
    path = tiny_model("llama")
    model = oarsmith.load_model(path)
    with pytest.raises(ConfigError, match="belong to a path"):
        Engine(model, dtype="fp32")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        Engine(model, batch_size=0)
    with pytest.raises(ModelError, match="training mode"):
        Engine(model.train())
    with pytest.raises(OarsmithError, match="missing"):
        Engine(path / "missing")


def test_an_adapter_brings_its_own_tokenizer(chain_model, tmp_path):
    base = chain_model("one two")
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert find_tokenizer(tmp_path / "adapter").chat_template == oarsmith.load_tokenizer(base).chat_template
    template = ChatTemplate.builtin("gemma")
    oarsmith.load_tokenizer(base).with_chat_template(template).save(tmp_path / "adapter")
    for found in (find_tokenizer(tmp_path / "adapter"), find_tokenizer(base, tmp_path / "adapter")):
        assert found.chat_template.sources() == template.sources()


def test_what_the_cpu_would_emulate_is_computed_in_fp32(chain_model, tmp_path):
    path = chain_model("one two")
    oarsmith.save_model(oarsmith.load_model(path, dtype="fp16"), tmp_path / "half", oarsmith.load_tokenizer(path))
    assert oarsmith.load_model(tmp_path / "half").embedding.weight.dtype == torch.float16
    engine = Engine(tmp_path / "half", device="cpu")
    assert engine.model.embedding.weight.dtype == torch.float32
    assert engine.generate("\n")[0].text == "one two"


def test_weights_that_are_no_numbers_stop_the_answer(tiny_model):
    model = oarsmith.load_model(tiny_model("llama"))
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        Engine(model).generate([1, 2])


def test_special_tokens_are_in_the_text_where_asked_for(chain_model):
    folder = chain_model("one")
    tokenizer = oarsmith.load_tokenizer(folder)
    special = next(
        token
        for index in sorted(tokenizer.special_ids - set(tokenizer.stop_ids))
        if (token := tokenizer.id_to_token(index)) is not None
    )
    engine = Engine(chain_model(f"on{special}e two"))
    for shown, text in ((False, "one two"), (True, f"on{special}e two")):
        sampling = Sampling(skip_special_tokens=not shown)
        (answer,) = engine.generate("\n", sampling)
        assert answer.text == text == "".join(engine.stream("\n", sampling))
        (answer,) = engine.generate("\n", Sampling(skip_special_tokens=not shown, stop=("two",)))
        assert answer.text == text[:-3]
