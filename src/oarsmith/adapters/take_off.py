"""Taking an adapter off a model that it was merged into, where the base itself is not there."""

from __future__ import annotations

import torch

from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.ends import Ends
from oarsmith.adapters.forms import DENSE
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.part import adapter_parts
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder


def require_removable(model: Decoder) -> None:
    """Refuse an adapter that leaves no trace of what it was merged into.

    Raises:
        ConfigError: it replaces weights, or changes them by more than a matrix that is added.
    """
    changes = [change for _, map_ in adapted_maps(model) for change in map_.changes.values()]
    odd = next((change for change in changes if not change.adds or change.made_of_weight), None)
    what = None if odd is None else f"{str(odd.peft_config()['peft_type']).lower()} does more than to add to weights"
    others = [part for part in adapter_parts(model) if not isinstance(part, Ends)]
    if others:
        what = f"{others[0].what} have replaced the base's"
    if what is not None:
        raise ConfigError(f"{what}: taking it off needs the base", where="adapter", fix="keep the base model")


@torch.no_grad()
def take_off_adapter(model: Decoder) -> float:
    """Take the adapter off the weights under it, in fp32, rounded once to the weight's dtype.

    Args:
        model: the merged model with the same adapter on top, which stays there: the model then does what the merged one
            did.

    Returns:
        How far a number can be from the base's: merging and this have each rounded it to the nearest of its dtype.

    Raises:
        ConfigError: an adapter that cannot be taken off.
    """
    require_removable(model)
    largest = 0.0
    for path, module in adapted_modules(model):
        assert module.form is DENSE, f"{path} has its weights in fewer bits"
        weight = module.taken_off()
        largest = max(largest, _step(module.weight, weight))
        module.weight.copy_(weight)
    for part in adapter_parts(model):
        assert isinstance(part, Ends), part
        for matrix, weight in part.taken_off(model):
            largest = max(largest, _step(matrix, weight))
            matrix.copy_(weight)
    return largest


def _step(before: torch.Tensor, after: torch.Tensor) -> float:
    """Half the distance of two neighbours in the weight's dtype, at its largest number before and after."""
    eps = torch.finfo(before.dtype).eps
    return 0.5 * eps * float(before.abs().max()) + 0.5 * eps * float(after.abs().max())
