"""What a method does around the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class UpdateHooks:
    """Called in every update, between the backward pass and the end of the update. As it is here: nothing."""

    def adjusted(self, grads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The gradients that the optimizer gets, linear in those given: clipping and loss scale are applied later, and
        the norm that is clipped and logged is that of the gradients as backward gave them."""
        return grads

    def updated(self, grads: Mapping[str, Tensor], *, grad_scale: float, step: int) -> bool:
        """After update number ``step`` of the loop, with its gradients, which the optimizer took times ``grad_scale``;
        whether it has changed parameters."""
        return False

    def state_tensors(self) -> dict[str, Tensor]:
        """What an exact resume needs, by name."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: it belongs to other parameters.
        """
