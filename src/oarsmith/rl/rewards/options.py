"""Settings of one reward: strict, frozen, each with its help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oarsmith.errors import ConfigError

OnError = Literal["raise", "none"]


class RewardOptions(BaseModel):
    """What every reward has; a reward's own options are added by its class."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reward: str = Field(
        description="What gives the reward: the name of a built-in, file.py:function, package.module:function, an "
        "http address, or the directory of a reward model."
    )
    name: str | None = Field(None, description="How reports call it; by default what `reward` says, shortened.")
    weight: float = Field(1.0, allow_inf_nan=False, description="What its values are multiplied with in the total.")
    on_error: OnError = Field(
        "raise",
        description="When a value cannot be computed or is no finite number: raise ends the run and names reward and "
        "row; none counts the answer as one without a score and reports how many there were.",
    )


Options = TypeVar("Options", bound=RewardOptions)


def read_options(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Options of one reward.

    Raises:
        ConfigError: an unknown option, or a value that cannot be; names the reward.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "options"
        known = ", ".join(name for name in kind.model_fields if name != "reward")
        unknown = first["type"] == "extra_forbidden"
        what = f"unknown option '{key}'" if unknown else f"option '{key}': {first['msg']}"
        raise ConfigError(what, where=f"reward '{given.get('reward')}'", fix=f"its options are {known}") from error
