"""What a run that learns from rewards says on its way: what it waits for, rewards that fail, rewards that teach
nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.watch import Watch


def waiting_aloud(watch: Watch, console: Console, limit: float) -> Callable[[str], Any]:
    """As ``watch.waiting``; after ``limit`` seconds, and every so many more, is said what is waited for."""

    @contextmanager
    def waiting(text: str) -> Iterator[None]:
        over = threading.Event()

        def speak() -> None:
            while not over.wait(limit):
                console.print(f"waiting for {watch.text() or text}")

        with watch.waiting(text):
            thread = threading.Thread(target=speak, daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()

    return waiting


class StillRewards:
    """Says early when there is nothing to learn from: groups whose answers are all worth the same."""

    _LOOKED_AT, _MOST = 5, 0.8

    def __init__(self, console: Console) -> None:
        self._console, self._shares, self._said = console, list[float](), False

    def look(self, step: int, facts: Mapping[str, float]) -> None:
        """Of every rollout."""
        self._shares = [*self._shares[1 - self._LOOKED_AT :], facts["no_variance"]]
        if self._said or len(self._shares) < self._LOOKED_AT or facts["pass_rate"] > self._MOST:
            return
        mean = sum(self._shares) / len(self._shares)
        if mean > self._MOST:
            self._said = True
            self._console.print(
                f"warning: step {step}: in {mean:.0%} of the last {len(self._shares)} rollouts' groups all answers "
                f"have the same reward (mean {facts['reward']:.3g}), so they teach nothing. Raise samples_per_prompt "
                "or temperature, ask easier prompts, or give a reward with more steps between nothing and everything."
            )


class FailedRewards:
    """Says that a reward had errors where its options let the run go on: at the first answer, and each time that there
    are ten times as many."""

    def __init__(self, rewards: Rewards, console: Console) -> None:
        self._rewards, self._console = rewards, console
        self._next = dict.fromkeys(rewards.names, 1)

    def look(self, step: int) -> None:
        """Of every rollout."""
        for name, count in self._rewards.failures.items():
            if count >= self._next[name]:
                self._next[name] = 10 * count
                last = self._rewards.last_failure[name]
                self._console.print(f"warning: step {step}: reward '{name}' failed on {count} answers so far: {last}")
