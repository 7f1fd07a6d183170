"""Every method that changes projections, as PEFT's files spell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oarsmith.adapters.change import Change
from oarsmith.adapters.lora import Lora, make_lora, read_lora
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of one projection's tensors in a file, by what follows the projection's name there."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        name: ours, the ``adapter_type`` of a configuration.
        make: from a configuration's keys to the change of every projection it names.
        peft_type: what PEFT calls it.
        change: its class, which has the names of its tensors.
        read: from a file's config, a projection's name and its tensors' shapes to its change.
        matches: whether a config means this method, where several have the type.
    """

    name: str
    make: Callable[[AdapterKeys], Change]
    peft_type: str
    change: type[Change]
    read: Callable[[PeftConfig, str, Shapes], Change]
    matches: Callable[[PeftConfig], bool] = lambda config: True


METHODS = (Method(name="lora", make=make_lora, peft_type="LORA", change=Lora, read=read_lora),)


def change_of(keys: AdapterKeys) -> Change:
    """The change that a configuration asks for.

    Raises:
        ConfigError: values that the method cannot have.
    """
    return next(method for method in METHODS if method.name == keys.adapter_type).make(keys)


def find_method(config: PeftConfig) -> Method:
    """The method a file has.

    Raises:
        CheckpointError: none that is known.
    """
    for method in METHODS:
        if method.peft_type == config.peft_type and method.matches(config):
            return method
    known = ", ".join(sorted({method.peft_type for method in METHODS}))
    what = f"adapters of type {config.peft_type!r} cannot be read"
    raise CheckpointError(what, where=config.where, fix=f"known: {known}")
