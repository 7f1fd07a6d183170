"""Every method by its name: how many models, whether it has a base, its parameters, and the function."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from oarsmith.errors import ConfigError
from oarsmith.merge.deltas import Elect, Kind, arithmetic, sce, sparsified
from oarsmith.merge.job import TensorJob
from oarsmith.merge.linear import linear, model_stock, nearswap, passthrough
from oarsmith.merge.parameters import Parameter
from oarsmith.merge.selective import arcee_fusion, ram, ramplus_tl
from oarsmith.merge.spherical import karcher, multislerp, nuslerp, slerp

Base = Literal["none", "optional", "required", "one of them"]
SPARSIFIERS: dict[str, Kind] = {
    "none": "none",
    "trim": "magnitude",
    "magnitude": "magnitude",
    "dare": "drop",
    "random": "drop",
    "magprune": "magnitude_drop",
    "breadcrumbs": "breadcrumbs",
}
"""Recipe's and PaddleNLP's words for what is done to deltas before any method."""


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        base: ``one of them``: the base is a model like the others, from which the method begins.
        least, most: models beside the base.
        merge: makes one tensor.
    """

    name: str
    merge: Callable[[TensorJob], Tensor]
    base: Base
    least: int
    most: int | None
    parameters: tuple[Parameter, ...] = ()


_WEIGHT = Parameter("weight", float, per_model=True)
_DENSITY = Parameter("density", float, 1.0, per_model=True, least=0, most=1)
_INT8_MASK = Parameter("int8_mask", bool, False)  # a smaller mask in mergekit; here masks live for a block
_LAMBDA = Parameter("lambda", float, 1.0)
_EPSILON = Parameter("epsilon", float, 0.15, per_model=True, least=0, most=1)
_GAMMA = Parameter("gamma", float, 0.01, per_model=True, least=0, most=1)
_RESCALE_BY = Parameter("rescale_by", str, "l1", words=("l1", "density"))
_RANKS = Parameter("magnitude_ranks", str, "row", words=("row", "tensor"))
_TRIM_BY = Parameter("trim_by", str, "count", words=("count", "quantile"))
_OUTLIERS = Parameter("drop_without_outliers", bool, False)
_THRESHOLD = Parameter("dot_threshold", float, 0.9995, least=0, most=1)
_NORMALIZE_EPS = Parameter("normalize_eps", float, 1e-8, least=0)


_OF_KIND: dict[Kind, tuple[Parameter, ...]] = {
    "magnitude_drop": (_EPSILON, _RANKS),
    "breadcrumbs": (_GAMMA, _OUTLIERS),
    "magnitude": (_TRIM_BY,),
}


def _arithmetic(name: str, kind: Kind, elect: Elect, *, normalize: bool, rescale: bool = False) -> Method:
    own: tuple[Parameter, ...] = ()
    if kind != "none":
        own = (_DENSITY, Parameter("rescale", bool, rescale), _RESCALE_BY, *_OF_KIND.get(kind, ()))
    shared = (Parameter("normalize", bool, normalize), _LAMBDA, _INT8_MASK)
    return Method(name, arithmetic(kind, elect), "required", 1, None, (_WEIGHT, *shared, *own))


