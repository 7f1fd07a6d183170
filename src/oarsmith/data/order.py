"""What the order of samples rests on: seeded permutations, and saved places that fit only the plan they count in."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from oarsmith.errors import ConfigError, DataError


def permutation(size: int, seed: int, purpose: str, epoch: int) -> npt.NDArray[np.int64]:
    """A random order of `size` things keyed by (seed, purpose, epoch).

    Sorts raw counter-based draws: unlike `Generator.permutation`, whose stream numpy may change, these never differ
    between versions.
    """
    key = np.random.SeedSequence([seed & (2**64 - 1), zlib.crc32(purpose.encode()), epoch])
    draws = np.random.Philox(key).random_raw(size)
    return np.argsort(draws, kind="stable")


def require_same_plan(state: Mapping[str, Any], *, fingerprint: str, settings: Mapping[str, Any]) -> None:
    """Refuses a saved place that belongs to another plan.

    Raises:
        DataError: the state belongs to other data.
        ConfigError: the state belongs to another plan of the same data.
    """
    if state["fingerprint"] != fingerprint:
        now, then = fingerprint[:12], state["fingerprint"][:12]
        what = f"the data has changed since the checkpoint (fingerprint {now}, then {then})"
        fix = "resume with the same data, tokenizer and template, or start a new run from the checkpoint's weights"
        raise DataError(what, fix=fix)
    for name, value in settings.items():
        if state[name] != value:
            what = f"{name} is {value}, but the checkpoint's place in the data was counted with {state[name]}"
            raise ConfigError(what, where=name, fix=f"resume with {name} {state[name]}, or start a new run")
