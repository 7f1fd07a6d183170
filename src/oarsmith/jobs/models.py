"""``oarsmith models``: the model families this version knows."""

from __future__ import annotations

from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import ModelsConfig
from oarsmith.models.families import known


def run(resolved: Resolved[ModelsConfig]) -> None:
    """Print a line per family: its name, the ``model_type`` values of config.json it reads, what it is."""
    families = sorted(known(), key=lambda family: family.name)
    types = {family.name: ", ".join(family.model_types) for family in families}
    name_width = max(map(len, ["family", *types]))
    type_width = max(map(len, ["model_type", *types.values()]))
    print(f"{'family':<{name_width}}  {'model_type':<{type_width}}  what it is")
    for family in families:
        print(f"{family.name:<{name_width}}  {types[family.name]:<{type_width}}  {family.description}")
