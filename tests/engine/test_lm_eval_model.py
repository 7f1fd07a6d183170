"""The model class for lm-evaluation-harness against the harness' own class for transformers, on the same files."""

import subprocess
import sys

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

import oarsmith
from harness_tasks import write_task
from oarsmith.engine.lm_eval_model import OarsmithLM, sampling_of
from oarsmith.errors import ConfigError
from tiny import environment, write_tiny_model

CONTEXT = "Question: what is one plus one?\nAnswer:"
PAIRS = [
    (CONTEXT, " two"),
    (CONTEXT, " three of them"),
    (CONTEXT + " ", "two"),
    ("", "An answer without a context."),
    ("word " * 300, "the context is cut on the left"),
]


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("lm_eval") / "model")


@pytest.fixture(scope="module")
def both(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return OarsmithLM(str(path), dtype="fp32"), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=n) for n, pair in enumerate(arguments)]


def test_it_is_registered(path):
    assert get_model("oarsmith") is OarsmithLM
    made = OarsmithLM.create_from_arg_string(f"path={path}", {"batch_size": "auto", "device": "cpu"})
    assert made.max_length == 256


def test_loglikelihood(both):
    ours, theirs = both
    asked = requests("loglikelihood", PAIRS)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, theirs))
    for ((mine, my_greedy), (his, his_greedy)), pair in zip(zip(found, expected, strict=True), PAIRS, strict=True):
        # fp32 on both sides, sums over a few tokens.
        assert mine == pytest.approx(his, rel=1e-5), pair
        assert my_greedy == his_greedy
    assert len({round(value, 3) for value, _ in found}) == len(PAIRS) - 1, "a space in front belongs to the answer"


def test_the_likeliest_continuation_is_greedy(both):
    ours, theirs = both
    context = ours.tok_encode(CONTEXT)
    (completion,) = ours._engine.generate([context], sampling_of({"max_gen_toks": 3}))
    best = list(completion.ids)
    other = [*best[:-1], (best[-1] + 1) % 1000]
    asked = [(None, context, best), (None, context, other)]
    for lm in (ours, theirs):
        assert [greedy for _, greedy in lm._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False]


@pytest.mark.parametrize("text", ["A short text.", "A long one. " * 80])
def test_rolling(both, text):
    ours, theirs = both
    asked = requests("loglikelihood_rolling", [(text,), ("Another.",)])
    found, expected = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generate_until(both):
    ours, theirs = both
    asks = [
        (CONTEXT, {"until": ["\n"], "max_gen_toks": 12}),
        ("One two three", {"until": ["\n"], "max_gen_toks": 12}),
        (CONTEXT, {"until": "e", "max_gen_toks": 8, "do_sample": False}),
        ("word " * 300, {"max_gen_toks": 5}),
    ]
    asked = requests("generate_until", asks)
    found, expected = (lm.generate_until(asked, disable_tqdm=True) for lm in (ours, theirs))
    # The harness' class decodes special tokens away, ours too; what differs is white space in front of an answer.
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_chat_template(both):
    ours, theirs = both
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert ours.apply_chat_template(messages[:1]) == theirs.apply_chat_template(messages[:1])
    begun = ours.apply_chat_template(messages, add_generation_prompt=False)
    assert begun == theirs.apply_chat_template(messages, add_generation_prompt=False)
    assert begun.endswith("assistant\nHel")
    assert "im_start" in ours.chat_template(True)
    assert ours.chat_template(False) == ""


def test_sampling():
    assert sampling_of({}).temperature == 0
    assert sampling_of({"temperature": 0.5}).temperature == 0.5
    assert sampling_of({"temperature": 0.5, "do_sample": False}).temperature == 0
    assert sampling_of({"do_sample": True}).temperature == 1
    found = sampling_of({"until": ["a", ""], "max_new_tokens": 7, "top_k": 3, "top_p": 0.5})
    assert (found.max_new_tokens, tuple(found.stop), found.top_k, found.top_p) == (7, ("a",), 3, 0.5)


def test_mistakes(path):
    with pytest.raises(ConfigError, match="a path or an engine"):
        OarsmithLM()
    model = oarsmith.Engine(oarsmith.load_model(path))
    with pytest.raises(ConfigError, match="no tokenizer"):
        OarsmithLM(engine=model)
    with pytest.raises(ConfigError, match="no room for a question"):
        OarsmithLM(str(path)).generate_until(requests("generate_until", [("a", {"max_gen_toks": 256})]))


@pytest.mark.slow  # the harness takes 20 s to look through its own thousands of tasks
def test_the_harness_command_line_knows_it(path, tmp_path):
    write_task(tmp_path)
    words = [sys.executable, "-m", "oarsmith.engine.lm_eval_model", "--model", "oarsmith", "--tasks", "tiny_choice"]
    words += ["--model_args", f"path={path},dtype=fp32", "--include_path", str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny_choice|" in done.stdout
