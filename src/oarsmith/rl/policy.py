"""The policy as what answers: an engine over the decoder that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from oarsmith.adapters.linear import adapted_modules
from oarsmith.engine import Engine
from oarsmith.engine.native_model import obstacle
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.native.lower import refusal
from oarsmith.text import Tokenizer

_PAGE = 64


class Policy:
    """Serves the decoder's own weights.

    With the compiled step a copy of them is packed by ``refresh``, which takes less time than PyTorch needs more for a
    rollout; else the engine runs on the decoder itself, and nothing is copied.

    Args:
        compute: ``native``, ``torch``, or ``auto``: the compiled step where it can serve the model.
        rows: answers that are worked on side by side; ``max_length``: tokens of the longest prompt with its answer.
        ahead: answers are drawn while the decoder trains, so the engine needs weights that stay.

    Raises:
        ConfigError: ``native`` where that is not possible.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        compute: Literal["auto", "native", "torch"],
        rows: int,
        max_length: int,
        ahead: bool = False,
    ) -> None:
        self._model = model
        reason = _refused(model)
        if compute == "native" and reason is not None:
            what = f"the compiled step cannot serve this model: {reason}"
            raise ConfigError(what, where="rollout_compute", fix="set it to auto")
        native = compute != "torch" and reason is None
        self._twin = copy.deepcopy(model).eval().requires_grad_(False) if ahead and not native else None
        served = model if self._twin is None else self._twin
        # What the engine computes with is the decoder that trains, not a copy of it.
        self._direct = not native and self._twin is None
        num_pages = (rows + 1) * -(-max_length // _PAGE)
        with _at_rest(model):
            self.engine = Engine(
                served,
                tokenizer,
                batch_size=rows,
                num_pages=num_pages,
                compute="native" if native else "auto",
                num_threads=torch.get_num_threads() if native else None,
            )
        self.how = self.engine.how if native else f"PyTorch ({'as chosen' if compute == 'torch' else reason})"

    def refresh(self) -> None:
        """Take the weights that the decoder has now; what was computed of prompts is forgotten."""
        if self._twin is not None:
            with torch.no_grad():
                for own, other in zip(self._twin.parameters(), self._model.parameters(), strict=True):
                    own.copy_(other)
        self.engine.forget()

    def answering(self) -> AbstractContextManager[None]:
        """Within it the decoder does what it does when it answers (no dropout, no noise), if it is the one that
        answers: a copy of its weights may be asked by another thread while it trains."""
        return _at_rest(self._model) if self._direct else nullcontext()


@contextmanager
def _at_rest(model: Decoder) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _refused(model: Decoder) -> str | None:
    if any(True for _ in adapted_modules(model)):
        return "an adapter trains"
    return obstacle(str(model.device), _PAGE) or refusal(model.spec)
