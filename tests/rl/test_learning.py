"""Advantages of tokens from rewards, by the rules of algorithms."""

import numpy as np

from oarsmith.rl.advantages import Groups
from oarsmith.rl.learning import Outcomes, Teacher

NAN = float("nan")


def learned(teacher: Teacher, rewards: list[float], baselines: tuple[float, ...] = ()) -> list[float]:
    """Of answers of one token, two to each prompt."""
    groups = Groups(np.array(rewards), (2,) * (len(rewards) // 2))
    outcomes = Outcomes(groups=groups, sizes=(1,) * len(rewards), baselines=baselines, penalties_N=np.zeros(0))
    return teacher.advantages(outcomes).tolist()


def test_remax_baselines_are_clipped_as_rewards_are() -> None:
    teacher = Teacher(estimator="remax", clip=2.0)
    assert learned(teacher, [9.0, 1.0, -5.0, 0.0], (5.0, -3.0)) == [0.0, -1.0, 0.0, 2.0]


def test_remax_baselines_are_normalised_by_the_rewards_numbers() -> None:
    rewards, baselines = [3.0, 1.0, 7.0, 5.0], (2.0, 9.0)
    plain = np.array(learned(Teacher(estimator="remax"), rewards, baselines))
    found = learned(Teacher(estimator="remax", normalize=True), rewards, baselines)
    np.testing.assert_allclose(found, plain / np.std(rewards, ddof=1), rtol=1e-6)


def test_a_group_whose_greedy_answer_has_no_reward_learns_nothing() -> None:
    assert learned(Teacher(estimator="remax"), [1.0, 3.0, 1.0, 2.0], (NAN, 1.0)) == [0.0, 0.0, 0.0, 1.0]
