"""Reward models as rewards: the scores that the engine gives, with the policy's template or another."""

from __future__ import annotations

from pathlib import Path

import pytest

import oarsmith
from oarsmith.engine import Engine
from oarsmith.errors import OarsmithError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.values import RewardError
from oarsmith.text import ChatTemplate, Tokenizer
from tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("few_threads")
ASKED = [{"role": "user", "content": "Say 3."}]
ANSWERS = ("Yes.", "No, never that.", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "judge"
    return write_tiny_model(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})


@pytest.fixture(scope="module")
def expected(model: Path) -> list[float]:
    engine = Engine(model, num_threads=1)
    return engine.score([[*ASKED, {"role": "assistant", "content": text}] for text in ANSWERS])


def batch(tokenizer: Tokenizer, **row: object) -> list[Completion]:
    prompt = str(tokenizer.apply_chat_template(ASKED, None, True))
    return [Completion(prompt, text, (1,), row=row) for text in ANSWERS]


def test_the_policy_s_template(model: Path, expected: list[float]) -> None:
    tokenizer = oarsmith.load_tokenizer(model)
    for policy in (tokenizer, None):
        scores = Rewards.from_settings(str(model), tokenizer=policy).score(batch(tokenizer))
        assert scores.parts == {"judge": pytest.approx(expected, abs=1e-5)}
    shaped = {"reward": str(model), "scale": 2.0, "shift": 1.0, "weight": 0.5, "name": "rm"}
    total = Rewards.from_settings(shaped).score(batch(tokenizer)).total
    assert total == pytest.approx([(score - 1.0) for score in expected], abs=1e-5)


def test_another_template(model: Path, expected: list[float]) -> None:
    """The conversation is rendered as the reward model was trained to read it."""
    other = oarsmith.load_tokenizer(model).with_chat_template(ChatTemplate.builtin("llama-3"))
    rewards = Rewards.from_settings(str(model), tokenizer=other)
    for row in ({"messages": ASKED}, {"prompt": "Say 3."}, {"src": ["Say 3."]}, {"prompt": ASKED}):
        assert rewards.score(batch(other, **row)).total == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RewardError, match="has another chat template than the policy, and the row has no conversation"):
        rewards.score(batch(other, text="a"))


def test_empty_and_long_answers(model: Path) -> None:
    tokenizer = oarsmith.load_tokenizer(model)
    prompt = batch(tokenizer)[0].prompt
    empty, long = (Completion(prompt, text, (), row={}) for text in ("", "word " * 500))
    (score,) = Rewards.from_settings(str(model)).score([empty]).total
    assert score is not None
    with pytest.raises(RewardError, match="more than the model's context of 256"):
        Rewards.from_settings(str(model)).score([empty, long])
    assert Rewards.from_settings({"reward": str(model), "too_long": -3.0}).score([long]).total == [-3.0]


def test_a_model_that_writes_is_none(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "llama")
    with pytest.raises(OarsmithError, match="gives no scores"):
        Rewards.from_settings(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OarsmithError):
        Rewards.from_settings(str(tmp_path / "empty"))
