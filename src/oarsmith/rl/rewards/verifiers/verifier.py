"""What every verifier has: options, and a check of one answer after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.values import Reward, RewardError, Value, place
from oarsmith.rl.rewards.watch import Watch


class Verifier(Reward):
    """Checks answers one by one, in microseconds."""

    @abstractmethod
    def check(self, one: Completion, where: str) -> Value:
        """The value of one answer.

        Raises:
            RewardError: the row lacks what the answer is checked against.
        """

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        found: list[Value | RewardError] = []
        for index, one in enumerate(batch):
            try:
                found.append(self.check(one, place(batch, index)))
            except RewardError as error:
                found.append(error)
        return found


def column(row: Mapping[str, object], key: str, *, reward: str, where: str) -> object:
    """A column that a verifier needs.

    Raises:
        RewardError: the row does not have it.
    """
    if row.get(key) is None:
        what = f"reward '{reward}' reads the column '{key}', and the row has {', '.join(row) or 'none'}"
        raise RewardError(what, where=where, fix="name the column that holds it with the option `column`")
    return row[key]


def texts_of(value: object, key: str, *, reward: str, where: str) -> list[str]:
    """A column of one text or number, or a list of them.

    Raises:
        RewardError: it is something else.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(one, str | int | float) for one in values):
        what = f"reward '{reward}': the column '{key}' holds {str(value)[:60]!r}, no text or list of texts"
        raise RewardError(what, where=where, fix="give the right answer as text, or a list of right answers")
    return [str(one) for one in values]
