"""Choosing numbers of a recipe by what they give: all combinations, or an evolution strategy.

The strategy is CMA-ES (Hansen 2016, https://arxiv.org/abs/1604.00772, with its default constants), in the box of
allowed values. Its random numbers follow from the seed.

Shapes: D numbers, P candidates of a generation, M parents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from oarsmith.errors import ConfigError
from oarsmith.merge.parameters import Gradient, Setting
from oarsmith.merge.recipe import Recipe
from oarsmith.merge.registry import find_method, with_sparsifier

Numbers = tuple[float, ...]
Loss = Callable[[Numbers], float]
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """Numbers that were tried, and what they gave."""

    numbers: Numbers
    loss: float


@dataclass(frozen=True)
class Knob:
    """A parameter that is chosen: of a model (its reference), or of the merge; for a group of layers."""

    parameter: str
    model: str | None
    group: int


def knobs(recipe: Recipe, parameters: Sequence[str], groups: int) -> tuple[Knob, ...]:
    """What is chosen in a recipe.

    Raises:
        ConfigError: the method has no such number.
    """
    method = with_sparsifier(find_method(recipe.method), recipe.sparsify)
    known = {one.name: one for one in method.parameters if one.kind is float}
    sources = dict.fromkeys(source.model for one in recipe.slices for source in one.sources)
    models = [model for model in sources if method.base == "none" or model != recipe.base]
    found = []
    for name in parameters:
        if name not in known:
            raise ConfigError(
                f"{recipe.method} has no number '{name}' to choose",
                where="search_over",
                fix=f"use one of {', '.join(known) or 'another method'}",
            )
        for model in models if known[name].per_model else [None]:
            found += [Knob(name, model, group) for group in range(groups)]
    return tuple(found)


def with_numbers(recipe: Recipe, chosen: Sequence[Knob], numbers: Numbers) -> Recipe:
    """The recipe with these numbers; those of several groups are a gradient over layers."""
    settings: dict[tuple[str | None, str], list[float]] = {}
    for knob, number in zip(chosen, numbers, strict=True):
        settings.setdefault((knob.model, knob.parameter), []).append(round(number, 6))
    made: dict[str | None, dict[str, Setting]] = {}
    for (model, name), values in settings.items():
        made.setdefault(model, {})[name] = values[0] if len(values) == 1 else Gradient(tuple(values))
    slices = tuple(
        replace(
            one,
            sources=tuple(
                replace(source, parameters={**source.parameters, **made.get(source.model, {})})
                for source in one.sources
            ),
        )
        for one in recipe.slices
    )
    first, *others = recipe.parameters or ({},)
    return replace(recipe, slices=slices, parameters=({**first, **made.get(None, {})}, *others))


def grid(num: int, low: float, high: float, steps: int, limit: int) -> Iterator[Numbers]:
    """Every combination of ``steps`` values.

    Raises:
        ConfigError: there are more than ``limit``.
    """
    if steps**num > limit:
        raise ConfigError(
            f"{steps} values of {num} numbers are {steps**num:,} combinations, and search_trials is {limit}",
            where="search",
            fix="lower search_steps, raise search_trials, or use search evolution",
        )
    yield from itertools.product(np.linspace(low, high, steps).tolist(), repeat=num)


def search_grid(loss: Loss, num: int, low: float, high: float, steps: int, limit: int) -> list[Trial]:
    """All combinations, in order."""
    return [Trial(numbers, loss(numbers)) for numbers in grid(num, low, high, steps, limit)]


def search_evolution(loss: Loss, num: int, low: float, high: float, limit: int, seed: int) -> list[Trial]:
    """Up to ``limit`` candidates, in the order in which they were tried."""
    strategy = Strategy(num, seed)
    trials: list[Trial] = []
    while len(trials) < limit:
        drawn_PD = strategy.draw()
        losses = []
        for row_D in drawn_PD[: limit - len(trials)]:
            numbers = tuple((low + np.clip(row_D, 0, 1) * (high - low)).tolist())
            # Outside of the box: as much worse as it is far, so that the strategy comes back.
            outside = float(np.square(row_D - np.clip(row_D, 0, 1)).sum())
            trials.append(Trial(numbers, loss(numbers)))
            losses.append(trials[-1].loss * (1 + outside) if trials[-1].loss > 0 else trials[-1].loss + outside)
        if len(losses) == len(drawn_PD):
            strategy.learn(drawn_PD, np.asarray(losses))
    return trials


class Strategy:
    """CMA-ES on [0, 1]^D, from its middle."""

    def __init__(self, num: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._num = num
        self.population = 4 + int(3 * np.log(num)) if num > 1 else 4
        raw = np.log((self.population + 1) / 2) - np.log(np.arange(1, self.population // 2 + 1))
        self._weights_M: _Array = raw / raw.sum()
        mass = 1 / float(np.square(self._weights_M).sum())
        self._mass = mass
        self._c_sigma = (mass + 2) / (num + mass + 5)
        self._damping = 1 + 2 * max(0.0, np.sqrt((mass - 1) / (num + 1)) - 1) + self._c_sigma
        self._c_path = (4 + mass / num) / (num + 4 + 2 * mass / num)
        self._c_one = 2 / ((num + 1.3) ** 2 + mass)
        self._c_mu = min(1 - self._c_one, 2 * (mass - 2 + 1 / mass) / ((num + 2) ** 2 + mass))
        self._length = np.sqrt(num) * (1 - 1 / (4 * num) + 1 / (21 * num**2))
        self.mean_D: _Array = np.full(num, 0.5)
        self.sigma = 0.3
        self._cov_DD: _Array = np.eye(num)
        self._path_sigma_D: _Array = np.zeros(num)
        self._path_D: _Array = np.zeros(num)
        self._generation = 0

    def draw(self) -> _Array:
        """A generation [P, D]."""
        values_D, vectors_DD = np.linalg.eigh(self._cov_DD)
        root_DD = vectors_DD * np.sqrt(np.maximum(values_D, 1e-20))
        normal_PD = self._random.standard_normal((self.population, self._num))
        drawn: _Array = self.mean_D + self.sigma * normal_PD @ root_DD.T
        return drawn

    def learn(self, drawn_PD: _Array, losses_P: _Array) -> None:
        """Take in what a generation gave."""
        self._generation += 1
        best_MD = drawn_PD[np.argsort(losses_P, kind="stable")[: len(self._weights_M)]]
        steps_MD = (best_MD - self.mean_D) / self.sigma
        step_D = self._weights_M @ steps_MD
        values_D, vectors_DD = np.linalg.eigh(self._cov_DD)
        whiten_DD = vectors_DD / np.sqrt(np.maximum(values_D, 1e-20)) @ vectors_DD.T
        self.mean_D = self.mean_D + self.sigma * step_D
        rest = np.sqrt(self._c_sigma * (2 - self._c_sigma) * self._mass)
        self._path_sigma_D = (1 - self._c_sigma) * self._path_sigma_D + rest * whiten_DD @ step_D
        size = float(np.linalg.norm(self._path_sigma_D))
        settled = np.sqrt(1 - (1 - self._c_sigma) ** (2 * self._generation))
        moving = float(size / settled < (1.4 + 2 / (self._num + 1)) * self._length)
        along = np.sqrt(self._c_path * (2 - self._c_path) * self._mass)
        self._path_D = (1 - self._c_path) * self._path_D + moving * along * step_D
        rank_one = np.outer(self._path_D, self._path_D)
        rank_mu = (steps_MD * self._weights_M[:, None]).T @ steps_MD
        stalled = (1 - moving) * self._c_path * (2 - self._c_path)
        kept = (1 - self._c_one - self._c_mu + self._c_one * stalled) * self._cov_DD
        self._cov_DD = kept + self._c_one * rank_one + self._c_mu * rank_mu
        self.sigma *= float(np.exp(self._c_sigma / self._damping * (size / self._length - 1)))
