"""Keys that set another key: PaddleNLP's and Hugging Face's switches for what is one choice here.

They are resolved after the layers are merged, so that a switch on the command line wins over the file's ``dtype`` and
the other way round: the highest layer that says something decides, two different sayings in one layer are an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from oarsmith.errors import ConfigError

from .base import Bool
from .entries import Entry

# PaddleNLP's and PEFT's, beside lora true.
_ADAPTERS: dict[str, str] = {
    "use_mora": "mora",
    "vera": "vera",
    "lokr": "lokr",
}

SWITCHES = frozenset(
    {"bf16", "fp16", "greedy_zero_padding", "no_cuda", "use_cpu", "use_long_sequence_strategies", *_ADAPTERS}
)

_BOOL: TypeAdapter[bool] = TypeAdapter(Bool)


def resolve_switches(given: dict[str, Entry], keys: Collection[str]) -> dict[str, Entry]:
    """Replace the switches among the ``given`` entries by entries of the keys they set.

    A switch is left in place (and then unknown) if the job lacks the key.

    Raises:
        ConfigError: two entries of one layer contradict each other.
    """
    result = dict(given)
    if "dtype" in keys:
        _resolve(result, "dtype", {"bf16": {True: "bf16", False: "fp32"}, "fp16": {True: "fp16"}})
    if "zero_padding" in keys:
        _resolve(result, "zero_padding", {"greedy_zero_padding": {True: True}})
    if "rope_scaling_type" in keys:
        _drop_unless_on(result, "use_long_sequence_strategies", "rope_scaling_type", "rope_scaling_factor")
    if "adapter_type" in keys:
        _resolve(result, "adapter_type", {switch: {True: name} for switch, name in _ADAPTERS.items()})
    if "device" in keys:
        _resolve(result, "device", {"no_cuda": {True: "cpu"}, "use_cpu": {True: "cpu"}})
    return result


def _resolve(given: dict[str, Entry], key: str, meaning: dict[str, dict[bool, object]]) -> None:
    """Let the highest layer decide among ``key`` itself and its switches.

    Within a layer a value or a switch that is on says more than ``auto`` or a switch that is off (a PaddleNLP file
    writes ``"bf16": true, "fp16": false``).
    """
    said: list[tuple[tuple[int, bool], Entry]] = []
    own = given.get(key)
    if own is not None and own.value is not None:
        if key == "zero_padding":
            own = replace(own, value=_as_bool(own))
        said.append(((own.rank, own.value != "auto"), own))
    for switch, values in meaning.items():
        entry = given.pop(switch, None)
        if entry is not None and entry.value is not None:
            state = _as_bool(entry)
            if state in values:
                said.append(((entry.rank, state), replace(entry, value=values[state])))
    if not said:
        return
    strongest = max(strength for strength, _ in said)
    deciding = [entry for strength, entry in said if strength == strongest]
    if any(entry.value != deciding[0].value for entry in deciding):
        names = " and ".join(f"'{entry.name}'" for entry in deciding)
        raise ConfigError(f"{names} contradict each other", where=deciding[0].where, fix=f"give only {key}")
    given[key] = deciding[0]


def _as_bool(entry: Entry) -> bool:
    try:
        return _BOOL.validate_python(entry.value, strict=True)
    except ValidationError:
        raise ConfigError(
            f"{entry.name} = {entry.value!r}: must be true or false", where=entry.where, fix="give true or false"
        ) from None


def _drop_unless_on(given: dict[str, Entry], switch: str, *keys: str) -> None:
    """A switch that is off takes back the keys it governs, in its own layer and those below."""
    entry = given.pop(switch, None)
    if entry is None or entry.value is None or _as_bool(entry):
        return
    for key in keys:
        if key in given and given[key].rank <= entry.rank:
            del given[key]
