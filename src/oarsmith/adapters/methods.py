"""Every method that changes projections, as PEFT's files spell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oarsmith.adapters.boft import Boft, make_boft, read_boft
from oarsmith.adapters.bottleneck import Bottleneck, choose_bottleneck, read_bottleneck
from oarsmith.adapters.change import Change
from oarsmith.adapters.fourierft import FourierFt, make_fourierft, read_fourierft
from oarsmith.adapters.ia3 import ScaledOutput, choose_ia3, read_ia3
from oarsmith.adapters.loha import Loha, make_loha, read_loha
from oarsmith.adapters.lokr import Lokr, make_lokr, read_lokr
from oarsmith.adapters.lora import Lora, make_lora, read_lora
from oarsmith.adapters.mora import Mora, make_mora, read_mora
from oarsmith.adapters.oft import Oft, make_oft, read_oft
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.targets import match_targets
from oarsmith.adapters.vera import Vera, make_vera, read_vera
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError
from oarsmith.models.names import Place

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of one projection's tensors in a file, by what follows the projection's name there."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        name: ours, the ``adapter_type`` of a configuration.
        make: from a configuration's keys to the change of every projection it names.
        choose: or, where projections differ or the method has places of its own, to that of each projection.
        peft_type: what PEFT calls it.
        change: its class, which has the names of its tensors.
        read: from a file's config, a projection's name and its tensors' shapes to its change.
        matches: whether a config means this method, where several have the type.
    """

    name: str
    make: Callable[[AdapterKeys], Change] | None = None
    choose: Callable[[AdapterKeys, Mapping[str, Place]], Mapping[str, Change]] | None = None
    peft_type: str
    change: type[Change]
    read: Callable[[PeftConfig, str, Shapes], Change]
    matches: Callable[[PeftConfig], bool] = lambda config: True


METHODS = (
    Method(name="lora", make=make_lora, peft_type="LORA", change=Lora, read=read_lora),
    Method(name="mora", make=make_mora, peft_type="MORA", change=Mora, read=read_mora),
    Method(name="vera", make=make_vera, peft_type="VERA", change=Vera, read=read_vera),
    Method(name="lokr", make=make_lokr, peft_type="LOKR", change=Lokr, read=read_lokr),
    Method(name="loha", make=make_loha, peft_type="LOHA", change=Loha, read=read_loha),
    Method(name="ia3", choose=choose_ia3, peft_type="IA3", change=ScaledOutput, read=read_ia3),
    Method(name="fourierft", make=make_fourierft, peft_type="FOURIERFT", change=FourierFt, read=read_fourierft),
    Method(name="oft", make=make_oft, peft_type="OFT", change=Oft, read=read_oft),
    Method(name="boft", make=make_boft, peft_type="BOFT", change=Boft, read=read_boft),
    Method(
        name="bottleneck",
        choose=choose_bottleneck,
        peft_type="BOTTLENECK",
        change=Bottleneck,
        read=read_bottleneck,
    ),
)


def changes_of(keys: AdapterKeys, places: Mapping[str, Place]) -> Mapping[str, Change]:
    """The changes that a configuration asks for, by the projections they sit on.

    Args:
        places: of all projections of the model.

    Raises:
        ConfigError: values that the method cannot have, or targets that are none.
    """
    method = next(method for method in METHODS if method.name == keys.adapter_type)
    if method.choose is not None:
        return method.choose(keys, places)
    assert method.make is not None, method
    return dict.fromkeys(match_targets(places, keys.lora_target_modules or "all-linear"), method.make(keys))


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
