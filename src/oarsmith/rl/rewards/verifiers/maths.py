"""``maths``: the final answer is equal to the right one."""

from __future__ import annotations

from pydantic import Field

from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Value
from oarsmith.rl.rewards.verifiers.answers import final_answer
from oarsmith.rl.rewards.verifiers.equality import equal
from oarsmith.rl.rewards.verifiers.verifier import Verifier, column, texts_of


class MathsOptions(RewardOptions):
    """Options of ``maths``."""

    column: str = Field(
        "answer",
        description="Column of the row with the right answer: a number, an expression, a solution that ends in one "
        "(boxed, or behind ####), or a list of which any counts.",
    )
    right: float = Field(1.0, description="Value of a right answer.")
    wrong: float = Field(0.0, description="Value of a wrong one.")
    missing: float = Field(0.0, description="Value where no final answer is found.")
    marked_only: bool = Field(
        False, description="Only answers in \\boxed{}, behind #### or after 'answer is' count, not the last number."
    )


class MathsReward(Verifier):
    r"""Numbers, fractions, percentages, LaTeX, expressions, equations, tuples, sets and intervals; see ``equality``."""

    def __init__(self, options: MathsOptions) -> None:
        super().__init__(options.name or "maths")
        self._options = options

    def check(self, one: Completion, where: str) -> Value:
        options = self._options
        given = column(one.row, options.column, reward=self.name, where=where)
        found = final_answer(one.text, anywhere=not options.marked_only)
        if found is None:
            return options.missing
        references = texts_of(given, options.column, reward=self.name, where=where)
        return options.right if any(equal(found, _bare(text)) for text in references) else options.wrong


def _bare(reference: str) -> str:
    """The final answer of a reference that is a whole solution."""
    return (final_answer(reference, anywhere=False) or reference) if len(reference) > 1 else reference
