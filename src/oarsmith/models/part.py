"""What lies in a decoder beside the modules of its family; rewrites of a spec put it there (``DecoderSpec.parts``).

Shapes: T tokens of the stream, E table row, V vocabulary, D hidden, N chosen tokens, P virtual tokens,
G kv heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from oarsmith.models.layout import Layout

KeysAndValues = tuple[Tensor, Tensor]


class Part(nn.Module):
    """Has a say at certain places of a call; by itself it says nothing anywhere.

    Virtual tokens stand in front of every document and take the first ``num_virtual`` positions. Without a cache the
    decoder adds them by itself, and nothing of them is in what it gives. With a cache they are part of the sequences,
    as ids -1, -2, ... (``virtual.py``), so that pages, their sharing and their loss are no matter of this module.

    Attributes:
        enabled: off, the decoder does without it.
        num_virtual: P.
    """

    num_virtual: int = 0

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    @property
    def enabled(self) -> bool:
        return self._enabled

    def enable(self, on: bool) -> None:
        """Switch it on or off."""
        self._enabled = on

    def virtual_keys(self) -> Sequence[KeysAndValues] | None:
        """Of each layer, the keys and values [P, G, K] of the virtual tokens, which then have no other effect.

        None: they go through the layers.
        """
        return None

    def looked_up(self, ids_T: Tensor, x_TE: Tensor) -> Tensor:
        """What becomes of the rows of the table. Those of virtual tokens mean nothing."""
        return x_TE

    def embedded(self, ids_T: Tensor, x_TE: Tensor) -> Tensor:
        """What becomes of them after they were scaled."""
        return x_TE

    def table(self, weight_VE: Tensor) -> Tensor:
        """The table as a tied head sees it."""
        return weight_VE

    def beside_matrix(self, inputs_ND: Tensor) -> tuple[Tensor, Tensor] | None:
        """Further inputs [N, R] of the head and a matrix [V, R], whose product is added to the logits (before their
        cap); None: nothing."""
        return None

    def after_layer(self, layer: int, x_TD: Tensor, layout: Layout) -> Tensor:
        """What becomes of the stream after a layer."""
        return x_TD
