"""Several rewards as one: weights, names, rules for errors, and that they run side by side."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion, Scorer
from oarsmith.rl.rewards.rewards import BUILT_IN, Rewards
from oarsmith.rl.rewards.values import RewardError

BATCH = [Completion("2+2?", text, (1, 2), row={"answer": "4"}) for text in ("It is 4.", "It is 5.", "")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "given.py"
    place.write_text(
        "import time\n"
        "def part(prompt, completion):\n    return None if not completion else 2.0\n"
        "def bad(prompt, completion):\n    return float('nan') if '5' in completion else 1.0\n"
        "def slow(prompts, completions):\n    time.sleep(1.0)\n    return [0.0] * len(prompts)\n"
        "def slower(prompts, completions):\n    time.sleep(1.0)\n    return [0.0] * len(prompts)\n"
    )
    return place


def test_a_weighted_sum(file: Path) -> None:
    rewards: Scorer = Rewards.from_settings(["maths", f"{file}:part"], weights=[2.0, 0.25])
    scores = rewards.score(BATCH)
    assert scores.parts == {"maths": [1.0, 0.0, 0.0], "part": [2.0, 2.0, None]}
    assert scores.total == [2.5, 0.5, 0.0]
    only = Rewards.from_settings({"reward": f"{file}:part", "name": "mine", "weight": -1.0}).score(BATCH)
    assert only.total == [-2.0, -2.0, None] and list(only.parts) == ["mine"]
    assert Rewards.from_settings("maths").score([]).total == []


def test_errors_by_rule(file: Path) -> None:
    with pytest.raises(RewardError, match=r"answer 2 of 3.*reward 'bad' returned nan"):
        Rewards.from_settings(f"{file}:bad").score(BATCH)
    lenient = Rewards.from_settings(["maths", {"reward": f"{file}:bad", "on_error": "none"}])
    scores = lenient.score(BATCH)
    assert scores.parts["bad"] == [1.0, None, 1.0] and scores.total == [2.0, 0.0, 1.0]
    assert lenient.failures == {"maths": 0, "bad": 1} and "returned nan" in lenient.last_failure["bad"]
    with pytest.raises(RewardError, match="reads the column 'solution', and the row has answer"):
        Rewards.from_settings({"reward": "maths", "column": "solution"}).score(BATCH)


def test_what_waits_runs_side_by_side(file: Path) -> None:
    rewards = Rewards.from_settings([f"{file}:slow", f"{file}:slower", "maths"])
    began = time.monotonic()
    assert list(rewards.score(BATCH).parts) == ["slow", "slower", "maths"]
    assert time.monotonic() - began < 1.9
    assert rewards.waiting_for() == ""


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ([], "there is no reward"),
        ("math", "did you mean 'maths'"),
        ("nothing", "there is no reward 'nothing'"),
        (["maths", "maths"], "two rewards have the name 'maths'"),
        ({"reward": "maths", "wrogn": 1.0}, "unknown option 'wrogn'"),
        ({"reward": "maths", "weight": "1"}, "option 'weight'"),
        ({"reward": "maths", "weight": float("nan")}, "option 'weight'"),
        ({"reward": "regex"}, "option 'pattern'"),
        ({"reward": "regex", "pattern": "("}, "no regular expression"),
        ({"reward": "maths", "on_error": "zero"}, "option 'on_error'"),
        ({"weight": 1.0}, "names no reward"),
        ("http://", "no address of a server"),
    ],
)
def test_settings_that_cannot_be(settings: object, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Rewards.from_settings(settings)  # type: ignore[arg-type]


def test_weights_are_as_many() -> None:
    with pytest.raises(ConfigError, match="2 weights for 1 rewards"):
        Rewards.from_settings("maths", weights=[1.0, 2.0])


def test_every_option_is_explained() -> None:
    for kind, _ in BUILT_IN.values():
        assert all(field.description and len(field.description) > 15 for field in kind.model_fields.values()), kind