_RAM = Parameter("epsilon", float, 1e-5, least=0)
METHODS: dict[str, Method] = {
    one.name: one
    for one in (
        Method("linear", linear, "none", 1, None, (_WEIGHT, Parameter("normalize", bool, True))),
        Method("slerp", slerp, "one of them", 1, 1, (Parameter("t", float), _THRESHOLD, _NORMALIZE_EPS)),
        Method(
            "nuslerp",
            nuslerp,
            "optional",
            2,
            2,
            (
                _WEIGHT,
                Parameter("nuslerp_flatten", bool, True),
                Parameter("nuslerp_row_wise", bool, False),
            ),
        ),
        Method(
            "multislerp",
            multislerp,
            "optional",
            2,
            None,
            (_WEIGHT, Parameter("normalize_weights", bool, True), Parameter("eps", float, 1e-8, least=0)),
        ),
        Method(
            "karcher",
            karcher,
            "none",
            2,
            None,
            (Parameter("max_iter", int, 10, least=0), Parameter("tol", float, 1e-5, least=0)),
        ),
        _arithmetic("task_arithmetic", "none", "none", normalize=False),
        # Of PaddleNLP's flags: deltas as their sparsifier leaves them, put together in one of these ways.
        _arithmetic("linear_deltas", "none", "none", normalize=True),
        _arithmetic("ties_sum", "none", "sum", normalize=True),
        _arithmetic("ties_count", "none", "count", normalize=True),
        Method("slerp_deltas", slerp, "required", 2, 2, (Parameter("t", float), _THRESHOLD, _NORMALIZE_EPS)),
        _arithmetic("ties", "magnitude", "sum", normalize=True, rescale=False),
        _arithmetic("dare_linear", "drop", "none", normalize=False, rescale=True),
        _arithmetic("dare_ties", "drop", "sum", normalize=False, rescale=True),
        _arithmetic("della", "magnitude_drop", "sum", normalize=True, rescale=True),
        _arithmetic("della_ties", "magnitude_drop", "sum", normalize=True, rescale=True),
        _arithmetic("della_linear", "magnitude_drop", "none", normalize=False, rescale=True),
        _arithmetic("breadcrumbs", "breadcrumbs", "none", normalize=False, rescale=False),
        _arithmetic("breadcrumbs_ties", "breadcrumbs", "sum", normalize=False, rescale=False),
        Method("sce", sce, "required", 1, None, (Parameter("select_topk", float, 1.0, least=0, most=1), _INT8_MASK)),
        Method("model_stock", model_stock, "required", 2, None, (Parameter("filter_wise", bool, False),)),
        Method("nearswap", nearswap, "required", 1, 1, (Parameter("t", float, least=0),)),
        Method("arcee_fusion", arcee_fusion, "required", 1, 1),
        Method("ram", ram, "required", 1, None, (_RAM,)),
        Method(
            "ramplus_tl",
            ramplus_tl,
            "required",
            1,
            None,
            (_RAM, Parameter("r", float, 0.1), Parameter("alpha", float, 0.2, least=0)),
        ),
        Method("passthrough", passthrough, "none", 1, 1, (Parameter("scale", float, 1.0, per_model=True),)),
    )
}


def find_method(name: str) -> Method:
    """The method of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in METHODS:
        return METHODS[name]
    guess = difflib.get_close_matches(name, METHODS, n=1)
    raise ConfigError(
        f"there is no merge method {name!r}",
        where="merge_method",
        fix=f"did you mean '{guess[0]}'?" if guess else f"use one of {', '.join(METHODS)}",
    )


def with_sparsifier(method: Method, word: str) -> Method:
    """Any method, of models whose deltas are sparsified first.

    Raises:
        ConfigError: no such sparsifier, or a method that takes no base.
    """
    if word not in SPARSIFIERS:
        raise ConfigError(
            f"there is no sparsifier {word!r}", where="sparsify_type", fix=f"use one of {', '.join(SPARSIFIERS)}"
        )
    kind = SPARSIFIERS[word]
    if kind == "none":
        return method
    rescale = Parameter("rescale", bool, kind in ("drop", "magnitude_drop"))
    extra = (_DENSITY, _RESCALE_BY, rescale, *_OF_KIND.get(kind, ()))
    alike, names = method.base == "one of them", {one.name for one in extra}
    if "epsilon" in names and any(one.name == "epsilon" and not one.per_model for one in method.parameters):
        raise ConfigError(
            f"epsilon means one thing to {method.name} and another to {word}",
            where="sparsify_type",
            fix="use dare or trim",
        )
    return replace(
        method,
        base="required",
        least=2 if alike else method.least,
        most=2 if alike else method.most,
        merge=lambda job: method.merge(sparsified(job, kind)),
        # What both know is the sparsifier's: it stands in for the method's own.
        parameters=(*(one for one in method.parameters if one.name not in names), *extra),
    )
