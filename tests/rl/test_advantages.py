"""Advantages by hand and against verl."""

import json
from pathlib import Path

import numpy as np
import pytest

from oarsmith.rl import advantages
from oarsmith.rl.advantages import Groups

FIXTURES = Path(__file__).parents[1] / "fixtures" / "losses"
NAN = float("nan")


def groups(*rewards: list[float]) -> Groups:
    return Groups(np.array([r for group in rewards for r in group]), tuple(map(len, rewards)))


def test_gae_as_verl() -> None:
    case = json.loads((FIXTURES / "gae_g1.0_l0.95.json").read_text())
    given, asked, expected = case["inputs"], case["hyperparameters"], case["expected"]
    mask = np.array(given["response_mask"]).astype(bool)
    rewards, values = (np.array(given[key], dtype=np.float64)[mask] for key in ("token_level_rewards", "values"))
    sizes = mask.sum(-1).tolist()
    found, returns = advantages.gae(rewards, values, sizes, gamma=asked["gamma"], lam=asked["lam"])
    # Where a row is masked everywhere verl leaves what was there; such tokens do not exist here.
    np.testing.assert_allclose(returns, np.array(expected["returns"])[mask], rtol=1e-6, atol=1e-7)
    whitened = advantages.whitened(found)
    np.testing.assert_allclose(whitened, np.array(expected["advantages_whitened"])[mask], rtol=1e-6, atol=1e-7)


def test_gae_worked_by_hand() -> None:
    found, returns = advantages.gae(np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.25, 1.0]), [2, 1], gamma=0.9, lam=0.5)
    # Second token: 1 - 0.25 = 0.75. First: 0 + 0.9 * 0.25 - 0.5 = -0.275, + 0.45 * 0.75 = 0.0625. The other answer: 4.
    np.testing.assert_allclose(found, [0.0625, 0.75, 4.0])
    np.testing.assert_allclose(returns, [0.5625, 1.0, 5.0])


def test_group_relative_has_unit_deviation_in_each_group() -> None:
    found = advantages.group_relative(groups([1.0, 2.0, 3.0], [0.0, 10.0]))
    np.testing.assert_allclose(found, [-1, 0, 1, -0.70710678, 0.70710678], rtol=1e-5, atol=1e-9)


def test_group_relative_scales() -> None:
    given = groups([0.0, 2.0], [5.0, 5.0])
    assert advantages.group_relative(given, scale="none").tolist() == [-1, 1, 0, 0]
    deviation = np.std([0.0, 2.0, 5.0, 5.0], ddof=1)
    np.testing.assert_allclose(
        advantages.group_relative(given, scale="batch")[:2], [-1 / deviation, 1 / deviation], rtol=1e-5
    )


def test_a_reward_that_is_none_is_no_part_of_the_baseline() -> None:
    given = groups([1.0, NAN, 3.0], [NAN, 2.0])
    assert advantages.group_relative(given, scale="none").tolist() == [-1, 0, 1, 0, 0]
    assert advantages.leave_one_out(given).tolist() == [-2, 0, 2, 0, 0]
    assert given.spreads == [2.0, 0.0]


def test_leave_one_out_is_the_distance_to_the_others() -> None:
    found = advantages.leave_one_out(groups([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(found, [1 - 4, 2 - 3.5, 6 - 1.5])


def test_best_only() -> None:
    found = advantages.best_only(groups([1.0, 4.0, 2.0], [0.0, 0.0]), scale="none")
    assert found.tolist() == [0, 2, 0, 0, 0]


def test_best_only_by_the_deviation_of_all() -> None:
    given = groups([1.0, 4.0, 2.0], [0.0, 9.0])
    by = np.std(given.rewards_A, ddof=1) + 1e-6
    np.testing.assert_allclose(advantages.best_only(given, scale="batch"), [0, 2 / by, 0, 0, 9 / by])


def test_gpg_counts_groups_that_differ_whatever_rounding_leaves() -> None:
    # The mean of three times 0.1 is not 0.1.
    found = advantages.gpg(groups([0.0, 1.0, 2.0], [0.1, 0.1, 0.1]))
    np.testing.assert_allclose(found, [-2, 0, 2, 0, 0, 0], atol=1e-12)


def test_length_weighted_baseline() -> None:
    found = advantages.length_weighted(groups([0.0, 1.0]), [1, 3])
    np.testing.assert_allclose(found, [-0.75, 0.25])


def test_remax_and_gpg() -> None:
    assert advantages.against(groups([1.0, 0.0], [3.0]), [0.5, 1.0]).tolist() == [0.5, -0.5, 2.0]
    np.testing.assert_allclose(advantages.gpg(groups([0.0, 2.0], [1.0, 1.0])), [-2, 2, 0, 0])


def test_discounted_returns() -> None:
    found = advantages.discounted(np.array([1.0, 0.0, 2.0, 4.0]), [3, 1], 0.5)
    assert found.tolist() == [1.5, 1.0, 2.0, 4.0]


def test_whitening() -> None:
    values = np.array([1.0, 2.0, 3.0, 100.0])
    used = np.array([True, True, True, False])
    np.testing.assert_allclose(advantages.whitened(values, used)[:3], [-1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(advantages.whitened(values, used, shift=False)[:3], [1, 2, 3], rtol=1e-6)
    assert advantages.whitened(np.array([7.0])).tolist() == [7.0]


@pytest.mark.parametrize("size", [1, 5])
def test_equal_rewards_teach_nothing(size: int) -> None:
    given = groups([0.1] * size)
    for found in (advantages.group_relative(given), advantages.leave_one_out(given), advantages.gpg(given)):
        assert np.abs(found).max() < 1e-9
