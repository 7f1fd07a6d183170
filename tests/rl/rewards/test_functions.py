"""Functions as rewards: how they are found and called, and what they may return."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.functions import FunctionReward, TrainerState
from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.values import RewardError
from oarsmith.rl.rewards.watch import Watch


def batch(count: int = 3, **row: object) -> list[Completion]:
    return [
        Completion(f"Q{n}", "x" * n, (7,) * n, row={"answer": n, **row}, truncated=n == 2, step=5) for n in range(count)
    ]


def values(call: object, of: list[Completion], **more: float | None) -> list[object]:
    return list(FunctionReward(call, "mine", **more).values(of, Watch()))  # type: ignore[arg-type]


def test_one_by_one() -> None:
    def reward(prompt, completion, answer, step, truncated, token_ids, default=4):
        assert prompt == f"Q{answer}" and step == 5 and truncated == (answer == 2) and token_ids == [7] * answer
        return None if answer == 1 else len(completion) + default

    assert values(reward, batch()) == [4.0, None, 6.0]


def test_lists_as_trl_has_them() -> None:
    def reward(prompts, completions, completion_ids, answer, trainer_state, **columns):
        assert trainer_state == TrainerState(5, 5) and columns == {"level": ["a"] * 3}
        assert [len(ids) for ids in completion_ids] == answer and prompts == ["Q0", "Q1", "Q2"]
        return [len(text) * 0.5 for text in completions]

    assert values(reward, batch(level="a")) == [0.0, 0.5, 1.0]


def test_the_rest_of_the_row() -> None:
    def reward(prompt, completion, **row):
        return row["answer"] + len(row)

    # A column that is called like the prompt does not hide it.
    assert values(reward, batch(prompt="other", level=1)) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("timeout", [5.0, None])
def test_async_ones_run_side_by_side(timeout: float | None) -> None:
    import asyncio

    async def reward(prompt, completion):
        await asyncio.sleep(0.2)
        return len(completion)

    began = time.monotonic()
    assert values(reward, batch(8), timeout=timeout) == [float(n) for n in range(8)]
    assert time.monotonic() - began < 1.2

    async def many(prompts, completions):
        return np.arange(len(prompts))

    assert values(many, batch()) == [0.0, 1.0, 2.0]


def test_without_a_limit_it_runs_on_this_thread() -> None:
    seen = []

    def reward(prompt, completion):
        seen.append(threading.current_thread())
        return True

    assert values(reward, batch(1), timeout=None) == [1.0] and seen == [threading.current_thread()]
    assert values(reward, batch(1)) == [1.0] and seen[1] is not seen[0]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        (np.float32("-inf"), "returned -inf"),
        (10**400, "returned inf"),
        ("1", "returned '1', a str"),
        ([1.0], "a list"),
        (1j, "a complex"),
    ],
)
def test_values_that_are_none(value: object, part: str) -> None:
    def reward(prompt, completion):
        return value if prompt == "Q1" else np.float64(0.5)

    first, second, third = values(reward, batch())
    assert first == third == 0.5 and isinstance(second, RewardError)
    assert part in second.what and "'mine'" in second.what and "answer 2 of 3 at step 5" in str(second)
    assert "'Q1'" in str(second)


def test_an_error_names_function_row_and_line() -> None:
    def reward(prompt, completion, answer):
        return 1 / answer

    first, second, _ = values(reward, batch())
    assert second == 1.0 and isinstance(first, RewardError)
    assert "ZeroDivisionError" in first.what and "test_functions.py:" in first.what and "answer 1 of 3" in str(first)
    for returned, part in (([1.0], "1 values for 3 answers"), (1.0, "returned a float"), ("abc", "returned a str")):

        def many(prompts, completions, returned=returned):
            return returned

        with pytest.raises(RewardError, match=part):
            values(many, batch())


def test_a_column_that_is_not_there() -> None:
    def reward(prompt, completion, solution):
        return 1.0

    for found in values(reward, batch()):
        assert isinstance(found, RewardError) and "asks for 'solution', and the row has answer" in found.what

    def many(prompts, completions, solution):
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match="asks for 'solution'"):
        values(many, batch())


def test_a_time_limit_names_the_function() -> None:
    def reward(prompt, completion):
        time.sleep(20)

    watch, seen = Watch(), []
    looking = threading.Timer(0.15, lambda: seen.append(watch.text()))
    looking.start()
    with pytest.raises(RewardError, match=r"reward function 'mine' on 3 answers took longer than 0\.4 s"):
        FunctionReward(reward, "mine", timeout=0.4).values(batch(), watch)
    assert seen[0].startswith("reward function 'mine' on 3 answers, for 0 s") and watch.text() == ""


def test_a_function_cannot_end_the_run() -> None:
    def reward(prompt, completion):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="wanted to end the run"):
        values(reward, batch())


def test_signatures_that_cannot_be() -> None:
    for call in (
        lambda text: 1.0,
        lambda prompt, completions: 1.0,
        lambda *words: 1.0,
    ):
        with pytest.raises(ConfigError, match=r"parameters|by place"):
            FunctionReward(call, "mine")


def test_by_file_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_rewards_test.py").write_text("BONUS = 2\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from beside_rewards_test import BONUS\n"
        "def reward(prompt, completion):\n    return BONUS + len(completion)\n"
        "class Kept:\n    @staticmethod\n    def inner(prompt, completion):\n        return 1\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Rewards.from_settings([f"{file}:reward", {"reward": f"{file}:Kept.inner", "weight": 0.5}]).score(batch())
    assert found.parts == {"reward": [2.0, 3.0, 4.0], "Kept.inner": [1.0] * 3} and found.total == [2.5, 3.5, 4.5]
    for name, part in (
        (f"{file}:rewards", "did you mean 'reward'"),
        (f"{file}:number", "'number' is a int, no function"),
        (f"{tmp_path}/none.py:reward", "no such file"),
        ("no_such_module_here:reward", "ModuleNotFoundError"),
    ):
        with pytest.raises(OarsmithError, match=part):
            Rewards.from_settings(name)
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ConfigError, match=r"broken\.py:2.*ZeroDivisionError"):
        Rewards.from_settings(f"{broken}:reward")
