"""Keys that set another key: PaddleNLP's and Hugging Face's switches for what is one choice here.

They are resolved after the layers are merged, so that a switch on the command line wins over the file's ``dtype`` and
the other way round: the highest layer that says something decides, two different sayings in one layer are an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from oarsmith.errors import ConfigError

from .base import TRUE_WORDS, Bool
from .entries import Entry

# PaddleNLP's and PEFT's, beside lora true.
_ADAPTERS: dict[str, str] = {
    "use_dora": "dora",
    "pissa": "pissa",
    "olora": "olora",
    "loraga": "loraga",
    "lorapro": "lorapro",
    "lora_use_mixer": "moslora",
    "use_mora": "mora",
    "vera": "vera",
    "lokr": "lokr",
    "prefix_tuning": "prefix_tuning",
    "reft": "reft",
}

# PaddleNLP's rsLoRA+: what its script sets.
_RSLORA_PLUS: dict[str, object] = {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4.0}

# PEFT's words for how the matrices start -> the switch that says the same.
_STARTS = {"pissa": "pissa", "olora": "olora", "lora_ga": "loraga"}

# PaddleNLP's quantization: what its switches choose. ``do_ptq`` names its plain way, which do_gptq and do_awq change.
_ALGORITHMS: dict[str, dict[bool, object]] = {"do_gptq": {True: "gptq"}, "do_awq": {True: "awq"}}
_PIECEWISE: dict[str, object] = {"smooth": "piecewise"}

# Among the switches, those with a word of their own.
WITH_WORD = frozenset({"init_lora_weights"})

# transformers' words for weights in fewer bits.
_LOAD_IN: dict[str, dict[bool, object]] = {"load_in_4bit": {True: "nf4"}, "load_in_8bit": {True: "weight_only_int8"}}

SWITCHES = frozenset(
    {
        "bf16",
        "fp16",
        "greedy_zero_padding",
        "init_lora_weights",
        "no_cuda",
        "rslora_plus",
        "use_cpu",
        "use_long_sequence_strategies",
        "enable_overlong_reward_buffer",
        "use_rm_server",
        "smooth_piecewise_search",
        *_ADAPTERS,
        *_LOAD_IN,
        *_ALGORITHMS,
    }
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
    if "overlong_buffer" in keys:
        _drop_unless_on(result, "enable_overlong_reward_buffer", "overlong_buffer", "overlong_penalty")
        _drop_unless_on(result, "use_rm_server", "rewards")
    if "adapter_type" in keys:
        _spread(result, "rslora_plus", _RSLORA_PLUS)
        _take_start(result)
        _resolve(result, "adapter_type", {switch: {True: name} for switch, name in _ADAPTERS.items()})
    if "weight_quantize_algo" in keys:
        _resolve(result, "weight_quantize_algo", _LOAD_IN)
    if "scheme" in keys:
        _take_piecewise(result)
        _resolve(result, "algorithm", _ALGORITHMS)
    if "sharding" in keys:
        _take_offload(result)
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


def _take_piecewise(given: dict[str, Entry]) -> None:
    """``smooth_piecewise_search`` says how, where ``smooth`` says that (PaddleNLP's files have both)."""
    own, how = given.get("smooth"), given.get("smooth_piecewise_search")
    # A plain true has become the name of the plain way by now.
    if own is not None and how is not None and own.value == "smoothquant" and _as_bool(how):
        del given["smooth"]
    _spread(given, "smooth_piecewise_search", _PIECEWISE)


def _take_offload(given: dict[str, Entry]) -> None:
    """PaddleNLP's ``stage2 offload`` is two keys: the states lie in the computer's memory."""
    entry = given.get("sharding")
    if entry is None or not isinstance(entry.value, str):
        return
    stage, _, rest = entry.value.strip().lower().partition(" ")
    if rest.strip() == "offload":
        given["sharding"] = replace(entry, value=stage)
        given.setdefault("offload_optim", replace(entry, value=True))


def _spread(given: dict[str, Entry], switch: str, values: Mapping[str, object]) -> None:
    """A switch that is on sets several keys, in its own layer and those below.

    Raises:
        ConfigError: its layer has another value for one of them.
    """
    entry = given.pop(switch, None)
    if entry is None or entry.value is None or not _as_bool(entry):
        return
    for key, value in values.items():
        own = given.get(key)
        if own is None or own.value is None or own.rank < entry.rank:
            given[key] = replace(entry, value=value)
        elif own.rank == entry.rank and str(own.value).lower() not in _same_as(value):
            raise ConfigError(
                f"'{switch}' and '{own.name}' contradict each other",
                where=own.where,
                fix=f"remove {switch}, or set {key} to {value}",
            )


def _same_as(value: object) -> frozenset[str]:
    """How a file can spell a value."""
    if value is True:
        return TRUE_WORDS
    if isinstance(value, str):
        return frozenset({value})
    assert isinstance(value, float), value
    return frozenset({f"{value:g}", str(value)})


def _take_start(given: dict[str, Entry]) -> None:
    """PEFT's ``init_lora_weights``: a method, or what A is drawn from.

    Raises:
        ConfigError: a start that this version does not have.
    """
    entry = given.pop("init_lora_weights", None)
    word = "true" if entry is None or entry.value is None else str(entry.value).strip().lower()
    if entry is None or word in TRUE_WORDS:
        return
    rounds = re.fullmatch(r"pissa_niter_(\d+)", word)
    if rounds:
        given.setdefault("pissa_niter", replace(entry, value=int(rounds[1])))
        word = "pissa"
    if word == "gaussian":
        given.setdefault("lora_start", replace(entry, value=word))
    elif word in _STARTS:
        given.setdefault(_STARTS[word], replace(entry, value=True))
    else:
        raise ConfigError(
            f"init_lora_weights {entry.value!r} is not built yet in this version",
            where=entry.where,
            fix=f"use true, gaussian, pissa_niter_16 or one of {', '.join(_STARTS)}",
        )


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
