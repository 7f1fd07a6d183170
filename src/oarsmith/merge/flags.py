"""PaddleNLP's flags as a recipe, with PaddleNLP's definitions (``tools/mergekit.py``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from oarsmith.errors import ConfigError
from oarsmith.merge.parameters import Setting, Settings
from oarsmith.merge.recipe import Recipe, SliceSpec, SourceSpec
from oarsmith.merge.registry import find_method, with_sparsifier

# merge_method -> sparsify_type, merge_type
_METHODS: dict[str, tuple[str, str]] = {
    "linear": ("none", "linear"),
    "slerp": ("none", "slerp"),
    "ties": ("trim", "ties"),
    "della": ("magprune", "ties"),
    "della_linear": ("magprune", "linear"),
    "dare_linear": ("dare", "linear"),
    "dare_ties": ("dare", "ties"),
}
# flag -> the parameter of a method that it is
_PARAMETERS = {
    "weight_list": "weight",
    "normalize": "normalize",
    "reserve_p": "density",
    "rescale": "rescale",
    "epsilon": "epsilon",
    "slerp_alpha": "t",
    "slerp_normalize_eps": "normalize_eps",
    "slerp_dot_threshold": "dot_threshold",
}


@dataclass(frozen=True)
class Flags:
    """The flags; names are PaddleNLP's."""

    models: Sequence[str]
    base: str | None
    weights: Sequence[float]
    merge_method: str | None
    merge_type: str | None
    sparsify_type: str | None
    normalize: bool
    slerp_alpha: float
    slerp_normalize_eps: float
    slerp_dot_threshold: float
    ties_elect_type: str
    reserve_p: float
    rescale: bool
    epsilon: float
    dtype: str | None


def recipe_of_flags(flags: Flags) -> Recipe:
    """The recipe. With a base every method merges deltas and adds the sum to it; without one it merges weights.

    Raises:
        ConfigError: flags that contradict each other.
    """
    sparsify, merge = _kinds(flags)
    weights = list(flags.weights) or [1.0] * len(flags.models)
    if len(weights) != len(flags.models):
        raise ConfigError(
            f"{len(weights)} weights for {len(flags.models)} models", where="weight_list", fix="give one for each model"
        )
    if flags.base is None and (sparsify != "none" or merge == "ties"):
        raise ConfigError(
            "what is dropped, and whose sign is elected, is what models add to a base",
            where="base_model_path",
            fix="name the model they were trained from: --base_model_path PATH",
        )
    if merge == "slerp":
        method = "slerp" if flags.base is None else "slerp_deltas"
    elif flags.base is None:
        method = "linear"
    else:
        method = "linear_deltas" if merge == "linear" else f"ties_{flags.ties_elect_type}"
    known = _known(method, sparsify)
    shared: dict[str, Setting] = {
        "normalize": flags.normalize,
        "rescale": flags.rescale,
        "rescale_by": "density",
        "trim_by": "quantile",
        "magnitude_ranks": "tensor",
        "t": flags.slerp_alpha,
        "normalize_eps": flags.slerp_normalize_eps,
        "dot_threshold": flags.slerp_dot_threshold,
    }
    own: dict[str, Setting] = {"density": flags.reserve_p, "epsilon": flags.epsilon}
    sources = tuple(
        SourceSpec(path, None, _of(known, {**own, "weight": weight}))
        for path, weight in zip(flags.models, weights, strict=True)
    )
    base = flags.models[0] if method == "slerp" else flags.base
    return Recipe(method, (SliceSpec(sources),), base, (_of(known, shared),), flags.dtype, sparsify=sparsify)


def idle_flags(recipe: Recipe) -> tuple[str, ...]:
    """Flags that say nothing to the method that `recipe_of_flags` has chosen."""
    known = _known(recipe.method, recipe.sparsify)
    found = [flag for flag, parameter in _PARAMETERS.items() if parameter not in known]
    return (*found, *([] if recipe.method.startswith("ties_") else ["ties_elect_type"]))


def _known(method: str, sparsify: str) -> frozenset[str]:
    return frozenset(one.name for one in with_sparsifier(find_method(method), sparsify).parameters)


def _of(known: Collection[str], settings: Settings) -> Settings:
    return {name: setting for name, setting in settings.items() if name in known}


def _kinds(flags: Flags) -> tuple[str, str]:
    method = flags.merge_method or ("linear" if flags.merge_type is None else None)
    if method is not None and method not in _METHODS:
        raise ConfigError(
            f"there is no merge method {method!r} for flags; a recipe has more",
            where="merge_method",
            fix=f"use one of {', '.join(_METHODS)}, or write a recipe (YAML) with {method}",
        )
    sparsify, merge = _METHODS[method] if method is not None else ("none", "linear")
    merge, sparsify = flags.merge_type or merge, flags.sparsify_type or sparsify
    if sparsify == "magprune" and not flags.epsilon / 2 < flags.reserve_p < 1 - flags.epsilon / 2:
        raise ConfigError(
            f"epsilon {flags.epsilon:g} around reserve_p {flags.reserve_p:g} leaves (0, 1)",
            where="epsilon",
            fix="lower epsilon, or move reserve_p towards the middle",
        )
    if merge == "slerp" and len(flags.models) != 2:
        raise ConfigError(
            f"slerp goes from one model to another, and there are {len(flags.models)}",
            where="model_path_list",
            fix="name two models",
        )
    return sparsify, merge
